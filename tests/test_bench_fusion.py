"""The fusion bench: divergences by hand, differences paired by seed and case, a curve that was gone on with."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import fusion, fusion_report, learning
from m3.train.metrics import METRICS
from m3.train.tasks.consult_policy import DecoderConfig, decoder, roll_out
from m3.train.tasks.consult_rl import MEASURES


def done(folder: Path, chest: list[float], belly: list[float], **more: object) -> None:
    folder.mkdir()
    rows = {
        name: [[value] + [0.0] * (len(MEASURES) - 1) for value in rewards]
        for name, rewards in (("chest", chest), ("belly", belly))
    }
    (folder / fusion.DONE).write_text(json.dumps({"values": rows, "steps": 4, "seconds": 1.0, **more}), "utf-8")


def line(step: int, rewards: float, entropy: float) -> str:
    near = {f"{name}/{where}": entropy for name in fusion_report.CLOSENESS for where in ("chest", "belly")}
    return json.dumps({"step": step, "epoch": step, "rewards": {"chest": [rewards] * 2, "belly": [0.0] * 2}, **near})


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of two seeds, on two cases of each department."""
    monkeypatch.setattr(learning, "DRAWS", 100)
    done(tmp_path / "start", [0.5, 0.3], [0.1, 0.1])
    for seed, more in ((1, 0.0), (2, 0.1)):
        done(tmp_path / f"expert-chest-{seed}", [0.9, 0.7], [0.0, 0.0])
        done(tmp_path / f"expert-belly-{seed}", [0.0, 0.0], [0.5, 0.5])
        for loss, shift in (("forward", 0.0), ("clip_forward", 0.25)):
            folder = tmp_path / f"{loss}-{seed}"
            done(folder, [0.0, 0.0], [0.0, 0.0])
            lines = [line(0, 0.0, 1.0), line(2, 0.9, 0.9), line(1, 0.4 + more + shift, 0.5), line(2, 0.6, 0.2 + more)]
            (folder / fusion.CURVE).write_text("\n".join(lines) + "\n", "utf-8")
            steps = [{"step": step, "tokens": 10.0, "rows_differentiated": 10.0 - 4 * step} for step in (1, 2)]
            (folder / METRICS).write_text("".join(json.dumps(one) + "\n" for one in steps), "utf-8")
        near = {f"{name}/{where}": 0.3 for name in fusion_report.CLOSENESS for where in ("chest", "belly")}
        done(tmp_path / f"forward+mopd-{seed}", [0.9, 0.9], [0.5, 0.5], closeness=near)
    return tmp_path


def test_experts_are_taken_at_home(out: Path) -> None:
    found = fusion_report.collected(out, [1, 2])
    assert found["experts, each at home"].rewards[0].tolist() == [[0.9, 0.5, 0.7], [0.7, 0.5, 0.6]]
    assert list(found)[:4] == ["start", "expert-chest", "expert-belly", "experts, each at home"]
    assert list(found)[4:] == ["forward @ 1", "forward @ 2", "clip_forward @ 1", "clip_forward @ 2", "forward+mopd"]


def test_a_step_done_twice_counts_once(out: Path) -> None:
    curve = fusion_report.curves(out, "forward", [1, 2])
    assert list(curve) == [0, 1, 2]
    assert curve[2].rewards[:, 0, 0].tolist() == [0.6, 0.6]
    assert curve[2].closeness["entropy"].tolist() == pytest.approx([0.2, 0.3])
    assert [curve[epoch].closeness["taught"].tolist() for epoch in (1, 2)] == [[0.6, 0.6], [0.2, 0.2]]


def test_differences_are_paired(out: Path) -> None:
    found = fusion_report.against(fusion_report.collected(out, [1, 2]))
    assert found["clip_forward @ 1 - forward @ 1"]["chest"] == (0.25, 0.25, 0.25)
    assert found["clip_forward @ 1 - forward @ 1"]["entropy"] == (0.0, 0.0, 0.0)
    assert found["forward+mopd - forward @ 2"]["both"] == (0.4, 0.4, 0.4)
    assert found["forward+mopd - forward @ 2"]["entropy"] == (0.05, 0.0, 0.1)
    assert set(found) == {
        "clip_forward @ 1 - forward @ 1",
        "clip_forward @ 2 - forward @ 2",
        "forward+mopd - forward @ 2",
    }


def test_rows_say_how_far_a_student_is_from_the_start_and_its_experts(out: Path) -> None:
    made = {row.arm: row for row in fusion_report.rows(out, [1, 2], "command")}
    row = made["forward+mopd"]
    assert row.reward["both"] == (0.7, 0.7, 0.7) and row.over_start["belly"] == (0.4, 0.4, 0.4)
    assert row.over_experts["chest"][0] == pytest.approx(0.1) and row.over_experts["belly"] == (0.0, 0.0, 0.0)
    assert row.closeness["entropy"] == (0.3, 0.3, 0.3) and row.cases == 4 and row.by_seed["both"] == (0.7, 0.7)
    cells = fusion_report.table({row.arm: row.reward}).splitlines()[-1].split(" | ")
    assert cells[0] == "| forward+mopd" and cells[-1] == "0.700 (0.700, 0.700) |"
    assert "| start | 0.400 (" in fusion_report.tables(out, [1, 2], list(made.values()))
    assert made["forward @ 2"].seconds == (1.0, 1.0) and made["forward @ 1"].seconds == ()
    path = out / "rows.jsonl"
    fusion_report.write(list(made.values()), path)
    assert [json.loads(one)["arm"] for one in path.read_text("utf-8").splitlines()] == list(made)


def test_divergences_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    found = fusion.divergences(teacher, student)
    assert found["forward_kl"] == pytest.approx(0.25 * math.log(4 / 3))  # (ln 2 + ln(2/3)) / 2, of one row of two
    assert found["reverse_kl"] == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    assert found["teacher_entropy"] == pytest.approx((math.log(2) + 0.325083) / 2, abs=1e-6)


def test_laws_are_those_of_the_drawing() -> None:
    """Where an expert draws, its law gives what its sampler said of the token."""
    model = decoder(DecoderConfig(hidden=16, layers=1, heads=2, intermediate=32))
    plan = fusion.Plan(cases=3)
    samples = fusion.trajectories(model, plan, "belly")
    law = fusion.laws(model, samples)
    assert torch.allclose(law.exp().sum(1), torch.ones(len(law), dtype=torch.float64))
    cases = fusion.draw_cases(3, "held out", held_out=True, department="belly")
    told = [value for one in roll_out(model, cases, "held-out trajectories") for value in one.logprobs]
    assert fusion.nll(law, samples) == pytest.approx(-np.mean(told), abs=1e-5)
