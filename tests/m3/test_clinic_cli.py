"""``m3 clinic`` and ``m3 evaluate``: what they write, that a run goes on, and that no scripted judge earns a score."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from m3.cli import app
from m3.environment.case import own_cases
from m3.environment.trajectory import Trajectory, read_trajectories
from m3.rewards.rubric import RubricItem
from m3.rewards.rubric_store import Provenance, RubricStore, Status, read_state
from m3.text.words import words
from tests.m3.clinic_cases import small_row


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "250"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Two small cases in a file."""
    path = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    path.write_text("".join(json.dumps({**small_row(), "id": f"small-{n}"}) + "\n" for n in (1, 2)))
    return path


@pytest.fixture(scope="module")
def consulted(cases, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "good"
    return out, run("clinic", "run", "-o", out, "--cases", cases, "--seed", 3)


def test_a_run_leaves_consultations_scores_and_a_page(consulted):
    out, said = consulted
    trajectories = list(read_trajectories(out / "trajectories.jsonl"))
    assert [(one.case, one.ended) for one in trajectories] == [("small-1", "closed"), ("small-2", "closed")]
    assert trajectories[0].of("assistant")[-1].content.startswith("Diagnosis: Inferior ST elevation")
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [one["checklist"] for one in scores] == [1.0, 1.0]
    assert all(one["judge"] == "scripted" for one in scores)
    assert "ScanBench" in said and "n/a: scripted judge" in said
    assert "not a medical device" in said


def test_the_page_stands_alone_and_credits_turns(consulted):
    page = (consulted[0] / "report.html").read_text()
    assert "not a medical device" in page and "n/a: scripted judge" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    assert "<script" not in page
    assert "+6 Asks whether the pain radiates." in page


def test_text_of_a_consultation_cannot_write_html(cases, consulted, tmp_path):
    row = json.loads((consulted[0] / "trajectories.jsonl").read_text().splitlines()[0])
    row["messages"][-1]["content"] = "Diagnosis: <img src=x onerror=alert(1)>"
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    run("clinic", "score", tmp_path / "t.jsonl", "-o", tmp_path / "out", "--cases", cases)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<img" not in page and "&lt;img src=x" in page


def test_the_same_command_goes_on_and_repeats_nothing(cases, consulted, tmp_path):
    options = ("clinic", "run", "--cases", cases, "--seed", 3, "-o")
    run(*options, tmp_path)
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    assert "segments were there already" in run(*options, tmp_path)
    for name in ("trajectories.jsonl", "scores.jsonl"):
        assert (tmp_path / name).read_bytes() == (consulted[0] / name).read_bytes()


def test_a_run_of_other_settings_is_refused(cases, consulted):
    said = run("clinic", "run", "-o", consulted[0], "--cases", cases, "--seed", 4, code=1)
    assert said.startswith("error: ") and "seed" in said


def test_a_repeating_physician_is_marked_in_the_page(cases, tmp_path):
    run("clinic", "run", "-o", tmp_path, "--cases", cases, "--policy", "repeat")
    page = (tmp_path / "report.html").read_text()
    assert '<mark title="redundant question: ' in page
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert min(rows[0]["gammas"]) == 0.1
    (trajectory, _) = read_trajectories(tmp_path / "trajectories.jsonl")
    for span in rows[0]["spans"]:
        said = next(m.content for m in trajectory.of("assistant") if m.turn == span["turn"])
        assert 0 <= span["token_start"] < span["token_end"] <= len(words(said))


def test_replay_of_trajectories(cases, consulted):
    said = run("clinic", "replay", consulted[0] / "trajectories.jsonl", "--cases", cases)
    assert "good" in said and "2 consultations in" in said


def test_our_own_cases_are_listed():
    said = run("clinic", "cases")
    assert f"{len(own_cases())} cases, all valid; {len(own_cases())} synthetic, 0 not" in said


def test_a_broken_case_is_one_line(tmp_path):
    (tmp_path / "broken.jsonl").write_text(json.dumps({**small_row(), "split": "exam"}) + "\n")
    said = run("clinic", "cases", tmp_path / "broken.jsonl", code=1)
    assert "broken.jsonl:1: split: 'exam' is not one of" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "magic"), "open_chat: spec: want 'http://host:port/v1#model'"),
        (("--split", "exam"), "clinic: --split: want one of"),
    ],
    ids=["policy", "split"],
)
def test_a_wrong_option_is_one_line(options, message, cases, tmp_path):
    assert message in run("clinic", "run", "-o", tmp_path, "--cases", cases, *options, code=1)


