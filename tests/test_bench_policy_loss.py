"""The policy_loss benchmark: arms compute what they claim, wrong ones get no time, memory is what was allocated."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch

from bench import __main__ as command
from bench import harness, policy_loss, policy_loss_report, record, report, tables, workloads
from bench.harness import Gate, UnavailableError
from bench.policy_loss import ARMS, Plan, Products
from bench.policy_loss_peers import LossArm, PeerLoss, Torch
from bench.workloads import LossHead, expected_loss, make_loss_problem

TINY = LossHead(name="tiny", tokens=36, hidden=24, vocabulary=203, sequences=3)
ONE = LossHead(name="one", tokens=1, hidden=8, vocabulary=5, sequences=1)
TIMED = dict.fromkeys(record.LossRow.TIMED)


@pytest.fixture(autouse=True)
def process_settings():
    """Arms set thread counts; each test leaves them, and the environment, as it found them."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def make_row(**changes: object) -> record.LossRow:
    values = {
        "op": "linear_policy_loss",
        "shape": "smollm2-135m.t1024",
        "tokens": 1024,
        "hidden": 576,
        "vocabulary": 49152,
        "sequences": 4,
        "dtype": "fp32",
        "density": 1.0,
        "gradient_bytes": 4 * 576 * (49152 + 1024),
        "arm": "m3_one_pass",
        "device": "cpu",
        "threads": 1,
        "case_threads": 1,
        "gate": "passed",
        "error": 8e-7,
        "tolerance": 1e-5,
        "errors": {"loss": 1e-8, "d_hidden": 8e-7, "d_weight": 7e-7},
        "median_s": 1.2,
        "p20_s": 1.1,
        "p80_s": 1.3,
        "rounds": 5,
        "units": (3.1, 3.0, 3.3),
        "peak_bytes": 160 << 20,
        "peak_threads": 2,
        "ratios": {"torch": (1.25, 1.2, 1.3), "trl": (2.0, 1.9, 2.1)},
        "commit": "0123456789ab",
        "dirty": False,
        "machine": {"cpu": "some cpu", "cores": 2, "python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "date": "2026-11-22T00:00:00+00:00",
        "command": "python -m bench policy_loss",
    }
    return record.LossRow(**{**values, **changes})


# -- rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", record.LossRow.TIMED)
def test_a_row_without_a_passed_gate_carries_no_time_and_no_peak(name):
    kept = {**TIMED, name: getattr(make_row(units_bf16=(1.0, 1.0, 1.0)), name)}
    with pytest.raises(ValueError, match=f"Row: gate: want 'passed' for a row with {name}; got 'failed'"):
        make_row(gate="failed", **kept)


def test_rows_of_both_families_survive_one_file(tmp_path):
    rows = [make_row(), make_row(arm="trl", gate="absent: not here", error=None, errors=None, **TIMED)]
    record.append(tmp_path / "rows.jsonl", rows)
    assert record.read(tmp_path / "rows.jsonl") == rows
    assert rows[0].workspace_bytes == (160 << 20) - 4 * 576 * (49152 + 1024)
    assert rows[1].workspace_bytes is None


@pytest.mark.parametrize("field", ["dtype", "density", "case_threads", "arm", "shape"])
def test_rows_of_different_cases_do_not_replace_each_other(field):
    other = {"dtype": "bf16", "density": 0.4, "case_threads": 2, "arm": "torch", "shape": "else"}[field]
    rows = [make_row(), make_row(**{field: other}), make_row(median_s=9.0)]
    assert [row.median_s for row in record.latest(rows)] == [9.0, 1.2]


# -- inputs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", workloads.DTYPES)
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_the_problem_has_its_density_and_one_clipped_token_a_sequence(dtype, density):
    problem = make_loss_problem(TINY, dtype, density)
    assert problem.hidden.dtype == problem.weight.dtype == workloads.DTYPES[dtype]
    assert problem.mask.sum(1).tolist() == [round(12 * density)] * 3
    logits = problem.hidden.detach().double() @ problem.weight.detach().double().T
    logprobs = logits.log_softmax(-1).gather(-1, problem.ids[..., None])[..., 0]
    log_ratio = logprobs - problem.old_logprobs.double()
    low, high = math.log(1 - workloads.CLIP), math.log(1 + workloads.CLIP)
    adverse = torch.where(problem.advantages[:, None] > 0, log_ratio > high, log_ratio < low)
    assert (adverse & problem.mask).sum(1).tolist() == [1, 1, 1]
    assert ((log_ratio < low) | (log_ratio > high)).sum(1).tolist() == [1, 1, 1]


def test_the_same_seed_gives_the_same_problem():
    first, second = make_loss_problem(TINY, "fp32", 0.4), make_loss_problem(TINY, "fp32", 0.4)
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.old_logprobs, second.old_logprobs)


