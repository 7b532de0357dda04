"""The engine benchmark: engines in processes of their own, judged by what they write, timed only if it is right."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import __main__ as command
from bench import engine, engine_report, harness, record, roofline
from bench.engine import ENTRANTS, EngineArm, Judges, Visit, Worker
from bench.engine_inputs import CASES, Case, Prompts
from bench.engine_peers import KINDS, Timeline, regret, versions, weight_bytes
from bench.record import EngineRow

CASE = Case(name="tiny", batch=2, depth=600, count=3)
ALONE = dataclasses.replace(CASE, batch=1)

# Speaks the protocol. The right token after n tokens whose sum is s is (s + n) % 97; any other costs 5 nats.
STAND_IN = """
import json, sys
how = sys.argv[1]
print("a word before the end", file=sys.stderr)
settings = json.loads(sys.stdin.readline())
if how == "refuses":
    raise ImportError("no such engine")
print(json.dumps({"weight_bytes": 1 << 20, "kv_bytes": 8, "versions": {"stand-in": "1.0"}}), flush=True)
def best(tokens):
    return (sum(tokens) + len(tokens)) % 97
def write(prompt, count):
    tokens = list(prompt)
    for _ in range(count + 1):
        tokens.append(best(tokens) + (how == "wrong"))
    return tokens[len(prompt):]
for number, line in enumerate(sys.stdin):
    job = json.loads(line)
    if how == "dies":
        raise RuntimeError("out of memory")
    if how == "silent":
        continue
    if "taken" in job:
        regrets = []
        for prompt, row in zip(job["prompts"], job["taken"]):
            wrong = [token != best(prompt + row[:place]) for place, token in enumerate(row)]
            regrets.append(5.0 * sum(wrong) / len(wrong))
        print(json.dumps(regrets))
    else:
        tokens = [write(prompt, job["count"] - (how == "short")) for prompt in job["prompts"]]
        if how == "strays" and number > 70:
            tokens[0][-1] += 1
        decoded = job["count"] * len(tokens)
        times = {"prefill_s": 0.5, "decode_s": 0.01 * decoded, "decoded": decoded, "steps": job["count"]}
        print(json.dumps({**times, "tokens": tokens}))
    sys.stdout.flush()
"""


class Letters:
    """A tokenizer whose tokens are letters."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"<user>{message['content']}<assistant>" for message in messages))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(Letters())


@pytest.fixture
def start(tmp_path):
    """Start a stand-in of some manner; all are closed at the end."""
    script, workers = tmp_path / "stand_in.py", []
    script.write_text(STAND_IN)

    def worker(how: str = "right") -> Worker:
        log = tmp_path / f"{how}-{len(workers)}.log"
        workers.append(Worker([sys.executable, "-I", str(script), how], {"threads": 1}, log, {}))
        return workers[-1]

    yield worker
    for each in workers:
        each.close()


@pytest.fixture
def judges(start) -> Judges:
    """Judges of every kind are one stand-in."""
    found = Judges(SimpleNamespace(), 1)
    found.workers = dict.fromkeys({*engine.REFERENCES.values()}, start())
    return found


@pytest.fixture
def small_roofline(monkeypatch):
    """A read probe of 8 MiB."""
    monkeypatch.setattr(roofline, "BUFFER_BYTES", 8 << 20)
    monkeypatch.setattr(roofline, "WINDOW_BYTES", 1 << 20)
    roofline.buffer.cache_clear()
    yield
    roofline.buffer.cache_clear()


def make_row(**changes: object) -> EngineRow:
    values = {
        "op": "engine_decode",
        "shape": "b1.d64",
        "arm": "m3_int4",
        "batch": 1,
        "depth": 64,
        "weights": "int4",
        "draft": False,
        "versions": {},
        "device": "cpu",
        "threads": 1,
        "case_threads": 1,
        "gate": "passed",
        "error": 0.0,
        "tolerance": 0.05,
        "median_s": 0.01,
        "p20_s": 0.008,
        "p80_s": 0.0125,
        "tokens_s": 100.0,
        "commit": "0" * 12,
        "dirty": False,
        "machine": {"cpu": "test"},
        "date": "2026-01-01T00:00:00+00:00",
        "command": "test",
    }
    return EngineRow(**(values | changes))


