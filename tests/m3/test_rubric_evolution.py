"""Rubric evolution: suspects, drafts by script and by model, the exact test, admission, exit, revival, the gap."""

from __future__ import annotations

import asyncio
import json
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3.rewards import rubric_evolution as evolution
from m3.rewards.judge import ScriptedJudge
from m3.rewards.rubric import RubricItem
from m3.rewards.rubric_evolution import (
    Config,
    LLMMiner,
    MiningError,
    Sample,
    ScriptedMiner,
    Suspect,
    binomial_tail,
    find_suspects,
    inject,
    is_long,
    is_violation,
    mine,
    overoptimisation_gap,
    plot_gap,
    read_drafts,
    repeats_itself,
    score_epoch,
)
from m3.rewards.rubric_store import Provenance, RubricStore, State, Status, read_state
from m3.rewards.verdict import Outcome, Verdict
from m3.rollout.chat import Reply

HUMAN = Provenance(author="human", by="Dr A")
CLAUSES = {"repeats itself": ("Says the same twice.", -4), "longer than 8 words": ("Is brief.", 3)}
JUDGE = ScriptedJudge({"core": ["onset"], "held": ["explain"], "dynamic-1-1": ["twice"]})


def sample(one: str, text: str, score: float = 0.9, scope: str = "case-1") -> Sample:
    conversation = [{"role": "user", "content": "My head hurts."}, {"role": "assistant", "content": text}]
    return Sample(id=one, scope=scope, conversation=conversation, score=score)


TWICE = "Drink plenty of water today. Today, drink plenty of water."


@pytest.fixture
def store(tmp_path):
    with RubricStore(tmp_path / "rubrics.jsonl", clock=lambda: "2026-01-01T00:00:00") as opened:
        opened.add_core("case-1", [RubricItem(id="core", criterion="Asks for the onset.", points=5)], HUMAN)
        opened.hold_out("case-1", [RubricItem(id="held", criterion="Explains.", points=5)], HUMAN)
        yield opened


# -- mine -------------------------------------------------------------------------------------------------------------
def test_suspects_are_good_by_score_and_bad_by_a_hook():
    samples = [
        sample("good", "Since when? Does it throb?"),
        sample("twice", TWICE),
        sample("twice_but_low", TWICE, score=0.79),
        sample("long", "one two three four five six seven eight nine"),
    ]
    found = find_suspects(samples, [repeats_itself, is_long(8)])
    assert [(one.sample.id, one.defect) for one in found] == [
        ("twice", "repeats itself"),
        ("long", "longer than 8 words"),
    ]


def test_mining_drafts_into_the_store_and_drops_twins(store):
    samples = [sample("a", TWICE), sample("b", TWICE), sample("c", TWICE, scope="case-2")]
    found = asyncio.run(mine(store, samples, ScriptedMiner(CLAUSES), [repeats_itself], epoch=1))
    assert found.drafted == ("dynamic-1-1", "dynamic-1-2")
    entry = store.state.entries["dynamic-1-1"]
    assert (entry.status, entry.scope, entry.item.points) == (Status.drafted, "case-1", -4)
    assert entry.provenance == Provenance(author="rule", by="scripted miner", samples=("a", "b"), note="repeats itself")
    assert store.state.rubric("case-1").items[-1].id == "core", "a draft is not trained on"
    again = asyncio.run(mine(store, samples, ScriptedMiner(CLAUSES), [repeats_itself], epoch=2))
    assert again.drafted == ()
    assert [why for _, why in again.dropped] == ["twin of dynamic-1-1 (drafted)", "twin of dynamic-1-2 (drafted)"]


def test_drafts_of_an_epoch_are_bounded_even_when_it_was_cut_short(store):
    samples = [sample("a", TWICE), sample("b", "one two three four five six seven eight nine", scope="case-2")]
    config = Config(max_drafts=1)
    defects = [repeats_itself, is_long(8)]
    asyncio.run(mine(store, samples[:1], ScriptedMiner(CLAUSES), defects, epoch=1, config=config))
    found = asyncio.run(mine(store, samples, ScriptedMiner(CLAUSES), defects, epoch=1, config=config))
    assert found.drafted == ()
    assert [why for _, why in found.dropped] == ["twin of dynamic-1-1 (drafted)", "more than 1 at one epoch"]


def test_scripted_miner_knows_its_defects():
    with pytest.raises(ValueError, match="ScriptedMiner: suspects: want defects of"):
        asyncio.run(ScriptedMiner({}).draft([Suspect(sample=sample("a", "x"), defect="odd")], State()))


class Drafter:
    """A chat client that replies with one text after another."""

    model = "drafter"

    def __init__(self, *replies: str) -> None:
        self.replies, self.prompts = list(replies), []

    async def chat(self, messages, *, temperature=0.0, max_tokens=512, seed=None, stop=(), json_schema=None):
        json.dumps([messages, json_schema])  # what a client sends must be JSON
        self.prompts.append(messages[-1]["content"])
        return Reply(text=self.replies.pop(0))


