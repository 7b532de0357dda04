"""The goals of the GPU kernels: they name cases that exist, are judged by their figures, stand in the document."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_rows import MACHINE, UNTIMED, WHERE, gemm_row, loss_row

from bench import __main__ as command
from bench import gpu_goals, int4_gpu, record, spec_decode_gpu, workloads

ROOT = Path(__file__).resolve().parent.parent


# -- goals ------------------------------------------------------------------------------------------------------------
def test_goals_name_cases_that_exist():
    known = {*workloads.LINEARS, *workloads.EXPERTS, *workloads.LOSS_HEADS, *spec_decode_gpu.CASES}
    for goal in gpu_goals.GOALS:
        assert set(goal.shapes) <= known, goal
        assert set(goal.want) <= {"", *gpu_goals.CARDS}
    plans = {name for plan in int4_gpu.PRESETS.values() for name in plan.shapes}
    assert {name for goal in gpu_goals.GOALS if goal.family == "int4" for name in goal.shapes} <= plans
    ms = {m for goal in gpu_goals.GOALS for m in goal.ms}
    assert ms <= {*int4_gpu.MS, *int4_gpu.MOE_MS}


def verdict_of(rows: list[record.Row], what: str) -> list[str]:
    return [found.verdict for found in gpu_goals.findings(rows) if found.goal.what == what]


def test_goals_are_judged_by_their_figures():
    rows = [gemm_row()]
    assert verdict_of(rows, "us") == ["met"]
    assert verdict_of(rows, gpu_goals.SHARE) == ["met"]
    assert verdict_of(rows, "times as fast as cuBLAS") == ["met"]
    assert verdict_of(rows, "times as fast as Marlin") == ["not measured"]
    assert verdict_of([gemm_row(median_s=18e-6, spec_share=0.57)], "us") == ["MISSED"]
    text = gpu_goals.verdicts(rows)
    assert "| dense, 35 MB, M = 1, 4, 16" in text
    assert "not measured" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"timing": "rotation"},
        {"x_dtype": "fp16"},
        {"shape": "4096x4096"},
        {"m": 2},
        {"device": "cpu"},
        {"machine": {**MACHINE, "gpu": "NVIDIA A100-SXM4-80GB"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_rows_concern_no_goal_of_speed(changes):
    assert verdict_of([gemm_row(**changes)], "us") == []


@pytest.mark.parametrize("changes", [{"launch": "eager"}, {"gate": "failed", **UNTIMED}], ids=["eager", "failed"])
def test_a_figure_needs_a_graph_and_a_passed_gate(changes):
    assert verdict_of([gemm_row(**changes)], "us") == ["not measured"]


def test_the_best_of_several_peers_counts():
    ratios = {"humming": (1.4, 1.3, 1.5), "humming_grouped": (1.05, 1.0, 1.1)}
    row = gemm_row(op="int4_moe", shape="qwen3-235b-a22b.moe", experts=128, topk=8, ratios=ratios)
    found = [each for each in gpu_goals.findings([row]) if each.goal.what == "times as fast as Humming"]
    assert [(each.got, each.verdict) for each in found] == [(1.05, "MISSED")]


def test_the_gate_of_attention_is_judged_by_what_it_adds():
    values = {
        "op": "tree_attention",
        "shape": "qwen3-235b-a22b.verify32.c4096.b8",
        "arm": "m3_cuda_gated",
        "requests": 8,
        "span": 1,
        "touched_bytes": 69_000_000,
        "timing": "cold",
        "launch": "graph",
        "gate": "passed",
        "error": 2e-3,
        "tolerance": 1e-2,
        "median_s": 31e-6,
        "ratios": {"m3_cuda": (0.98, 0.97, 0.99)},
    }
    row = record.SpecRow(**values, **WHERE)
    found = {each.goal.what: each for each in gpu_goals.findings([row])}
    cost = found["time over that without the gate"]
    assert cost.verdict == "met" and abs(cost.got - 1 / 0.98) < 1e-12


def test_goals_of_the_policy_loss():
    plain = loss_row(arm="torch", errors={"loss": 1e-5, "d_hidden": 3e-3, "d_weight": 2.5e-3})
    found = {each.goal.what: each for each in gpu_goals.findings([loss_row(), plain])}
    assert found["ms, loss and both gradients"].verdict == "met"
    assert found["speed over that of the three bare products"].verdict == "MISSED"
    assert found["workspace beside dX and fp32 dW, GiB"].got == 1.0
    assert found["error of dW over that of plain torch"].got == 0.8
    assert found["times as fast as verl's torch loss"].verdict == "not measured"
    alone = {each.goal.what: each for each in gpu_goals.findings([loss_row()])}
    assert alone["error of dW over that of plain torch"].got is None


def test_the_document_holds_the_tables_of_goals():
    text = (ROOT / "docs" / "gpu_status.md").read_text()
    _, _, rest = text.partition(gpu_goals.BEGIN)
    inside, _, _ = rest.partition(gpu_goals.END)
    assert inside.strip() == gpu_goals.status(gpu_goals.measured(record.RESULTS)).strip()


def test_a_document_is_renewed_between_its_marks(tmp_path):
    path = tmp_path / "status.md"
    path.write_text(f"before\n{gpu_goals.BEGIN}\nold\n{gpu_goals.END}\nafter\n")
    gpu_goals.write(path, [gemm_row()])
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "8192x8192 M=1: 16 met (NVIDIA H100 80GB HBM3, 0123456789ab)" in text
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match=r"goals: status\.md: want the marks"):
        gpu_goals.write(path, [])


def test_rows_without_goals_say_so():
    assert gpu_goals.verdicts([gemm_row(device="cpu")]) == "\nno goal concerns these rows\n"


def test_goals_are_printed_from_results(tmp_path, capsys):
    record.append(tmp_path / "rows.jsonl", [gemm_row()])
    assert command.run_goals(command.parser().parse_args(["goals", "--results", str(tmp_path)])) == 0
    assert "8192x8192 M=1: 0.645 met" in capsys.readouterr().out