# -- the clock of an engine -------------------------------------------------------------------------------------------
def test_prefill_ends_when_no_sequence_is_without_a_token(monkeypatch):
    clock = iter([10.0, 11.0, 13.0, 14.0, 16.0])
    monkeypatch.setattr("bench.engine_peers.time.perf_counter", lambda: next(clock))
    timeline = Timeline(2)
    timeline.add([[5], []])
    timeline.add([[6], [7]])
    timeline.add([[8, 9], [1]])
    timeline.add([[], [2, 3]])
    answer = timeline.answer()
    assert answer["prefill_s"] == 3.0
    assert answer["decode_s"] == 3.0
    assert (answer["decoded"], answer["steps"]) == (5, 2)
    assert answer["tokens"] == [[5, 6, 8, 9], [7, 1, 2, 3]]


def test_regret_is_the_log_probability_given_away():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.5], [0.0, 0.0, 4.0]])
    judge = SimpleNamespace(torch=torch, logits=lambda row, last: logits[-last:])
    expected = logits.log_softmax(-1)
    given_away = expected.amax(-1) - expected[[0, 1, 2], [1, 2, 2]]
    assert regret(judge, [[7, 8]], [[1, 2, 2]]) == pytest.approx([float(given_away.mean())])


def test_versions_are_of_what_is_installed():
    assert versions(("torch", "no-such-package")).keys() == {"torch"}


def test_weight_bytes_counts_a_storage_once_and_no_embedding():
    tied = nn.Linear(4, 6, bias=False)
    block = nn.Linear(4, 4, bias=True)
    model = SimpleNamespace(blocks=(block, block), norm=nn.LayerNorm(4, bias=False), head=tied)
    assert weight_bytes(model) == 4 * (16 + 4 + 4 + 24)


# -- processes --------------------------------------------------------------------------------------------------------
def test_worker_answers(start):
    worker = start()
    assert worker.facts["versions"] == {"stand-in": "1.0"}
    assert worker.ask({"prompts": [[1, 2]], "count": 1})["tokens"] == [[5, 11]]


@pytest.mark.parametrize(("how", "words"), [("refuses", "no such engine"), ("dies", "out of memory")])
def test_worker_that_ends_says_why(start, how, words):
    with pytest.raises(harness.UnavailableError, match=words):
        start(how).ask({"prompts": [[1]], "count": 1})


def test_worker_that_is_silent_is_given_up(start):
    worker = start("silent")
    with pytest.raises(harness.UnavailableError, match="no answer"):
        worker.ask({"prompts": [[1]], "count": 1}, limit=0.05)


def test_worker_counts_its_cpu(start):
    worker = start()
    before = worker.cpu_seconds()
    assert 0 <= before <= engine.busy_seconds()


# -- prompts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", [CASE, CASES["b4.d512"]], ids=lambda case: case.name)
def test_prompts_have_the_depth_of_the_case_and_differ(prompts, case):
    found = [prompt for part in range(3) for prompt in prompts.batch(case, part)]
    assert {len(prompt) for prompt in found} == {case.depth}
    assert len({tuple(prompt) for prompt in found}) == len(found)


def test_prompt_is_a_chat_with_the_question_last(prompts):
    text = "".join(map(chr, prompts.batch(CASE, 0)[0]))
    question = "".join(map(chr, prompts.questions[0])).removeprefix("<user>")
    assert text.startswith("<user>")
    assert text.endswith(f"\n\n{question}")


def test_prompt_without_room_for_a_question_is_refused(prompts):
    with pytest.raises(ValueError, match="engine: depth: want room for a question; got 5"):
        prompts.batch(dataclasses.replace(CASE, depth=5), 0)


# -- a case -----------------------------------------------------------------------------------------------------------
def run(case, arms, judges, prompts, absent=None):
    plan = engine.Plan(min_rounds=2)
    lines: list[str] = []
    found = engine.run_case(case, plan, 1, prompts, judges, arms, absent or {}, lines.append)
    return {row.arm: row for row in found if row.op == "engine_decode"}, found, lines


def arm(name: str, worker: Worker) -> EngineArm:
    return EngineArm(name, ENTRANTS[name], worker, 1)