DRAFTS = json.dumps({"rubrics": [{"criterion": "Says the same twice.", "points": -4, "reason": "two drinks"}]})


def test_model_drafts_after_replies_that_cannot_be_read(store):
    client = Drafter(
        "Sure! Here are some.", '{"rubrics": [{"criterion": "x", "points": 0}]}', f"```json\n{DRAFTS}\n```"
    )
    found = asyncio.run(mine(store, [sample("a", TWICE)], LLMMiner(client), [repeats_itself], epoch=3))
    entry = store.state.entries["dynamic-3-1"]
    assert found.drafted == ("dynamic-3-1",)
    assert entry.provenance == Provenance(author="llm", by="drafter", samples=("a",), note="two drinks")
    assert len(client.prompts) == 3
    assert "- [5] Asks for the onset." in client.prompts[0]
    assert f"assistant: {TWICE}" in client.prompts[0]
    assert "Explains." not in client.prompts[0], "the hold-out set is not shown"


def test_model_that_never_drafts_is_an_error(store):
    with pytest.raises(MiningError, match="mining by drafter: no drafts in 2 replies"):
        asyncio.run(
            mine(store, [sample("a", TWICE)], LLMMiner(Drafter("no", "{}"), retries=1), [repeats_itself], epoch=1)
        )


def test_no_draft_is_an_answer():
    assert read_drafts('{"rubrics": []}') == []


UNREADABLE = [
    "",
    "[]",
    '{"rubrics": 1}',
    '{"rubrics": ["x"]}',
    '{"rubrics": [{"criterion": 5, "points": 1}]}',
    "[" * 99999,
]


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_drafts_that_cannot_be_read(text):
    assert read_drafts(text) is None


# -- the test ---------------------------------------------------------------------------------------------------------
def exact_tail(k: int, n: int, p: Fraction) -> Fraction:
    return 1 - sum((comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k)), start=Fraction(0))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 99))
def test_tail_is_exact(a, b, percent):
    k, n = sorted((a, b))
    expected = float(exact_tail(k, n, Fraction(percent, 100)))
    assert binomial_tail(k, n, percent / 100) == pytest.approx(expected, rel=1e-10)


def test_tail_of_many_responses():
    assert binomial_tail(80, 1000, 0.05) == pytest.approx(float(exact_tail(80, 1000, Fraction(1, 20))), rel=1e-10)


@pytest.mark.parametrize(("k", "n", "tail"), [(50_500, 10**6, 0.0110411223911), (50_010_000, 10**9, 0.0734099)])
def test_tail_of_huge_counts(k, n, tail):
    """Against mpmath with 40 digits; summed without a term for each of a thousand million responses."""
    assert binomial_tail(k, n, 0.05) == pytest.approx(tail, rel=3e-15 * n)


EDGES = {"none": (0, 5, 0.1, 1.0), "p_0": (1, 5, 0.0, 0.0), "p_1": (5, 5, 1.0, 1.0), "nothing": (0, 0, 0.5, 1.0)}


@pytest.mark.parametrize(("k", "n", "p", "tail"), EDGES.values(), ids=EDGES)
def test_tail_at_its_edges(k, n, p, tail):
    assert binomial_tail(k, n, p) == tail


def test_tail_of_nonsense():
    with pytest.raises(ValueError, match="binomial_tail: k: want 0 to n = 3; got 4"):
        binomial_tail(4, 3, 0.5)


VIOLATIONS = {
    "good_met": (5, Outcome.met, False),
    "good_not_met": (5, Outcome.not_met, True),
    "bad_met": (-5, Outcome.met, True),
    "bad_not_met": (-5, Outcome.not_met, False),
    "unjudged": (5, Outcome.unparsable, None),
}


