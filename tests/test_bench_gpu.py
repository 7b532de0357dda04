"""The GPU benchmarks as far as they go without a GPU: plans, gates, rows, goals, the peers' tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from gpu_rows import UNTIMED, gemm_row

from bench import __main__ as command
from bench import (
    gpu_smoke,
    gpu_timing,
    harness,
    int4_gpu,
    int4_gpu_peers,
    policy_loss,
    record,
    report,
    spec_decode_gpu,
    spec_decode_report,
    workloads,
)
from bench.gpu_timing import Card, GpuArm, Work, guarded, layers
from bench.harness import UnavailableError
from bench.int4_gpu_arms import Layers, M3Gemm, M3Moe, TorchDense
from bench.spec_decode_cases import AttentionCase, CommitCase, FinalizeCase, VerifyCase, make_commit
from bench.spec_decode_gpu import CapturableCommit, moved
from bench.workloads import Experts, Linear, make_problem
from m3kernels import dispatch
from m3kernels.dispatch import BackendError

ROOT = Path(__file__).resolve().parent.parent
TINY = Linear(name="tiny", n=192, k=256, group_size=64)
FEW = Experts(name="few", experts=4, hidden=128, intermediate=64, topk=2, group_size=64)
H100 = Card(name="NVIDIA H100 80GB HBM3", l2_bytes=50 << 20, memory_bytes=80 << 30, spec_bytes_s=3.35e12)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def process_settings():
    """Arms force rooms; each test leaves the environment and the threads as it found them."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
    dispatch.rooms.cache_clear()


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return request.param


def quiet(text: str) -> None:
    """Progress that nobody reads."""


# -- clocks and plans -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H100 NVL", 3.9e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_bandwidth_of_the_data_sheet(name, rate):
    assert gpu_timing.spec_bandwidth(name) == rate


@pytest.mark.parametrize(
    ("weight_bytes", "all_arms_bytes", "count"),
    [
        (34_603_008, 400 << 20, 7),  # the least that is four times L2
        (1 << 20, 1 << 20, 94),  # no more than a model has layers
        (1 << 30, 1 << 30, 4),  # never fewer than a few
        (1 << 30, 20 << 30, 2),  # as many as fit
        (1 << 30, 90 << 30, 1),
    ],
)
def test_layers_of_a_rotation(weight_bytes, all_arms_bytes, count):
    assert layers(weight_bytes, all_arms_bytes, H100) == count


def test_without_a_gpu_the_clock_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_timing.clock.cache_clear()
    with pytest.raises(RuntimeError, match="bench --device cuda: torch sees no GPU"):
        gpu_timing.clock("cuda")


@pytest.mark.parametrize(("timing", "visited"), [("cold", [0]), ("rotation", [0, 1, 2])])
def test_a_visit_is_one_call_or_all_of_them(device, timing, visited):
    seen: list[int] = []
    arm, clock = GpuArm(), gpu_timing.clock(device)
    arm.work = Work([functools.partial(seen.append, layer) for layer in range(3)])
    assert gpu_timing.visit_of(timing, clock)(arm, 0) >= 0
    assert seen == visited


def test_captured_work_repeats_its_calls(device):
    clock = gpu_timing.clock(device)
    x = torch.ones(5, device=device)
    work = clock.work([lambda: x + 1, lambda: x * 3])
    x.fill_(2.0)
    assert [float(result.sum()) for result in work.all()] == [15.0, 30.0]
    assert float(work.first().sum()) == 15.0
    assert work.launch == ("graph" if device == "cuda" else "eager")


def test_work_that_synchronises_is_launched_by_hand(device):
    clock = gpu_timing.clock(device)
    x = torch.ones(5, device=device)
    work = clock.work([lambda: x * x.sum().item()])
    assert float(work.all()[0].sum()) == 25.0
    assert work.launch == "eager"