@pytest.mark.parametrize(("tokens", "density"), [(37, 1.0), (36, 0.01)], ids=["ragged", "nothing counts"])
def test_a_problem_that_cannot_be_is_refused(tokens, density):
    head = dataclasses.replace(TINY, tokens=tokens)
    with pytest.raises(ValueError, match=f"make_loss_problem: head: want a multiple of 3 tokens.*; got {tokens}"):
        make_loss_problem(head, "fp32", density)


def test_the_expected_loss_does_not_depend_on_its_blocks(monkeypatch):
    problem = make_loss_problem(TINY, "fp32", 0.4)
    whole = expected_loss(problem)
    monkeypatch.setattr(workloads, "BLOCK_TOKENS", 5)
    parts = expected_loss(problem)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    torch.testing.assert_close(parts.d_hidden, whole.d_hidden, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(parts.d_weight, whole.d_weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("preset", sorted(policy_loss.PRESETS))
def test_presets_name_heads_and_arms(preset):
    plan = policy_loss.PRESETS[preset]
    assert [workloads.find_head(name).name for name in plan.heads] == list(plan.heads)
    assert all(callable(policy_loss.factory(name)) for name in plan.arms)


def test_an_unknown_head_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"bench: shape: want one of smollm2-135m.t1024, .*; got 'nope'"):
        workloads.find_head("nope")


@pytest.mark.parametrize("field", ["arms", "dtypes"])
def test_a_plan_refuses_names_it_does_not_know(field):
    with pytest.raises(ValueError, match=f"bench policy_loss: {field}: want names of .*; got 'nope'"):
        Plan(heads=(), **{field: ("nope",)})


# -- arms -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("dtype", workloads.DTYPES)
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_every_arm_computes_the_loss_and_both_gradients(name, dtype, density):
    problem = make_loss_problem(TINY, dtype, density)
    try:
        arm = ARMS[name](problem, 1)
        arm.name = name
        gate = policy_loss.gate(arm, expected_loss(problem), {})
    except UnavailableError as error:
        pytest.skip(str(error))
    assert gate.passed, f"error {gate.error:.2e}, tolerance {gate.tolerance:.0e}"
    assert (gate.error > 1e-4) is (dtype == "bf16")


@pytest.mark.parametrize("name", policy_loss.OURS)
def test_our_arms_serve_a_single_token(name):
    problem = make_loss_problem(ONE, "fp32", 1.0)
    arm = ARMS[name](problem, 1)
    arm.name = name
    arm.enter()
    arm.run(0)
    # The one token is clipped: no gradient at all, where relative errors mean nothing.
    assert float(arm.loss) == pytest.approx(expected_loss(problem).loss, rel=1e-5)
    assert float(problem.hidden.grad.abs().max()) == float(problem.weight.grad.abs().max()) == 0.0


class Scaled(Torch):
    """The loss times a factor: gradients and loss wrong by it."""

    factor = 1.0

    def forward(self) -> torch.Tensor:
        return super().forward() * self.factor


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1 + 5e-6, True), (1 + 3e-5, False), (math.nan, False)])
def test_the_gate_sees_gradients(factor, passes):
    problem = make_loss_problem(TINY, "fp32", 1.0)
    arm = Scaled(problem, 1, compact=False)
    arm.name, arm.factor = "scaled", factor
    found: dict[str, dict[str, float]] = {}
    gate = policy_loss.gate(arm, expected_loss(problem), found)
    assert gate.passed is passes
    assert set(found["scaled"]) == {"loss", "d_hidden", "d_weight"}


@pytest.mark.parametrize("leaf", ["hidden", "weight"])
def test_the_gate_sees_a_missing_gradient(leaf):
    problem = make_loss_problem(TINY, "fp32", 1.0)
    expected = expected_loss(problem)

    class Half(Torch):
        def run(self, part: int) -> None:
            super().run(part)
            getattr(self.problem, leaf).grad = None

    arm = Half(problem, 1, compact=False)
    arm.name = "half"
    gate = policy_loss.gate(arm, expected, {})
    assert math.isnan(gate.error)
    assert not gate.passed


