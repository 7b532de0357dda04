"""The benchmark harness: gates refuse, rounds interleave, rows say what they must, arms compute what they claim."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import ggml, harness, int4, record, report, roofline, tables, workloads
from bench.harness import Arm, Gate, GemmArm, Rotation, UnavailableError
from bench.workloads import Experts, Linear, make_problem
from m3kernels.int4 import int4_dequantize

TINY = Linear(name="tiny", n=192, k=256)
PARTIAL = Linear(name="partial", n=128, k=192)  # the last group holds 64 columns
ROTATION = Rotation(span=2, parts=2)


class Exact(GemmArm):
    """x @ W.T in fp64, times ``factor``: a right arm or a wrong one."""

    def __init__(self, problem: workloads.Problem, factor: float = 1.0, name: str = "exact") -> None:
        self.name, self.span, self.parts, self.factor = name, ROTATION.span, ROTATION.parts, factor
        self.weights = [problem.rows(problem.dense, copy).double() for copy in range(ROTATION.copies)]
        self.outputs: dict[int, torch.Tensor] = {}
        self.visited: list[int] = []

    def load(self, x: torch.Tensor) -> None:
        self.x = x.double()

    def run(self, part: int) -> None:
        self.visited.append(part)
        for copy in range(part * self.span, (part + 1) * self.span):
            self.outputs[copy] = self.x @ self.weights[copy].T * self.factor

    def output(self, copy: int) -> torch.Tensor:
        return self.outputs[copy].float()


@pytest.fixture(autouse=True)
def process_settings():
    """Arms set thread counts; each test leaves them, and the environment, as it found them."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def problem() -> workloads.Problem:
    return make_problem(TINY, 5)


def make_row(**changes: object) -> record.GemmRow:
    values = {
        "op": "int4_gemm",
        "shape": "4096x4096",
        "m": 1,
        "n": 4096,
        "k": 4096,
        "group_size": 128,
        "symmetric": True,
        "arm": "m3_int8",
        "computes": "int8",
        "lossy": True,
        "device": "cpu",
        "threads": 1,
        "case_threads": 1,
        "gate": "passed",
        "error": 6e-3,
        "tolerance": 8e-3,
        "median_s": 1e-3,
        "p20_s": 9e-4,
        "p80_s": 2e-3,
        "rounds": 5,
        "gmacs": 16.8,
        "weight_bytes": 8650752,
        "gbytes_s": 8.65,
        "read_gbytes_s": 10.0,
        "read_share": 0.865,
        "spec_share": 0.4,
        "peak_gmacs": 300.0,
        "peak_share": 0.056,
        "ratios": {"ort_a4": (1.2, 1.1, 1.3)},
        "commit": "0123456789ab",
        "dirty": False,
        "machine": {"cpu": "some cpu", "cores": 2, "python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "date": "2026-11-22T00:00:00+00:00",
        "command": "python -m bench int4",
    }
    return record.GemmRow(**{**values, **changes})


# -- rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gate", ["failed", "absent: not installed"])
@pytest.mark.parametrize("name", record.GemmRow.TIMED)
def test_a_row_without_a_passed_gate_carries_no_time(gate, name):
    untimed = dict.fromkeys(record.GemmRow.TIMED)
    kept = {**untimed, name: getattr(make_row(), name)}
    with pytest.raises(ValueError, match=f"Row: gate: want 'passed' for a row with {name}; got '{gate}'"):
        make_row(gate=gate, **kept)
    assert make_row(gate=gate, **untimed).median_s is None


@pytest.mark.parametrize("error", [None, math.nan, 8.1e-3], ids=["none", "nan", "above"])
def test_a_passed_gate_needs_an_error_within_tolerance(error):
    with pytest.raises(ValueError, match=r"Row: error: want at most 0\.008 for gate 'passed'"):
        make_row(error=error)


def test_an_unknown_gate_is_refused():
    untimed = dict.fromkeys(record.GemmRow.TIMED)
    with pytest.raises(ValueError, match="Row: gate: want 'passed', 'failed' or 'absent: why'; got 'maybe'"):
        make_row(gate="maybe", **untimed)


def test_rows_survive_the_file(tmp_path):
    rows = [make_row(), make_row(arm="ort_a4", gate="failed", error=math.nan, **dict.fromkeys(record.GemmRow.TIMED))]
    record.append(tmp_path / "sub" / "rows.jsonl", rows[:1])
    record.append(tmp_path / "sub" / "rows.jsonl", rows[1:])
    again = record.read(tmp_path / "sub" / "rows.jsonl")
    assert again == rows
    assert again[1].error is None
    assert json.loads(rows[0].to_json())["ratios"] == {"ort_a4": [1.2, 1.1, 1.3]}


@pytest.mark.parametrize("line", ["{", "{}", '{"ratios": null}', "[]"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{make_row().to_json()}\n{line}\n")
    with pytest.raises(ValueError, match=r"record.read: rows.jsonl: want a row in line 2; got"):
        record.read(path)


def test_the_last_row_of_a_key_counts():
    rows = [make_row(median_s=1.0), make_row(arm="ort_a4"), make_row(median_s=2.0)]
    assert [(row.arm, row.median_s) for row in record.latest(rows)] == [("m3_int8", 2.0), ("ort_a4", 1e-3)]


def test_the_machine_and_the_commit_are_told():
    machine = record.machine()
    assert machine["cpu"] and machine["cores"] >= 1
    assert machine["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    commit, dirty = record.commit()
    assert commit and isinstance(dirty, bool)


# -- harness ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "wanted"),
    [([3.0], (3.0, 3.0, 3.0)), ([2.0, 1.0], (1.5, 1.2, 1.8)), ([5, 1, 3, 2, 4, 6], (3.5, 2.0, 5.0))],
    ids=["one", "two", "six"],
)
def test_spread(values, wanted):
    spread = harness.spread(values)
    assert (spread.median, spread.p20, spread.p80) == pytest.approx(wanted)


def test_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="spread: values: want at least one; got none"):
        harness.spread([])


def test_ratio_is_taken_within_rounds():
    # The machine slows tenfold half way: medians of each arm would say 5.5 / 5.5, rounds say 2.
    ours, peer = [1.0, 1.0, 10.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0, 20.0]
    assert harness.ratio(peer, ours).median == 2.0
    assert harness.ratios({"ours": ours, "peer": peer}, "ours") == {"peer": (2.0, 2.0, 2.0)}
    with pytest.raises(ValueError, match="ratio: ours: want 2 rounds, like peer; got 1"):
        harness.ratio([1.0, 1.0], [1.0])


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0, True), (1 + 5e-6, True), (1 + 2e-5, False), (math.nan, False), (math.inf, False)]
)
def test_gate(problem, factor, passes):
    arm = Exact(problem, factor)
    arm.load(problem.x)
    gate = harness.gate(arm, functools.partial(problem.result, 5))
    assert gate.passed is passes
    if math.isfinite(factor):
        assert gate.error == pytest.approx(factor - 1, abs=2e-7)
    assert arm.visited == [0, 1]