def test_an_expert_decides_on_drafts(tmp_path):
    store, file = tmp_path / "rubrics.jsonl", tmp_path / "pending.json"
    with RubricStore(store) as opened:
        item = RubricItem(id="d1", criterion="Repeats a question that was answered.", points=-3)
        opened.draft("all", item, Provenance(author="rule", by="repeats", note="seen twice"))
    assert "1 drafts" in run("clinic", "rubrics", "pending", store, file)
    rows = json.loads(file.read_text())
    rows[0].update(decision="approve", by="Dr Example", criterion="Repeats an answered question.")
    file.write_text(json.dumps(rows))
    assert "approved 1, rejected 0" in run("clinic", "rubrics", "decide", store, file)
    (entry,) = read_state(store).of(Status.approved)
    assert entry.item.criterion == "Repeats an answered question."
    assert "Repeats an answered question." in run("clinic", "rubrics", "list", store)


# -- evaluate ---------------------------------------------------------------------------------------------------------
def test_scanbench_by_rules_has_no_score(cases, consulted, tmp_path):
    trajectories = consulted[0] / "trajectories.jsonl"
    said = run("evaluate", "scanbench", trajectories, "--cases", cases, "--plot", tmp_path / "turns.png")
    assert said.count("n/a: scripted judge") == 3
    assert (tmp_path / "turns.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('{"explanation": "yes", "criteria_met": true}', "ScanBench inquiry: 100.0"),
        ('{"explanation": "no", "criteria_met": false}', "ScanBench inquiry: 0.0"),
    ],
    ids=["met", "not met"],
)
def test_scanbench_by_a_chat_model(reply, said, cases, consulted, tmp_path):
    (tmp_path / "judge.jsonl").write_text(json.dumps(reply) + "\n")
    found = run(
        *("evaluate", "scanbench", consulted[0] / "trajectories.jsonl", "--cases", cases),
        *("--judge", f"scripted:{tmp_path / 'judge.jsonl'}"),
    )
    assert said in found


def test_a_judge_that_gives_no_verdict_gives_no_score(cases, consulted, tmp_path):
    (tmp_path / "judge.jsonl").write_text('"maybe"\n')
    said = run(
        *("evaluate", "scanbench", consulted[0] / "trajectories.jsonl", "--cases", cases),
        *("--judge", f"scripted:{tmp_path / 'judge.jsonl'}"),
        code=1,
    )
    assert "'unparsable': 6" in said and "3 of 3 items: {'unparsable': 3}" in said


@pytest.fixture
def healthbench(tmp_path):
    row = {
        "example_tags": ["theme:ours"],
        "ideal_completions_data": None,
        "prompt": [{"role": "user", "content": "I have a headache."}],
        "prompt_id": "p1",
        "rubrics": [
            {"criterion": "Asks how sudden it was.", "points": 5, "tags": ["axis:context"]},
            {"criterion": "Names a dose without asking.", "points": -4, "tags": ["axis:accuracy"]},
        ],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "answers.jsonl").write_text('{"prompt_id": "p1", "response": "How sudden was it?"}\n')
    return tmp_path


def test_healthbench_by_rules_has_no_score(healthbench):
    options = ("--answers", healthbench / "answers.jsonl", "-o", healthbench / "graded.jsonl")
    said = run("evaluate", "healthbench", healthbench / "rows.jsonl", *options)
    assert "HealthBench: n/a: scripted judge" in said
    assert "unknown" in said


def test_healthbench_by_a_chat_model(healthbench):
    (healthbench / "judge.jsonl").write_text('"{\\"explanation\\": \\"\\", \\"criteria_met\\": true}"\n')
    options = ("--answers", healthbench / "answers.jsonl", "-o", healthbench / "graded.jsonl")
    said = run(
        "evaluate",
        "healthbench",
        healthbench / "rows.jsonl",
        *options,
        "--judge",
        f"scripted:{healthbench / 'judge.jsonl'}",
    )
    assert "HealthBench: 0.2000 (bootstrap std 0.0000, n 1)" in said


def test_answers_and_a_policy_are_one_too_many(healthbench):
    said = run("evaluate", "healthbench", healthbench / "rows.jsonl", "-o", healthbench / "graded.jsonl", code=1)
    assert "either --policy or --answers; got none" in said


def test_hallucination_by_rules(tmp_path):
    (tmp_path / "corpus.txt").write_text("Aspirin irreversibly inhibits cyclooxygenase in platelets.\n")
    rows = [{"id": "a", "question": "", "response": "Aspirin irreversibly inhibits cyclooxygenase in platelets."}]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--corpus", tmp_path / "corpus.txt", "-o", tmp_path / "out", "--cache", tmp_path / "claims.sqlite")
    for _ in range(2):
        said = run("evaluate", "hallucination", tmp_path / "responses.jsonl", *options)
        assert '"supported": 1' in said and "not HealthBench-Hallu" in said


def test_trajectories_of_an_unknown_case_are_refused(consulted, tmp_path):
    row = next(read_trajectories(consulted[0] / "trajectories.jsonl")).to_json()
    assert Trajectory.from_json(row).case == "small-1"
    said = run("clinic", "score", consulted[0] / "trajectories.jsonl", "-o", tmp_path, code=1)
    assert "'small-1'" in said