@pytest.mark.parametrize(("points", "outcome", "violated"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_violation(points, outcome, violated):
    assert is_violation(RubricItem(id="a", criterion="x", points=points), outcome) is violated


# -- inject -----------------------------------------------------------------------------------------------------------
def approved(store, count: int = 1) -> None:
    for n in range(1, count + 1):
        item = RubricItem(id=f"dynamic-1-{n}", criterion=f"Says it twice, kind {'x' * n}.", points=-4)
        store.draft("case-1", item, HUMAN)
        store.approve(item.id, "Dr B")


def responses(violating: int, clean: int) -> list[Sample]:
    texts = ["I say it twice."] * violating + ["Since when?"] * clean
    return [sample(str(n), text) for n, text in enumerate(texts)]


def run(store, epoch, violating, clean, config=None) -> list[tuple[str, str]]:
    judge = ScriptedJudge({f"dynamic-1-{n}": ["twice"] for n in range(1, 9)})
    found = asyncio.run(inject(store, responses(violating, clean), judge, epoch=epoch, config=config))
    return [(one.id, one.event) for one in found]


def test_whole_life_by_measurement(store):
    """5 of 40 at a floor of 5 %: p 0.048, admitted; three clean epochs: out; a relapse: back."""
    approved(store)
    one = "dynamic-1-1"
    assert run(store, 1, 4, 36) == [(one, "")]
    assert run(store, 2, 5, 35) == [(one, "admitted")]
    assert run(store, 3, 0, 40) == [(one, "")]
    assert run(store, 4, 1, 39) == [(one, "")], "one violation in 40 is more than 1 %"
    assert [run(store, epoch, 0, 40) for epoch in (5, 6, 7)] == [[(one, "")], [(one, "")], [(one, "exited")]]
    assert run(store, 8, 1, 39) == [(one, "")]
    assert run(store, 9, 20, 20) == [(one, "revived")]
    assert [run(store, epoch, 0, 40) for epoch in (10, 11, 12)] == [[(one, "")], [(one, "")], [(one, "exited")]]
    events = [change.event for change in read_state(store.path).entries[one].history]
    assert events == ["drafted", "approved", "admitted", "exited", "revived", "exited"]
    assert store.state.entries[one].history[2].note.startswith("violations 5/40, p 4.80e-02 for a rate of at most 0.05")


def test_level_is_shared_by_what_is_tested(store):
    """The same 5 of 40 is no longer significant where two clauses are tested."""
    approved(store, count=2)
    assert run(store, 1, 5, 35) == [("dynamic-1-1", ""), ("dynamic-1-2", "")]
    assert run(store, 2, 6, 34) == [("dynamic-1-1", "admitted"), ("dynamic-1-2", "admitted")]


def test_few_responses_decide_nothing(store):
    approved(store)
    assert run(store, 1, 19, 0) == [("dynamic-1-1", "")]
    assert run(store, 2, 19, 0, Config(min_judged=19)) == [("dynamic-1-1", "admitted")]


class MuteJudge(ScriptedJudge):
    """Judges nothing of responses that say "mute"."""

    async def judge(self, conversation, items):
        found = await super().judge(conversation, items)
        if "mute" not in conversation[-1]["content"]:
            return found
        return [Verdict(criterion=one.criterion, outcome=Outcome.timeout) for one in found]


def test_unjudged_responses_are_counted_and_are_no_violations(store):
    approved(store)
    samples = [*responses(5, 35), *(sample(f"m{n}", "mute twice") for n in range(60))]
    [found] = asyncio.run(inject(store, samples, MuteJudge({"dynamic-1-1": ["twice"]}), epoch=1))
    assert (found.measured.violations, found.measured.judged, found.measured.unjudged) == (5, 40, 60)
    assert found.event == "admitted"


def test_other_contexts_are_not_measured(store):
    approved(store)
    samples = [sample(str(n), "twice", scope="case-2") for n in range(40)]
    assert asyncio.run(inject(store, samples, JUDGE, epoch=1)) == []
    assert store.state.entries["dynamic-1-1"].measured == ()


def test_epoch_cut_short_goes_on(store):
    approved(store, count=2)
    store.measure("dynamic-1-1", evolution.Measured(epoch=1, violations=30, judged=40))
    assert run(store, 1, 0, 40) == [("dynamic-1-1", "admitted"), ("dynamic-1-2", "")]


BAD_CONFIG = {
    "alpha": ({"alpha": 2.0}, "rubric_evolution.Config: alpha: want a number in"),
    "epochs": ({"exit_epochs": 0}, "exit_epochs: want 1 or more; got 0"),
    "exit_above_floor": ({"exit_rate": 0.05}, "exit_rate: want a rate below violation_floor; got 0.05"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIG.values(), ids=BAD_CONFIG)
def test_config(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


# -- over-optimisation ------------------------------------------------------------------------------------------------
def scored(store, epoch: int, *texts: str):
    samples = [sample(str(n), text) for n, text in enumerate(texts)]
    return asyncio.run(score_epoch(store, samples, MuteJudge({"core": ["onset"], "held": ["explain"]}), epoch=epoch))


def test_gap_grows_as_the_rubric_is_learnt_instead_of_the_task(store, tmp_path):
    scored(store, 1, "I explain.", "The onset?", "The onset? I explain.", "mute")
    last = scored(store, 2, "The onset?", "The onset?", "The onset? I explain.", "Onset.")
    assert (last.train, last.held_out, last.samples) == (1.0, 0.25, 4)
    assert store.state.scores[0].samples == 3, "a response that is not judged counts for neither mean"
    assert overoptimisation_gap(read_state(store.path)) == [(1, pytest.approx(0.0)), (2, 0.75)]
    plot_gap(store.state, tmp_path / "gap.svg")
    plot_gap(store.state, tmp_path / "gap.png")
    assert "over-optimisation" in (tmp_path / "gap.svg").read_text(encoding="utf-8").lower()
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_epoch_that_cannot_be_scored_is_an_error(store):
    with pytest.raises(ValueError, match="score_epoch: samples: want a response judged by both sets; got none of 1"):
        scored(store, 1, "mute")
    assert store.state.scores == []