def test_gate_sees_an_error_in_any_part(problem):
    arm = Exact(problem)
    arm.weights[3] = arm.weights[3] * 1.01
    arm.load(problem.x)
    assert not harness.gate(arm, functools.partial(problem.result, 5)).passed


def test_gate_refuses_another_shape(problem):
    arm = Exact(problem)
    arm.load(problem.x[:4])
    gate = harness.gate(arm, functools.partial(problem.result, 5))
    assert math.isnan(gate.error)
    assert not gate.passed


def test_arms_that_fail_their_gate_are_not_timed(problem):
    arms = [Exact(problem, name="right"), Exact(problem, 1.01, name="wrong")]
    for arm in arms:
        arm.load(problem.x)
    said: list[str] = []
    gate = functools.partial(harness.gate, expected=functools.partial(problem.result, 5))
    timed, gates = harness.pass_gates(arms, gate, {}, said.append)
    assert [arm.name for arm in timed] == ["right"]
    assert gates["wrong"] == Gate(error=pytest.approx(0.01, rel=1e-3), tolerance=1e-5)
    assert said == ["  wrong: gate failed: error 1.00e-02, tolerance 1e-05: no time"]


def test_rounds_visit_every_arm_once_on_its_next_part(problem):
    arms = [Exact(problem, name=name) for name in "abc"]
    visits: list[tuple[str, int]] = []

    def visit(arm: Arm, part: int) -> float:
        visits.append((arm.name, part))
        return float(len(visits))

    times, probes = harness.interleave(
        arms, seconds=0.0, min_rounds=4, max_rounds=9, visit=visit, probe=lambda: float(len(visits))
    )
    assert visits[:3] == [("a", 0), ("b", 0), ("c", 0)]
    rounds = [visits[start : start + 3] for start in range(3, len(visits), 3)]
    assert [sorted(each) for each in rounds] == [[(name, part) for name in "abc"] for part in (1, 0, 1, 0)]
    assert len({tuple(name for name, _ in each) for each in rounds}) > 1
    assert probes == [6.0, 9.0, 12.0, 15.0]
    assert sorted(value for each in times.values() for value in each) == [float(i) for i in range(4, 16)]