# -- arms that are not here, and arms that break ----------------------------------------------------------------------
def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UnavailableError("gemlite is not installed"), "gemlite is not installed"),
        (BackendError("int4_gemm: cuda: not built"), "int4_gemm: cuda: not built"),
        (ValueError("two\nlines"), "broke: ValueError: two"),
        (torch.OutOfMemoryError("CUDA out of memory"), "broke: OutOfMemoryError: CUDA out of memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_arm_that_raises_is_absent_with_the_reason(error, text):
    with pytest.raises(UnavailableError) as caught:
        guarded(functools.partial(raising, error), gpu_timing.clock("cpu"))
    assert str(caught.value) == text


def test_a_lost_device_ends_the_run():
    class Lost(gpu_timing.HostClock):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        guarded(functools.partial(raising, ValueError("first sign")), Lost())


def test_only_what_is_ours_and_wrong_fails_a_run():
    rows = [
        gemm_row(),
        gemm_row(arm="m3_triton", gate="absent: triton is not installed", **UNTIMED),
        gemm_row(arm="humming", gate="absent: broke: AssertionError: ", **UNTIMED),
        gemm_row(arm="gemlite", gate="failed", **UNTIMED),
    ]
    assert gpu_timing.broken(rows) == []
    wrong = [
        gemm_row(arm="m3_cuda", gate="failed", **UNTIMED),
        gemm_row(arm="m3_cuda_fast", gate="absent: broke: RuntimeError: launch failed", **UNTIMED),
    ]
    assert gpu_timing.broken(rows + wrong) == [
        "int4_gemm 8192x8192: m3_cuda: failed",
        "int4_gemm 8192x8192: m3_cuda_fast: absent: broke: RuntimeError: launch failed",
    ]
    assert command.judged(rows) == 0
    assert command.judged(rows + wrong) == 1


def test_an_arm_forces_its_room_and_the_next_one_frees_it(monkeypatch):
    monkeypatch.delenv(harness.CHOICE, raising=False)
    monkeypatch.setattr(harness, "GIVEN_CHOICE", None)
    arm = GpuArm()
    arm.room = "int4=reference"
    arm.enter()
    assert [room.name for room in dispatch.rooms("m3kernels.int4", "int4_gemm", "cpu")] == ["reference"]
    harness.Arm().enter()
    assert harness.CHOICE not in os.environ
    assert [room.name for room in dispatch.rooms("m3kernels.int4", "int4_gemm", "cpu")] == ["cpu", "reference"]


# -- int4 -------------------------------------------------------------------------------------------------------------
class Doubled(TorchDense):
    """An arm that is wrong."""

    def product(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return 2 * super().product(x, layer)


class WrongLast(TorchDense):
    """Wrong in its last layer alone."""

    def product(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        y = super().product(x, layer)
        return y + 1 if layer == self.layers.count - 1 else y


@pytest.fixture
def rooms_of_the_cpu(monkeypatch, device):
    """Without a GPU the arm of the CUDA room takes the reference, so that its rows can be had."""
    if device == "cpu":
        monkeypatch.setitem(int4_gpu.ARMS, "m3_cuda", functools.partial(M3Gemm, room="reference"))
        monkeypatch.setitem(int4_gpu.MOE_ARMS, "m3_cuda", functools.partial(M3Moe, room="reference"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rows_of_a_product(rooms_of_the_cpu, device, dtype, monkeypatch):
    monkeypatch.setitem(int4_gpu.ARMS, "tinygemm", Doubled)
    monkeypatch.setitem(int4_gpu.ARMS, "gemlite", WrongLast)
    arms = ("m3_cuda", "torch_dense", "tinygemm", "gemlite", "marlin")
    plan = int4_gpu.Plan(ms=(1, 5), arms=arms, dtypes=(dtype,), seconds=0.0, min_rounds=3, device=device)
    cases = list(int4_gpu.run(TINY, plan, quiet))
    assert [(case[0].m, case[0].timing) for case in cases] == [(m, way) for m in (1, 5) for way in gpu_timing.TIMINGS]
    for case in cases:
        rows = {row.arm: row for row in case}
        assert set(rows) == set(arms)
        assert rows["marlin"].gate == "absent: vllm is not installed"
        assert rows["tinygemm"].gate == rows["gemlite"].gate == "failed"
        for name in ("m3_cuda", "torch_dense"):
            row = rows[name]
            assert (row.gate, row.x_dtype, row.device, row.rounds) == ("passed", dtype, device, 3)
            assert row.error < row.tolerance == 1e-2
            assert row.ratios.keys() == {"m3_cuda", "torch_dense"} - {name}
        assert rows["m3_cuda"].stored_bytes == rows["m3_cuda"].weight_bytes
        assert "x_dtype" in json.loads(rows["m3_cuda"].to_json())


def test_rows_of_experts(rooms_of_the_cpu, device):
    plan = int4_gpu.Plan(ms=(1, 7), arms=("m3_cuda", "humming"), seconds=0.0, min_rounds=2, device=device)
    cases = list(int4_gpu.run(FEW, plan, quiet))
    assert len(cases) == 4
    for case in cases:
        rows = {row.arm: row for row in case}
        assert rows["humming"].gate == "absent: humming is not installed"
        ours = rows["m3_cuda"]
        assert (ours.op, ours.experts, ours.topk, ours.gate) == ("int4_moe", 4, 2, "passed")
    one, seven = cases[0][0], cases[2][0]
    assert one.weight_bytes < seven.weight_bytes  # of the experts that the tokens go to


def test_a_room_that_is_not_built_is_absent():
    plan = int4_gpu.Plan(ms=(1,), arms=("m3_cuda",), seconds=0.0, min_rounds=1, device="cpu", timings=("cold",))
    (case,) = int4_gpu.run(TINY, plan, quiet)
    assert [row.gate.startswith("absent: m3kernels.int4.int4_gemm: cuda: ") for row in case] == [True]
    assert gpu_timing.broken(case) == []


@pytest.mark.parametrize(("field", "value"), [("arms", "nope"), ("dtypes", "fp32"), ("timings", "warm")])
def test_a_plan_refuses_names_it_does_not_know(field, value):
    with pytest.raises(ValueError, match=f"bench int4: {field}: want names of .* on a GPU; got '{value}'"):
        int4_gpu.Plan(**{field: (value,)})


@pytest.mark.parametrize("preset", sorted(int4_gpu.PRESETS))
def test_presets_name_shapes(preset):
    plan = int4_gpu.PRESETS[preset]
    assert [workloads.find(name).name for name in plan.shapes] == list(plan.shapes)


def test_tables_tell_the_two_timings_apart():
    rows = [gemm_row(), gemm_row(timing="rotation", median_s=12e-6), gemm_row(x_dtype="fp16")]
    assert len(record.latest(rows)) == 3
    text = report.tables(rows)
    for heading in ("bf16, cold", "bf16, rotation", "fp16, cold"):
        assert f"int4_gemm 8192x8192, M = 1, on the GPU, {heading}\n" in text


# -- peers: tables of the routing, packing ----------------------------------------------------------------------------
def test_words_hold_eight_nibbles_lowest_first():
    q = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8)
    assert int4_gpu_peers.words(q).tolist() == [[0xF7654321 - (1 << 32)]]


def test_slots_are_aligned_to_blocks_of_one_expert():
    ids = torch.tensor([[2, 0], [2, 1], [0, 2]])
    slots, experts, count = int4_gpu_peers.aligned(ids, 4, 2)
    assert slots.tolist() == [1, 4, 3, 6, 0, 2, 5, 6]
    assert experts.tolist() == [0, 1, 2, 2]
    assert (int(count), slots.dtype, experts.dtype, count.shape) == (8, torch.int32, torch.int32, ())


def test_rows_sorted_by_expert_find_their_way_back():
    ids = torch.tensor([[2, 0], [2, 1], [0, 2]])
    token, place, offsets = int4_gpu_peers.by_expert(ids, 4)
    assert offsets.tolist() == [0, 2, 3, 6, 6]
    assert token.tolist() == [0, 2, 1, 0, 1, 2]
    assert [int(token[row]) for row in place] == [0, 0, 1, 1, 2, 2]
    experts = torch.searchsorted(offsets, place, right=True) - 1
    assert experts.view(3, 2).tolist() == ids.tolist()


@pytest.mark.parametrize("name", ["gemlite", "humming", "marlin"])
def test_peers_that_are_not_installed_say_so(name, monkeypatch):
    monkeypatch.setattr("bench.peers.importlib.util.find_spec", lambda package: None)
    held = Layers(make_problem(TINY, 1), 1, "bf16")
    with pytest.raises(UnavailableError, match="is not installed"):
        int4_gpu.ARMS[name](held)


def test_weights_of_a_form_are_made_once():
    held, made = Layers(make_problem(TINY, 1), 3, "bf16"), []
    first = held.each("form", lambda layer: made.append(layer) or layer)
    assert held.each("form", lambda layer: made.append(layer) or layer) is first
    assert made == [0, 1, 2]


# -- spec_decode ------------------------------------------------------------------------------------------------------
SMALL = {
    "greedy": VerifyCase(name="greedy", requests=3, nodes=9, vocabulary=997, mode="greedy"),
    "coupled": VerifyCase(name="coupled", requests=3, nodes=9, vocabulary=997, mode="coupled", filtered=True),
    "target_only": VerifyCase(name="target_only", requests=3, nodes=9, vocabulary=997, mode="target_only"),
    "attention": AttentionCase(
        name="attention", context=70, queries=7, tree=True, heads=6, kv_heads=2, head_dim=64, requests=2
    ),
    "finalize": FinalizeCase(name="finalize", requests=4, nodes=33, steps=4),
    "commit": CommitCase(name="commit", requests=3, layers=2, kv_heads=1, head_dim=8, accepted=4),
}


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_trees(name, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(spec_decode_gpu, "ROOMS", ("reference", "cuda"))
    monkeypatch.setattr(spec_decode_gpu, "CASES", SMALL)
    plan = spec_decode_gpu.Plan(cases=(name,), seconds=0.0, min_rounds=2, device=device)
    (case,) = spec_decode_gpu.run(plan, quiet)
    rows = {row.arm: row for row in case}
    ours = "m3_reference" if device == "cpu" else "m3_cuda"
    assert rows[ours].gate == "passed", rows[ours]
    if device == "cpu":
        assert rows["m3_cuda"].gate.startswith("absent: m3kernels.spec_decode.")
    for row in case:
        assert (row.device, row.timing, row.span) == (device, "cold", 1)
        assert row.gate.startswith(("passed", "absent: m3kernels"))
    assert all(f"| {row.arm}" in spec_decode_report.tables(case) for row in case)
    assert spec_decode_report.acceptance([dataclasses.replace(row, device="cuda") for row in case]) == []


def test_wrong_trees_get_no_time(monkeypatch):
    class Wrong(spec_decode_gpu.Verify):
        def call(self, problem):
            return super().call(problem) + 1

    monkeypatch.setattr(spec_decode_gpu, "ROOMS", ("reference",))
    monkeypatch.setattr(spec_decode_gpu, "CASES", SMALL)
    monkeypatch.setitem(spec_decode_gpu.PEERS, "tree_verify", {"wrong": Wrong})
    plan = spec_decode_gpu.Plan(cases=("greedy",), seconds=0.0, min_rounds=1, device="cpu")
    (case,) = spec_decode_gpu.run(plan, quiet)
    assert {row.arm: row.gate for row in case} == {"m3_reference": "passed", "wrong": "failed"}


def test_tokens_that_the_reference_does_not_emit_end_the_run(monkeypatch):
    right = spec_decode_gpu.Verify.call
    monkeypatch.setattr(spec_decode_gpu.Verify, "call", lambda self, problem: right(self, problem) + 1)
    with pytest.raises(RuntimeError, match="greedy: the room of the CPU does not emit the reference's tokens"):
        spec_decode_gpu.prepared(SMALL["greedy"], "cpu")


def test_commits_move_the_same_with_and_without_a_mask():
    problem = make_commit(SMALL["commit"])
    ours, theirs = problem.copied(), problem.copied()
    seqlens = CapturableCommit([ours], 1).call(ours)
    assert torch.equal(seqlens, spec_decode_gpu.TorchCommit([theirs], 1).call(theirs))
    for mine, other in zip([*ours.k_caches, *ours.v_caches], [*theirs.k_caches, *theirs.v_caches], strict=True):
        assert torch.equal(mine, other)


def test_a_moved_problem_keeps_its_integers():
    problem = make_commit(SMALL["commit"])
    other = moved(problem, "cpu", torch.bfloat16)
    assert {cache.dtype for cache in (*other.k_caches, *other.v_caches)} == {torch.bfloat16}
    assert torch.equal(other.block_table, problem.block_table) and other.case is problem.case


def test_gpu_cases_have_sizes_of_the_goals():
    verify = [case for case in spec_decode_gpu.CASES.values() if isinstance(case, VerifyCase)]
    assert {case.requests for case in verify} == {1, 8, 64}
    assert {(case.nodes, case.vocabulary, case.span) for case in verify} == {(32, 151936, 1)}
    commits = [case for case in spec_decode_gpu.CASES.values() if isinstance(case, CommitCase)]
    assert {(case.layers, case.accepted) for case in commits} == {(94, 4)}


# -- policy_loss ------------------------------------------------------------------------------------------------------
def test_an_arm_of_ours_may_name_its_room():
    head = workloads.LossHead(name="tiny", tokens=12, hidden=16, vocabulary=50)
    problem = workloads.make_loss_problem(head, "fp32", 1.0)
    arm = policy_loss.factory("m3_one_pass@reference")(problem, 1)
    arm.name = "m3_one_pass@reference"
    found: dict[str, dict[str, float]] = {}
    assert policy_loss.gate(arm, workloads.expected_loss(problem), found).passed
    assert os.environ[harness.CHOICE] == "policy_loss=reference"
    assert policy_loss.factory("m3_one_pass")(problem, 1).room is None


@pytest.mark.parametrize("name", ["nope", "torch@cuda", "m3_one_pass@nowhere"])
def test_rooms_are_of_our_arms_alone(name):
    with pytest.raises(ValueError, match=f"arms: want names of .*, ours also as name@room; got '{name}'"):
        policy_loss.factory(name)


# -- the command line -------------------------------------------------------------------------------------------------
def test_the_command_line_changes_a_plan():
    arguments = command.parser().parse_args(
        [
            "int4",
            "--device",
            "cuda",
            "--preset",
            "gpu_moe",
            "--m",
            "1,16",
            "--arms",
            "m3_cuda,humming",
            "--seconds",
            "2",
        ]
    )
    plan = command.int4_gpu_plan(arguments)
    assert (plan.shapes, plan.ms, plan.arms) == (("qwen3-235b-a22b.moe",), (1, 16), ("m3_cuda", "humming"))
    assert (plan.seconds, plan.min_rounds) == (2.0, 20)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["int4", "--device", "cuda", "--preset", "acceptance"], "acceptance is of --device cpu"),
        (["int4", "--preset", "gpu_moe"], "gpu_moe is of --device cuda"),
    ],
)
def test_presets_belong_to_a_device(words, text):
    with pytest.raises(SystemExit, match=text):
        command.run_int4(command.parser().parse_args(words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("family", ["int4", "spec_decode"])
def test_without_a_gpu_the_benches_say_so(family, tmp_path):
    gpu_timing.clock.cache_clear()
    arguments = command.parser().parse_args([family, "--device", "cuda", "--out", str(tmp_path / "rows.jsonl")])
    run = {"int4": command.run_int4, "spec_decode": command.run_spec_decode}[family]
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        run(arguments)


# -- the smoke test ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", gpu_smoke.FAMILIES)
def test_the_smoke_test_passes(family, device, capsys):
    assert gpu_smoke.run([family], device, "reference" if device == "cpu" else "cuda") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed and all(line.startswith(f"ok    {family}: ") for line in printed)


def test_the_smoke_test_sees_a_wrong_value(monkeypatch, capsys):
    def checks(device: str):
        yield "right", lambda: (torch.ones(3), torch.ones(3))
        yield "wrong", lambda: (torch.ones(3), torch.ones(3) * 1.1)
        yield "nan", lambda: (torch.full((3,), torch.nan), torch.ones(3))

    monkeypatch.setitem(gpu_smoke.FAMILIES, "int4", checks)
    assert gpu_smoke.run(["int4"], "cpu", "reference") == 2
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["ok   ", "WRONG", "WRONG"]