def test_what_a_peer_raises_becomes_its_reason():
    class Broken(PeerLoss):
        def forward(self) -> torch.Tensor:
            raise KeyError("no such kernel")

    arm = Broken(make_loss_problem(TINY, "fp32", 1.0), 1)
    arm.name = "broken"
    absent: dict[str, str] = {}
    said: list[str] = []
    timed, gates = harness.pass_gates([arm], lambda arm: policy_loss.gate(arm, None, {}), absent, said.append)
    assert (timed, gates) == ([], {})
    assert absent == {"broken": "does not run here: KeyError: 'no such kernel'"}
    assert said == ["  broken: absent: does not run here: KeyError: 'no such kernel'"]


def test_compaction_by_hand_needs_a_mask():
    with pytest.raises(UnavailableError, match="every token counts: the same as torch"):
        Torch(make_loss_problem(TINY, "fp32", 1.0), 1, compact=True)


def test_a_package_that_is_not_there_is_named():
    from bench.policy_loss_peers import imported

    with pytest.raises(UnavailableError, match="nothing cannot be imported: No module named 'nothing_at_all'"):
        imported("nothing", "nothing_at_all.part")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("room", [1 << 30, 4 * 203 * 5], ids=["one block", "five rows a block"])
def test_bare_products(monkeypatch, count, room):
    monkeypatch.setattr(policy_loss, "PRODUCT_BYTES", room)
    problem = make_loss_problem(TINY, "fp32", 1.0)
    arm = Products(problem, 1, count=count)
    assert arm.gate().passed
    if count == 3:
        x, weight = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
        torch.testing.assert_close(arm.d_x, x @ weight.T @ weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(arm.d_weight, (x @ weight.T).T @ x, rtol=1e-4, atol=1e-4)


# -- memory -----------------------------------------------------------------------------------------------------------
def test_the_peak_is_what_was_held_at_most():
    small, large = 1 << 20, 96 << 20

    def work() -> None:
        buffer = torch.ones(large, dtype=torch.uint8)
        del buffer
        torch.ones(small, dtype=torch.uint8)

    assert harness.peak_extra_bytes(work) == pytest.approx(large, rel=0.05)
    assert harness.peak_extra_bytes(lambda: None) < small


@pytest.mark.slow
def test_the_peak_of_an_arm_is_at_least_its_gradients():
    head = LossHead(name="some", tokens=64, hidden=64, vocabulary=65536)
    peak = policy_loss.peak_in_fresh_process(head, "fp32", 1.0, "m3_one_pass", 1)
    gradients = 4 * 64 * (65536 + 64)
    assert gradients <= peak <= gradients + (128 << 20)


def test_a_peak_that_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setattr(policy_loss.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="torch: its peak was not measured"):
        policy_loss.peak_in_fresh_process(TINY, "fp32", 1.0, "torch", 1)


# -- a whole case -----------------------------------------------------------------------------------------------------
def test_a_case_gives_a_row_per_arm_and_unit(monkeypatch):
    monkeypatch.setattr(
        policy_loss, "peak_in_fresh_process", lambda head, dtype, density, name, threads: 1000 + threads
    )
    arms = ("m3_one_pass", "torch", "gemms")
    plan = Plan(heads=("tiny",), threads=(1, 2), arms=(*arms, "verl_triton"), seconds=0.0, min_rounds=2)
    cases = list(policy_loss.run(TINY, plan, lambda text: None))
    assert [(case[0].dtype, case[0].density, case[0].case_threads) for case in cases] == [
        (dtype, density, threads) for dtype in ("fp32", "bf16") for density in (1.0, 0.4) for threads in (1, 2)
    ]
    for case in cases:
        units = ("gemm_fp32", "gemm_bf16") if case[0].dtype == "bf16" else ("gemm_fp32",)
        assert {row.arm for row in case if row.gate == "passed"} == {*arms, *units}
        assert [row.gate for row in case if row.arm == "verl_triton"] == ["absent: verl's Triton kernels need a GPU"]
        for row in tables.timed(case):
            assert row.units[0] > 0
            assert (row.units_bf16 is not None) is (row.dtype == "bf16")
            assert row.peak_bytes == (1002 if row.arm in ("m3_one_pass", "torch") else None)
            assert (row.errors is None) is policy_loss_report.is_product(row)
        unit = next(row for row in case if row.arm == "gemm_fp32")
        assert unit.units == (1.0, 1.0, 1.0)


def test_every_timed_run_starts_without_gradients():
    arm = Torch(make_loss_problem(TINY, "fp32", 1.0), 1, compact=False)
    left: list[bool] = []
    run, arm.run = arm.run, lambda part: (left.append(arm.problem.weight.grad is None), run(part))
    assert min(harness.visit(arm, 0) for _ in range(2)) > 0
    assert left == [True, True]


@pytest.mark.parametrize(("tunables", "keeps"), [(record.KEEPING_MALLOC, True), ("", False)])
def test_a_row_says_whether_malloc_keeps_memory(monkeypatch, tunables, keeps):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert record.malloc_keeps() == keeps


def test_a_failed_gate_gives_a_row_without_time(monkeypatch):
    monkeypatch.setattr(policy_loss, "gate", lambda arm, expected, found: Gate(error=1.0, tolerance=1e-5))
    plan = Plan(heads=("tiny",), dtypes=("fp32",), densities=(1.0,), threads=(1,), arms=("torch",), min_rounds=1)
    (case,) = policy_loss.run(TINY, plan, lambda text: None)
    assert {(row.arm, row.gate, row.median_s) for row in case} == {
        ("torch", "failed", None),
        ("gemm_fp32", "failed", None),
    }


@pytest.mark.parametrize(
    ("dtype", "device", "wanted"),
    [
        ("fp32", "cpu", ["gemm_fp32"]),
        ("bf16", "cpu", ["gemm_fp32", "gemm_bf16"]),
        ("bf16", "cuda", ["gemm_bf16"]),
    ],
)
def test_units(dtype, device, wanted):
    assert policy_loss.units(dtype, device) == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_rows():
    head = dataclasses.replace(TINY, hidden=128, vocabulary=1024)
    plan = dataclasses.replace(policy_loss.PRESETS["gpu"], seconds=0.0, min_rounds=1)
    rows = {row.arm: row for case in policy_loss.run(head, plan, lambda text: None) for row in case}
    ours = [rows[name] for name in policy_loss.OURS]
    assert [(row.gate, row.device) for row in ours] == [("passed", "cuda")] * len(ours)
    assert all(row.peak_bytes >= row.gradient_bytes for row in ours)


# -- command line -----------------------------------------------------------------------------------------------------
def test_the_command_line_changes_what_it_names():
    given = ["policy_loss", "--preset", "long", "--threads", "1", "--densities", "0.5", "--no-memory"]
    plan = command.loss_plan(command.parser().parse_args(given))
    preset = policy_loss.PRESETS["long"]
    assert plan == dataclasses.replace(preset, threads=(1,), densities=(0.5,), memory=False)


@pytest.mark.parametrize(("device", "preset"), [("cpu", "acceptance"), ("cuda", "gpu")])
def test_the_device_chooses_the_preset(device, preset):
    plan = command.loss_plan(command.parser().parse_args(["policy_loss", "--device", device]))
    assert plan == policy_loss.PRESETS[preset]


@pytest.mark.parametrize("density", ["0", "1.5"])
def test_a_density_beyond_one_is_refused(density, capsys):
    with pytest.raises(SystemExit):
        command.parser().parse_args(["policy_loss", "--densities", density])
    assert "want numbers above 0 and at most 1" in capsys.readouterr().err


# -- report -----------------------------------------------------------------------------------------------------------
def acceptance_rows(**ours: object) -> list[record.LossRow]:
    """fp32, all tokens, one thread: torch 1.25 times as slow and 3.6 times as large, a slow peer a little smaller."""
    fields = {"ratios": {"torch": (1.25, 1.2, 1.3), "slow": (4.0, 3.9, 4.1)}, **ours}
    return [
        make_row(**fields),
        make_row(arm="torch", median_s=1.5, units=(3.9, 3.8, 4.0), peak_bytes=576 << 20, ratios={}),
        make_row(arm="slow", median_s=4.8, units=(12.4, 12.0, 13.0), peak_bytes=155 << 20, ratios={}),
        make_row(arm="gemms", median_s=1.0, units=(2.6, 2.5, 2.7), peak_bytes=None, ratios={}),
        make_row(arm="verl", gate="failed", error=1.0, **TIMED),
    ]


def test_promises_of_a_case():
    lines = {line.what: line for line in policy_loss_report.acceptance(acceptance_rows())}
    assert {what: (line.peer, line.got, line.passed) for what, line in lines.items()} == {
        "m3_one_pass in fp32 products": ("gemm_fp32", 3.1, True),
        "m3_one_pass peak beyond fp32 dW, MiB": ("one tile budget", 52.0, True),
        "time over the closest rival": ("torch", 1.25, True),
        "or: memory of the closest rival": ("torch", pytest.approx(576 / 160), True),
    }


@pytest.mark.parametrize(
    ("torch_time", "slow_time", "peak", "peer", "verdicts"),
    [
        (1.25, 4.0, 160, "torch", ["other line", "pass"]),
        (1.4, 4.0, 160, "torch", ["pass", "pass"]),
        (1.4, 4.0, 200, "slow", ["MISS", "MISS"]),
        (1.25, 4.0, 150, "torch", ["other line", "pass"]),
        (0.9, 4.0, 150, "torch", ["MISS", "MISS"]),
        (1.25, 1.2, 150, "slow", ["MISS", "MISS"]),
    ],
    ids=["memory", "both", "faster, larger", "smaller than all", "smaller, slower", "neither"],
)
def test_of_every_rival_ours_is_ahead_in_time_or_in_memory(torch_time, slow_time, peak, peer, verdicts):
    ratios = {"torch": (torch_time, 1.0, 2.0), "slow": (slow_time, 1.0, 5.0)}
    lines = policy_loss_report.acceptance(acceptance_rows(ratios=ratios, peak_bytes=peak << 20))[-2:]
    assert {line.peer for line in lines} == {peer}
    rows = tables.acceptance_table(lines, "case").splitlines()[3:5]
    assert [row.split("|")[-2].strip() for row in rows] == verdicts
    assert [line.passed for line in lines] == [verdict != "MISS" for verdict in verdicts]


def test_an_upper_bound_is_missed_from_above():
    lines = policy_loss_report.acceptance([make_row(units=(3.21, 3.1, 3.3), peak_bytes=(108 << 20) + (81 << 20))])
    assert [(line.at_most, line.passed) for line in lines] == [(True, False), (True, False)]
    assert "<= 3.20" in tables.acceptance_table(lines, "case")


def test_bf16_is_compared_with_torch_and_trl():
    row = make_row(
        dtype="bf16", units_bf16=(2.0, 1.9, 2.1), ratios={"torch": (3.0, 2.9, 3.1), "trl": (16.0, 15.0, 17.0)}
    )
    lines = [line for line in policy_loss_report.acceptance([row]) if line.what == "m3_one_pass over the peer"]
    assert [(line.peer, line.got, line.passed) for line in lines] == [("torch", 3.0, False), ("trl", 16.0, True)]


@pytest.mark.parametrize(("extra", "passes"), [(5 << 20, True), (7 << 20, False)])
def test_the_workspace_of_many_tokens_is_that_of_few(extra, passes):
    long = {"hidden": 64, "vocabulary": 151936, "gradient_bytes": 40 << 20, "ratios": {}}
    rows = [
        make_row(shape="narrow.t8192", tokens=8192, peak_bytes=(40 << 20) + (64 << 20), **long),
        make_row(shape="narrow.t65536", tokens=65536, peak_bytes=(40 << 20) + (64 << 20) + extra, **long),
    ]
    (line,) = policy_loss_report.acceptance(rows)
    assert line.got == pytest.approx(1 + extra / (64 << 20))
    assert line.passed is passes


def test_the_report_holds_tables_plots_and_reasons(tmp_path):
    pytest.importorskip("matplotlib")
    absent = make_row(arm="liger_ce", gate="absent: not here", error=None, errors=None, **TIMED)
    bf16 = make_row(dtype="bf16", density=0.4, units_bf16=(1.5, 1.4, 1.6), case_threads=2)
    record.append(tmp_path / "results" / "policy_loss.jsonl", [*acceptance_rows(), absent, bf16])
    report.write(tmp_path / "results", tmp_path / "docs" / "benchmarks.md")
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "### Promises of the policy loss" in text
    assert "### linear_policy_loss smollm2-135m.t1024" in text
    assert "**bf16, density 0.4, 2 thread(s)**" in text
    assert "| absent: not here" in text
    assert "none: error over 1e-05" in text
    for kind in ("png", "svg"):
        plot = tmp_path / "docs" / "benchmarks" / f"linear_policy_loss-smollm2-135m.t1024-some-cpu.{kind}"
        assert plot.stat().st_size > 10_000
        assert f"benchmarks/{plot.name}" in text


def test_tables_leave_out_columns_that_are_empty():
    text = policy_loss_report.tables([make_row()])
    assert "fp32 units" in text
    assert "bf16 units" not in text


def test_a_loss_arm_starts_without_gradients():
    problem = make_loss_problem(TINY, "fp32", 1.0)
    arm = Torch(problem, 1, compact=False)
    assert isinstance(arm, LossArm)
    arm.run(0)
    arm.enter()
    assert problem.hidden.grad is problem.weight.grad is None