def test_rounds_end_at_their_most(problem):
    times, probes = harness.interleave([Exact(problem)], seconds=60.0, max_rounds=3, visit=lambda arm, part: 1.0)
    assert times == {"exact": [1.0] * 3}
    assert probes == []


def test_two_arms_of_one_name_are_refused(problem):
    with pytest.raises(ValueError, match=r"interleave: arms: want distinct names; got \['exact', 'exact'\]"):
        harness.interleave([Exact(problem), Exact(problem)], seconds=0.0)


def test_a_visit_is_seconds_per_product(problem):
    arm = Exact(problem)
    arm.load(problem.x)
    assert 0 < harness.visit(arm, 1) < 1
    assert arm.visited == [1]


@given(st.integers(1, 1 << 31), st.integers(1, 40))
def test_rotation_fits_its_limits(weight_bytes, arms):
    rotation = harness.rotation(weight_bytes, arms * weight_bytes)
    assert 2 <= rotation.span <= 32
    assert rotation.parts >= 1
    assert rotation.copies <= 64
    if rotation.copies > 2:
        assert rotation.copies * arms * weight_bytes <= 6 << 30


# -- workloads --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("linear", [TINY, PARTIAL], ids=lambda linear: linear.name)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("copy", [0, 1, 5])
def test_copies_are_other_weights_with_the_results_they_claim(linear, symmetric, copy):
    problem = make_problem(linear, 3, symmetric=symmetric)
    weight = problem.packed(copy)
    assert weight.symmetric is symmetric
    dense = int4_dequantize(weight, torch.float32)
    assert torch.equal(dense, problem.rows(problem.dense, copy))
    group = weight.group_index()
    q, scales, zeros = (problem.rows(tensor, copy) for tensor in (problem.q, problem.scales, problem.zeros))
    assert torch.equal(dense.double(), (q.double() - zeros.double()[:, group]) * scales.double()[:, group])
    assert int(zeros.max()) <= 15
    y = problem.x[:2].double() @ dense.double().T
    torch.testing.assert_close(problem.result(2, copy), y, rtol=1e-12, atol=1e-12)


def test_a_problem_of_partial_tiles_is_refused():
    with pytest.raises(ValueError, match="make_problem: linear: want N a multiple of 64; got 100"):
        make_problem(Linear(name="odd", n=100, k=64), 1)


@pytest.mark.parametrize("preset", sorted(workloads.PRESETS))
def test_presets_name_shapes(preset):
    assert all(workloads.find(name).name == name for name in workloads.PRESETS[preset])


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"bench: shape: want one of 4096x4096, .*; got 'nope'"):
        workloads.find("nope")


# -- arms -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", int4.ARMS)
@pytest.mark.parametrize("linear", [TINY, PARTIAL], ids=lambda linear: linear.name)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_every_arm_computes_the_product(name, linear, symmetric):
    problem = make_problem(linear, 5, symmetric=symmetric)
    try:
        arm = int4.ARMS[name](problem, ROTATION, 1)
    except UnavailableError as error:
        pytest.skip(str(error))
    for m in (1, 5):
        arm.load(problem.x[:m].clone())
        gate = harness.gate(arm, functools.partial(problem.result, m))
        assert gate.passed, f"error {gate.error:.2e}, tolerance {gate.tolerance:.0e}"
        assert (gate.error > 1e-3) is (arm.lossy)
    assert arm.stored_bytes >= linear.n * linear.k // 2
    arm.close()


@pytest.mark.parametrize("name", int4.MOE_ARMS)
def test_every_arm_computes_the_experts(name):
    shape = Experts(name="few", experts=5, hidden=128, intermediate=64, topk=2, group_size=32)
    problem = int4.make_moe_problem(shape, 6)
    arm = int4.MOE_ARMS[name](problem, 1, 2)
    for tokens in (1, 6):
        arm.load(problem.x[:tokens].clone())
        gate = harness.gate(arm, functools.partial(problem.result, tokens))
        assert gate.passed, f"error {gate.error:.2e}, tolerance {gate.tolerance:.0e}"
    assert problem.touched_bytes(1) * 5 == 2 * (problem.w13.nbytes + problem.w2.nbytes)


def test_unknown_arms_are_refused():
    for name in ("nope", "torch_fp32@avx2"):
        with pytest.raises(ValueError, match=f"bench int4: arms: want names of .*; got '{name}'"):
            int4.factory(name)