@pytest.mark.usefixtures("small_roofline")
def test_right_arms_are_timed_and_others_are_not(start, judges, prompts, tmp_path):
    manners = {"m3_int4": "right", "m3_fp32": "wrong", "vllm_fp32": "short", "llama_q4_0": "dies"}
    arms = [arm(name, start(how)) for name, how in manners.items()]
    rows, found, lines = run(CASE, arms, judges, prompts, {"m3_bf16": "needs rain"})
    assert rows["m3_int4"].tokens_s == pytest.approx(100.0)
    assert rows["m3_int4"].rounds == 2
    assert (rows["m3_int4"].error, rows["m3_int4"].rounding) == (0.0, 0.0)
    assert rows["m3_int4"].roofline_share > 0
    assert rows["m3_int4"].step_bytes == (1 << 20) + 2 * 601 * 8
    assert (rows["m3_fp32"].gate, rows["m3_fp32"].error) == ("failed", 5.0)
    assert (rows["vllm_fp32"].gate, rows["vllm_fp32"].error) == ("failed", None)
    assert rows["llama_q4_0"].gate == "absent: RuntimeError: out of memory"
    assert rows["m3_bf16"].gate == "absent: needs rain"
    assert any("m3_fp32: gate failed" in line for line in lines)
    record.append(tmp_path / "rows.jsonl", found)
    assert record.read(tmp_path / "rows.jsonl") == found


@pytest.mark.usefixtures("small_roofline")
def test_prefill_is_timed_with_one_long_prompt(start, judges, prompts):
    _, found, _ = run(ALONE, [arm("m3_int4", start())], judges, prompts)
    row = next(row for row in found if row.op == "engine_prefill")
    assert row.shape == "p600"
    assert row.tokens_s == pytest.approx(1200.0)
    assert row.roofline_share is None


@pytest.mark.usefixtures("small_roofline")
@pytest.mark.parametrize(("how", "gate"), [("right", "passed"), ("strays", "failed")])
def test_draft_must_write_what_its_twin_writes(start, judges, prompts, how, gate):
    """The one that strays does so after the gate, by one token in each round."""
    plain, drafting = arm("m3_int4", start()), arm("m3_int4_draft", start(how))
    warm = {"prompts": [[1]], "count": 1}
    for _ in range(49):
        drafting.worker.ask(warm)
    rows, _, lines = run(CASE, [plain, drafting], judges, prompts)
    assert rows["m3_int4_draft"].gate == gate
    assert rows["m3_int4"].gate == "passed"
    assert bool([line for line in lines if "other tokens than m3_int4" in line]) == (gate == "failed")
    assert (rows["m3_int4_draft"].tokens_per_step is not None) == (gate == "passed")


def test_arm_whose_weights_nobody_can_unpack_is_judged_loosely(start):
    assert arm("onnx_genai_int4", start()).tolerance == engine.UNKNOWN
    assert arm("llama_q4_0", start()).tolerance == engine.TOLERANCE["int4"]


def test_visit_with_tokens_beyond_one_a_step_says_so():
    visit = Visit(part=0, prefill_s=1.0, decode_s=2.0, decoded=8, steps=4, tokens=[], others_cpu=0.0)
    assert engine.per_token("engine_decode", ALONE, visit) == 0.25
    assert engine.per_token("engine_prefill", ALONE, visit) == 1 / 600


# -- promises ---------------------------------------------------------------------------------------------------------
RATIOS = {
    "llama_q4_0": (1.5, 1.4, 1.6),
    "llama_q4_0_flash": (1.25, 1.2, 1.3),
    "transformers_fp32": (9.0, 8.5, 9.5),
    "transformers_bf16": (10.0, 9.5, 10.5),
}


def test_promises_take_the_faster_peer():
    lines = engine_report.acceptance([make_row(ratios=RATIOS)])
    found = {(line.what, line.peer): (line.got, line.reached) for line in lines}
    assert found == {
        ("decode, times as fast", "llama_q4_0_flash"): (1.25, True),
        ("decode, times as fast", "transformers_fp32"): (9.0, True),
        ("best gain of a draft", "m3_int4"): (None, False),
    }


