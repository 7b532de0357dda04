"""The spec_decode benchmark: arms compute the same thing, wrong ones get no time, rows and promises say what was."""

from __future__ import annotations

import dataclasses
import math
import os
import random

import pytest
import torch

from bench import __main__ as command
from bench import record, report, roofline, spec_decode, spec_decode_cases, spec_decode_report, tables
from bench.record import SpecRow
from bench.spec_decode_arms import ARMS, AllRows, Attention, Commit, Verify, differing
from bench.spec_decode_cases import (
    AttentionCase,
    CommitCase,
    DraftCase,
    FinalizeCase,
    VerifyCase,
    find_case,
    make_attention,
    make_commit,
    make_draft,
    make_finalize,
    make_verify,
)

VERIFY = VerifyCase(name="tiny", requests=3, nodes=9, vocabulary=997, mode="target_only")
HEADS = {"heads": 6, "kv_heads": 2, "head_dim": 16}
TREE = AttentionCase(name="tiny.tree", context=37, queries=7, tree=True, **HEADS)
TINY = {
    "greedy": dataclasses.replace(VERIFY, mode="greedy"),
    "target_only": VERIFY,
    "target_only filtered": dataclasses.replace(VERIFY, filtered=True),
    "coupled": dataclasses.replace(VERIFY, mode="coupled"),
    "coupled filtered": dataclasses.replace(VERIFY, mode="coupled", filtered=True),
    "tree": TREE,
    "decode": dataclasses.replace(TREE, queries=1, tree=False),
    "prefill": dataclasses.replace(TREE, context=0, queries=33, tree=False),
    "first step": DraftCase(name="tiny", requests=2, frontier=1, vocabulary=503),
    "next step": DraftCase(name="tiny", requests=3, frontier=8, vocabulary=503),
    "finalize": FinalizeCase(name="tiny", requests=4, nodes=33, steps=4),
    "finalize small": FinalizeCase(name="tiny", requests=2, nodes=5, steps=2),
    "commit": CommitCase(name="tiny", requests=3, layers=2, kv_heads=2, head_dim=8),
}
MAKE = {
    VerifyCase: make_verify,
    AttentionCase: make_attention,
    DraftCase: make_draft,
    FinalizeCase: make_finalize,
    CommitCase: make_commit,
}
TIMED = dict.fromkeys(SpecRow.TIMED)