def test_an_instruction_set_the_build_lacks_is_unavailable(problem):
    with pytest.raises(UnavailableError, match="nope"):
        int4.factory("m3_int8@nope")(problem, ROTATION, 1)


def test_ggml_blocks_hold_scale_then_columns_0_and_16():
    q = (torch.arange(64) % 16).to(torch.uint8).reshape(1, 64)
    packed = ggml.pack_q4_0(q, torch.tensor([[0.5]], dtype=torch.float16))
    assert packed.shape == (1, 2, 18)
    assert packed[0, 0, :2].view(torch.float16).item() == 0.5
    assert packed[0, 1, 2:].tolist() == [nibble | nibble << 4 for nibble in range(16)]


# -- a whole case -----------------------------------------------------------------------------------------------------
@pytest.fixture
def small_ceilings(monkeypatch, tmp_path):
    """The real probes on a small buffer, their cache in a folder of the test."""
    monkeypatch.setenv("M3_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline, "BUFFER_BYTES", 8 << 20)
    monkeypatch.setattr(roofline, "WINDOW_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "PEAK_ITERATIONS", 1000)
    roofline.library.cache_clear()
    roofline.buffer.cache_clear()
    yield
    roofline.library.cache_clear()
    roofline.buffer.cache_clear()


def test_ceilings_are_positive_and_cached(small_ceilings):
    ceilings = roofline.measured(1, "here")
    assert ceilings.read_bytes > 1e6
    assert all(kind in ("fp32", "bf16", "int16", "int8") and macs > 0 for kind, macs in ceilings.peaks.values())
    assert roofline.measured(1, "here", again=False) == ceilings
    assert ceilings.peak("nothing") is None
    if ceilings.peaks:
        assert ceilings.peak("bf16") >= ceilings.peak("fp32")


def test_the_best_of_many_measurements_is_no_less(small_ceilings):
    ceilings = roofline.measured(1, "here")
    best = roofline.undisturbed(ceilings)
    assert best.peaks.keys() == ceilings.peaks.keys()
    assert all(best.peaks[name][1] >= macs for name, (_, macs) in ceilings.peaks.items())


def test_without_a_compiler_torch_reads(small_ceilings, monkeypatch):
    monkeypatch.setenv("PATH", "")
    ceilings = roofline.measure(1)
    assert ceilings.source == "torch (no C compiler: read bandwidth only)"
    assert ceilings.read_bytes > 1e6
    assert ceilings.peaks == {}


def test_a_linear_gives_a_row_per_arm_and_m(small_ceilings):
    plan = int4.Plan(
        ms=(1, 3), threads=(1, 2), arms=("m3_exact", "m3_int8", "torch_fp32"), seconds=0.0, scaling=True, min_rounds=2
    )
    rows = list(int4.run(TINY, plan, lambda text: None))
    alone = {"m3_exact", "m3_int8", "torch_fp32"}
    both = {*alone, "m3_exact@1t", "m3_int8@1t"}
    assert {(row.case_threads, row.m, row.arm) for row in rows} == {
        *((1, m, arm) for m in (1, 3) for arm in alone),
        *((2, m, arm) for m in (1, 3) for arm in both),
    }
    for row in rows:
        assert row.gate == "passed"
        assert row.threads == (1 if row.arm.endswith("@1t") else row.case_threads)
        assert 0 < row.p20_s <= row.median_s <= row.p80_s
        assert row.gmacs == pytest.approx(row.m * 192 * 256 / row.median_s / 1e9)
        assert row.weight_bytes == 192 * 256 // 2 + 192 * 2 * 2
        assert set(row.ratios) == (alone if row.case_threads == 1 else both) - {row.arm}
        assert row.read_share == pytest.approx(row.gbytes_s / row.read_gbytes_s)


def test_experts_give_a_row_per_arm_and_m(small_ceilings):
    shape = Experts(name="few", experts=4, hidden=64, intermediate=64, topk=2, group_size=32)
    plan = int4.Plan(ms=(2,), threads=(1,), seconds=0.0, min_rounds=2, limit_bytes=4 * 3 * 4 * 64 * 64 - 1)
    rows = list(int4.run(shape, plan, lambda text: None))
    gates = {row.arm: row.gate for row in rows}
    assert gates.pop("torch_fp32") == "absent: its weights take 0 GB, more than the limit"
    assert gates == dict.fromkeys(("m3_int8", "m3_int16", "m3_exact", "torch_bf16"), "passed")
    assert {(row.op, row.experts, row.topk, row.n, row.k) for row in rows} == {("int4_moe", 4, 2, 128, 64)}


# -- report -----------------------------------------------------------------------------------------------------------
def acceptance_rows() -> list[record.GemmRow]:
    """One thread, M = 1 and 4 on 4096x4096; ours 1.2 times as fast as ONNX Runtime and twice as fast as OpenVINO."""
    rows = []
    for m in (1, 4):
        exact = {"computes": "fp32", "lossy": False, "error": 1e-7}
        ratios = {"ort_a4": (1.2, 1.1, 1.3), "ov": (2.0, 1.9, 2.1)}
        rows += [
            make_row(m=m, ratios={**ratios, "m3_int16": (1.0, 1.0, 1.0)}),
            make_row(m=m, arm="m3_int16", computes="int16", lossy=False, error=2e-5, ratios=ratios),
            make_row(m=m, arm="ort_a4", median_s=1.2e-3),
            make_row(m=m, arm="ov", median_s=2e-3, **exact),
            make_row(m=m, arm="ark_int8", gate="failed", error=1.0, **dict.fromkeys(record.GemmRow.TIMED)),
        ]
    return rows


def test_acceptance_lines():
    lines = {(line.what, line.case): line for line in report.acceptance(acceptance_rows())}
    assert {key: (line.got, line.passed) for key, line in lines.items()} == {
        ("m3_int8 over ONNX Runtime level 4", "1"): (1.2, True),
        ("m3_int8 of read bandwidth", "1"): (0.865, True),
        ("m3_int16 over the best exact peer", "1"): (2.0, False),
        ("m3_exact over the best exact peer", "1"): (None, False),
        ("m3_int8 over ONNX Runtime level 4", "4"): (1.2, False),
        ("m3_int16 over the best lossy peer", "4"): (1.2, True),
        ("m3_int16 over the best exact peer", "4"): (2.0, False),
        ("m3_exact over the best exact peer", "4"): (None, False),
    }
    text = tables.acceptance_table(list(lines.values()))
    assert "3 of 8 lines pass" in text
    assert "not measured" in text


def test_two_threads_are_compared_with_one_of_the_same_rounds():
    ratios = {"m3_int8@1t": (1.9, 1.8, 2.0)}
    lines = report.acceptance([make_row(m=16, threads=2, case_threads=2, ratios=ratios)])
    got = {line.what: line.got for line in lines}
    assert got == {
        "m3_int8 over one thread": 1.9,
        "m3_int16 over one thread": None,
        "m3_exact over one thread": None,
    }


def test_the_report_holds_tables_plots_and_reasons(tmp_path):
    pytest.importorskip("matplotlib")
    absent = make_row(m=4, arm="ov_int8", gate="absent: not here", error=None, **dict.fromkeys(record.GemmRow.TIMED))
    record.append(tmp_path / "results" / "int4.jsonl", [*acceptance_rows(), absent])
    report.write(tmp_path / "results", tmp_path / "docs" / "benchmarks.md")
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## some cpu" in text
    assert "| absent: not here" in text
    assert "none: error over 8e-03" in text
    for kind in ("png", "svg"):
        plot = tmp_path / "docs" / "benchmarks" / f"int4_gemm-4096x4096-some-cpu.{kind}"
        assert plot.stat().st_size > 10_000
        assert f"benchmarks/{plot.name}" in text


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"report: results: want at least one row in empty/\*.jsonl; got none"):
        (tmp_path / "empty").mkdir()
        report.write(tmp_path / "empty", tmp_path / "out.md")


def test_lower_bounds_are_memory_then_arithmetic():
    rows = [make_row(m=1), make_row(m=128, gmacs=200.0, median_s=1e-2)]
    bounds = dict(report.lower_bounds(rows, "int8"))
    assert bounds == pytest.approx({1: 8650752 / 10e9, 128: 200.0 * 1e-2 / 300.0})
    assert report.lower_bounds(rows, "fp32") == []


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_row().median_s = 0.0


def test_a_row_names_no_path_of_the_machine(monkeypatch):
    arguments = ["serving", "--draft", "/home/me/draft", "--program", "llama=/opt/bin/llama-server", "--clients", "1,4"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert record.command() == "python -m bench serving --draft draft --program llama=llama-server --clients 1,4"


def test_a_figure_drawn_again_has_the_same_bytes(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    for folder in ("first", "second"):
        figure, axes = pyplot.subplots()
        axes.plot([1, 2], [3, 4], marker="o")
        drawn.append([path.read_bytes() for path in tables.save(figure, tmp_path / folder / "plot")])
    assert drawn[0] == drawn[1]