def test_prefill_has_its_own_promise():
    row = make_row(op="engine_prefill", shape="p512", depth=512, ratios={"llama_q4_0": (0.9, 0.8, 1.0)})
    (line,) = engine_report.acceptance([row])
    assert (line.what, line.want, line.got, line.passed) == ("prefill, times as fast", 1.0, 0.9, False)


def test_draft_is_held_to_plain_at_every_load():
    drafting = {"arm": "m3_int4_draft", "draft": True, "ratios": {"m3_int4": (0.96, 0.95, 0.97)}}
    rows = [make_row(shape="b16.d64", batch=16), make_row(shape="b16.d64", batch=16, **drafting)]
    (line,) = engine_report.acceptance(rows)
    assert (line.what, line.want, line.passed) == ("with a draft, of plain", 0.97, False)


def test_best_gain_is_of_any_precision():
    rows = [
        make_row(arm="m3_int4_draft", draft=True, ratios={"m3_int4": (1.05, 1.0, 1.1)}),
        make_row(arm="m3_fp32_draft", weights="fp32", draft=True, ratios={"m3_fp32": (1.2, 1.1, 1.3)}),
    ]
    gain = next(line for line in engine_report.acceptance(rows) if line.what == "best gain of a draft")
    assert (gain.peer, gain.got, gain.passed) == ("m3_fp32", 1.2, True)


def test_report_shows_times_and_why_there_are_none():
    absent = make_row(arm="vllm_int4", gate="absent: needs rain", error=None, tolerance=None, **dict.fromkeys(TIMED))
    text = "\n".join(engine_report.sections([make_row(ratios=RATIOS, versions={"torch": "9"}), absent]))
    assert "100.0 (80.0 - 125.0)" in text
    assert "absent: needs rain" in text
    assert "torch 9." in text


TIMED = [name for name in EngineRow.TIMED if name != "roofline_share"]


def test_time_without_a_passed_gate_is_refused():
    with pytest.raises(ValueError, match="Row: gate: want 'passed'"):
        make_row(gate="failed", error=math.nan)


# -- the command line -------------------------------------------------------------------------------------------------
def test_command_line_changes_the_preset():
    words = ["engine", "--arms", "m3_int4,llama_q4_0", "--threads", "1", "--rounds", "3", "--draft", "somewhere"]
    words += ["--model", "int4=/a/folder", "--peer-python", "vllm=/a/python"]
    plan = command.engine_plan(command.parser().parse_args(words))
    assert plan.arms == ("m3_int4", "llama_q4_0")
    assert (plan.threads, plan.min_rounds, plan.draft) == ((1,), 3, "somewhere")
    assert (plan.models, plan.pythons) == ({"int4": "/a/folder"}, {"vllm": "/a/python"})
    assert plan.cases == engine.PRESETS["acceptance"].cases


@pytest.mark.parametrize("text", ["", "vllm", "=path", "vllm="])
def test_pair_wants_a_name_and_a_path(text):
    with pytest.raises(argparse.ArgumentTypeError, match="want NAME=PATH"):
        command.pair(text)


@pytest.mark.parametrize(("field", "value"), [("arms", ("m4",)), ("cases", ("b3",))])
def test_plan_names_what_it_does_not_know(field, value):
    with pytest.raises(ValueError, match=f"engine: {field}: want some of .*; got {value[0]}"):
        engine.Plan(**{field: value})


def test_model_that_nobody_makes_needs_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("M3_BENCH_CACHE", str(tmp_path))
    with pytest.raises(harness.UnavailableError, match="needs --model onnx_int4=PATH"):
        engine.Models({}).path("onnx_int4")
    with pytest.raises(harness.UnavailableError, match="does not exist"):
        engine.Models({"int4": str(tmp_path / "none")}).path("int4")


def test_draft_arm_needs_a_draft():
    with pytest.raises(harness.UnavailableError, match="needs --draft"):
        engine.open_arm("m3_int4_draft", engine.Plan(), 1, engine.Models({}), {})


@pytest.mark.parametrize("name", ENTRANTS)
def test_every_entrant_has_a_kind_and_a_twin_that_is_plain(name):
    entrant = ENTRANTS[name]
    assert entrant.kind in KINDS
    assert entrant.draft == (entrant.twin is not None)
    assert not entrant.draft or not ENTRANTS[entrant.twin or ""].draft
    assert Path(engine.WORKER).is_file()