@pytest.fixture(autouse=True)
def process_settings():
    """Arms set thread counts; each test leaves them, and the environment, as it found them."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def small_roofline(monkeypatch):
    """A read probe of 8 MiB and no measurement of peaks."""
    monkeypatch.setattr(roofline, "BUFFER_BYTES", 8 << 20)
    ceilings = roofline.Ceilings(threads=1, read_bytes=1e10, read_kind=0, peaks={}, source="c")
    monkeypatch.setattr(roofline, "measured", lambda threads, machine, again=True: ceilings)
    roofline.buffer.cache_clear()
    yield
    roofline.buffer.cache_clear()


def make_row(**changes: object) -> SpecRow:
    values = {
        "op": "tree_verify",
        "shape": "verify.n32.v151936.b8.coupled.filtered",
        "requests": 8,
        "nodes": 32,
        "vocabulary": 151936,
        "mode": "coupled",
        "filtered": True,
        "span": 2,
        "visited": 2.7,
        "touched_bytes": 13_000_000,
        "arm": "m3",
        "device": "cpu",
        "threads": 1,
        "case_threads": 1,
        "gate": "passed",
        "error": 0.0,
        "tolerance": 0.0,
        "median_s": 4e-3,
        "p20_s": 3e-3,
        "p80_s": 5e-3,
        "rounds": 5,
        "ratios": {"torch_all_rows": (60.0, 55.0, 70.0)},
        "read_gbytes_s": 12.0,
        "roofline_share": 0.3,
        "spec_share": 0.2,
        "peak_bytes": 0,
        "commit": "0123456789ab",
        "dirty": False,
        "machine": {"cpu": "some cpu", "cores": 2, "python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "date": "2026-11-22T00:00:00+00:00",
        "command": "python -m bench spec_decode",
    }
    return SpecRow(**{**values, **changes})


def make_peer(**changes: object) -> SpecRow:
    return make_row(
        **{"arm": "torch_all_rows", "tolerance": 0.05, "ratios": {"m3": (1 / 60, 0.014, 0.018)}, "peak_bytes": 10**9}
        | changes
    )


# -- rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SpecRow.TIMED)
def test_a_row_without_a_passed_gate_carries_no_time_and_no_peak(name):
    kept = {**TIMED, name: getattr(make_row(), name)}
    with pytest.raises(ValueError, match=f"Row: gate: want 'passed' for a row with {name}; got 'failed'"):
        make_row(gate="failed", **kept)


@pytest.mark.parametrize("op", ARMS)
def test_rows_of_every_op_survive_their_file(tmp_path, op):
    rows = [make_row(op=op), make_row(op=op, arm="torch", gate="absent: not here", error=None, **TIMED)]
    record.append(tmp_path / "rows.jsonl", rows)
    assert record.read(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("field", ["op", "shape", "case_threads", "arm"])
def test_rows_of_different_cases_do_not_replace_each_other(field):
    other = {"op": "tree_attention", "shape": "else", "case_threads": 2, "arm": "torch"}[field]
    rows = [make_row(), make_row(**{field: other}), make_row(median_s=9.0)]
    assert [row.median_s for row in record.latest(rows)] == [9.0, 4e-3]


# -- inputs -----------------------------------------------------------------------------------------------------------
def test_an_unknown_case_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"bench: shape: want one of verify.n8.v49152.greedy, .*; got 'nope'"):
        spec_decode.Plan(cases=("nope",))


@pytest.mark.parametrize("preset", sorted(spec_decode.PRESETS))
def test_presets_name_cases(preset):
    cases = spec_decode.PRESETS[preset].cases
    assert [find_case(name).name for name in cases] == list(cases)


def test_a_quick_run_has_every_op():
    assert {find_case(name).op for name in spec_decode.PRESETS["quick"].cases} == set(ARMS)


def test_a_tree_grows_parents_first_with_distinct_siblings():
    parents, ranks = spec_decode_cases.grow_tree(64, random.Random(0))
    assert parents[0] == -1
    assert all(0 <= parent < node for node, parent in enumerate(parents[1:], start=1))
    assert len(set(zip(parents, ranks, strict=True))) == 64


def test_logits_have_the_head_they_claim():
    logits, tokens = spec_decode_cases.peaked_logits(3, 49152, torch.Generator().manual_seed(0))
    probs = logits.double().softmax(-1).gather(1, tokens)
    assert (probs.argmax(-1) == 0).all()
    assert probs.sum(-1).sub(spec_decode_cases.HEAD_MASS).abs().max() < 0.02
    assert [len(row.unique()) for row in tokens] == [spec_decode_cases.HEAD] * 3


def test_a_walk_visits_about_three_rows():
    problem = make_verify(VerifyCase(name="many", requests=32, nodes=32, vocabulary=997, mode="target_only"))
    assert 2.0 < problem.visited_rows / 32 < 4.0


def test_the_cases_of_a_size_share_their_batches():
    first, second = (
        spec_decode.problems_of(dataclasses.replace(TINY[name], span=2)) for name in ("greedy", "coupled filtered")
    )
    assert [problem.logits.data_ptr() for problem in first] == [problem.logits.data_ptr() for problem in second]
    assert float(first[0].temperature.max()) == 0.0
    assert float(second[0].temperature.min()) == 1.0


def test_attention_is_expected_over_its_own_keys():
    problem = make_attention(TREE)
    allowed = problem.allowed().view(3, 7, 44)
    assert bool(allowed[:, :, :37].all())
    own = allowed[0, :, 37:]
    assert bool(own.diagonal().all())
    assert not bool(own.triu(1).any())
    assert torch.equal(problem.unfolded(problem.folded(problem.q)), problem.q)


# -- arms -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "arm_name"), [(name, arm) for name, case in TINY.items() for arm in ARMS[case.op]], ids=str
)
def test_every_arm_passes_its_gate(name, arm_name):
    case = TINY[name]
    problems = [MAKE[type(case)](case, seed) for seed in range(2)]
    gate = ARMS[case.op][arm_name](problems, 1).gate()
    assert gate.passed, f"error {gate.error:.2e}, tolerance {gate.tolerance:.0e}"


@pytest.mark.parametrize(
    ("name", "arm", "spoil"),
    [
        ("coupled", Verify, lambda tokens: tokens.roll(1, 0)),
        ("target_only filtered", AllRows, lambda found: (found[0] + 1, found[1])),
        ("greedy", Verify, lambda tokens: tokens[:, :-1]),
    ],
    ids=["of other requests", "another token", "another shape"],
)
def test_the_gate_sees_wrong_walks(monkeypatch, name, arm, spoil):
    call = arm.call
    monkeypatch.setattr(arm, "call", lambda self, problem: spoil(call(self, problem)))
    assert not arm([make_verify(TINY[name])], 1).gate().passed


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1 + 1e-4, False), (math.nan, False)])
def test_the_gate_sees_attention(monkeypatch, factor, passes):
    call = Attention.call
    monkeypatch.setattr(Attention, "call", lambda self, problem: call(self, problem) * factor)
    assert Attention([make_attention(TREE)], 1, gated=True).gate().passed is passes


def test_the_gate_sees_a_cache_that_did_not_move(monkeypatch):
    monkeypatch.setattr(Commit, "call", lambda self, problem: problem.cache_seqlens + problem.accept_length + 1)
    assert not Commit([make_commit(TINY["commit"])], 1).gate().passed


@pytest.mark.parametrize(
    ("found", "expected", "wanted"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 2), 0.0),
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]]), 0.5),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0),
        (torch.zeros(4, 2), torch.zeros(4, 3), math.nan),
    ],
    ids=["equal", "one row", "vectors", "shapes"],
)
def test_differing_rows(found, expected, wanted):
    assert differing(found, expected) == pytest.approx(wanted, nan_ok=True)


# -- a whole case -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["coupled", "tree", "next step", "finalize", "commit"])
def test_a_case_gives_a_row_per_arm(monkeypatch, small_roofline, name):
    case = dataclasses.replace(TINY[name], name="tiny", span=2)
    monkeypatch.setitem(spec_decode_cases.CASES, "tiny", case)
    plan = spec_decode.Plan(cases=("tiny",), seconds=0.0, min_rounds=2)
    (rows,) = spec_decode.run(plan, lambda text: None)
    assert {row.arm: row.gate for row in rows} == dict.fromkeys(ARMS[case.op], "passed")
    assert all(row.median_s > 0 and row.roofline_share > 0 and row.peak_bytes is None for row in rows)
    assert {row.touched_bytes for row in rows} == {spec_decode.touched_bytes(case, spec_decode.problems_of(case))}
    text = spec_decode_report.tables(rows)
    assert all(arm in text for arm in ARMS[case.op])


def test_a_failed_gate_gives_a_row_without_time(monkeypatch, small_roofline):
    monkeypatch.setitem(spec_decode_cases.CASES, "tiny", dataclasses.replace(VERIFY, name="tiny"))
    monkeypatch.setattr(Verify, "error", lambda self, problem, output: 1.0)
    (rows,) = spec_decode.run(spec_decode.Plan(cases=("tiny",), seconds=0.0, min_rounds=1), lambda text: None)
    assert [(row.gate, row.median_s is None) for row in rows] == [("failed", True), ("passed", False)]


def test_touched_bytes_count_the_rows_of_the_path():
    problems = [make_verify(VERIFY, seed) for seed in range(3)]
    rows = sum(int((problem.expected >= 0).sum()) for problem in problems)
    assert spec_decode.touched_bytes(VERIFY, problems) == round(4 * 997 * rows / 3)


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        (dataclasses.replace(TREE, queries=1, tree=False), 38),
        (dataclasses.replace(TREE, context=0, queries=33, tree=False), 33 * 34 // 2),
        (VERIFY, 0),
    ],
    ids=["decode", "prefill", "no attention"],
)
def test_multiplications_count_pairs_of_a_query_and_a_key(case, pairs):
    problems = [MAKE[type(case)](case, 0)]
    assert spec_decode.multiplications(case, problems) == pairs * 6 * 16 * 2


@pytest.mark.slow
def test_peaks_of_both_arms():
    found = spec_decode.peaks_in_fresh_processes(("verify.n32.v151936.b1.target_only",))
    peaks = found["verify.n32.v151936.b1.target_only"]
    probabilities = 4 * 32 * 151936
    assert peaks["torch_all_rows"] >= probabilities
    assert peaks["m3"] < probabilities


def test_peaks_that_cannot_be_measured_say_why(monkeypatch):
    monkeypatch.setattr(spec_decode.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"verify.n32.v151936.b1.greedy: peaks were not measured"):
        spec_decode.peaks_in_fresh_processes(("verify.n32.v151936.b1.greedy", "finalize.n32.b1"))


# -- the command and the report ---------------------------------------------------------------------------------------
def test_the_command_line_changes_the_preset():
    arguments = command.parser().parse_args(["spec_decode", "--preset", "quick", "--rounds", "3", "--threads", "1,2"])
    plan = command.spec_plan(arguments)
    assert (plan.min_rounds, plan.threads, plan.memory) == (3, (1, 2), False)
    assert plan.cases == spec_decode.PRESETS["quick"].cases


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        ([make_row(), make_peer()], [True, True]),
        ([make_row(ratios={"torch_all_rows": (4.0, 3.0, 5.0)}), make_peer()], [False, True]),
        ([make_row(peak_bytes=10**8), make_peer()], [True, False]),
        ([make_row(), make_peer(peak_bytes=None)], [True, False]),
        ([make_row(mode="greedy"), make_peer(mode="greedy")], [True]),
        ([make_row(shape="verify.n8.v49152.greedy", requests=1, median_s=9e-5)], [True]),
        ([make_row(shape="verify.n8.v49152.greedy", requests=1, median_s=2e-4)], [False]),
        ([make_row(shape="verify.n8.v49152.coupled.filtered", requests=1, median_s=2e-4)], [True]),
        ([make_row(gate="failed", error=1.0, **TIMED), make_peer()], [False, False]),
        ([make_row(shape="finalize.n32.b1", op="tree_finalize")], []),
    ],
    ids=[
        "kept", "not as fast", "too much memory", "memory not measured", "greedy", "small", "small and slow",
        "small and filtered", "no time", "another op",
    ],
)  # fmt: skip
def test_promises(rows, verdicts):
    assert [line.passed for line in spec_decode_report.acceptance(rows)] == verdicts


def test_a_request_of_a_batch_is_told():
    text = spec_decode_report.op_table([make_row(), make_peer(median_s=0.24)])
    assert "500.0 us" in text
    assert "60.00" in text
    assert "953.7" in text


def test_the_cost_of_the_gate_is_told():
    about = {"op": "tree_attention", "shape": "smollm2-135m.decode.c256", "peak_bytes": None}
    rows = [make_row(**about, ratios={"m3_gated": (1.02, 1.0, 1.05)}), make_row(**about, arm="m3_gated", ratios={})]
    sections = spec_decode_report.sections(rows)
    assert "+2.0% (+0.0% - +5.0%)" in sections[-1]


def test_the_document_has_a_section_for_it(tmp_path):
    record.append(tmp_path / "results" / "spec_decode.jsonl", [make_row(), make_peer()])
    report.write(tmp_path / "results", tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "### Promises of tree verification" in text
    assert "### tree_verify, 1 thread(s)" in text
    assert tables.acceptance_table(spec_decode_report.acceptance([make_row(), make_peer()]), "mode").strip() in text
