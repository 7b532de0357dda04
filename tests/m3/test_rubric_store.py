"""The store of rubrics: lives, what may not happen, versions, a kill in the middle of an event, the expert's file."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from m3.environment.journal import Journal
from m3.rewards.rubric import RubricItem
from m3.rewards.rubric_store import (
    Measured,
    Provenance,
    RubricStore,
    Scored,
    Status,
    lives,
    read_state,
    take_decisions,
    write_pending,
)

HUMAN = Provenance(author="human", by="Dr A")
MODEL = Provenance(author="llm", by="miner-1", samples=("s1", "s2"), note="blames in s1")


def item(one: str, criterion: str, points: float = 5) -> RubricItem:
    return RubricItem(id=one, criterion=criterion, points=points, tags=("axis:a",))


@pytest.fixture
def store(tmp_path):
    ticks = itertools.count()
    with RubricStore(tmp_path / "rubrics.jsonl", clock=lambda: f"2026-01-01T00:00:{next(ticks):02d}") as opened:
        opened.add_core("case-1", [item("core-1", "Asks for the onset.")], HUMAN)
        opened.hold_out("case-1", [item("held-1", "Explains the next step.")], HUMAN)
        opened.draft("case-1", item("d1", "Blames the patient.", -4), MODEL)
        opened.draft("*", item("d2", "Repeats a question.", -3), MODEL)
        yield opened


def trained(store) -> list[str]:
    return [one.id for one in store.state.rubric("case-1").items]


def test_life_of_a_rubric(store):
    assert trained(store) == ["core-1"]
    store.approve("d1", "Dr B", note="clear")
    assert trained(store) == ["core-1"], "approval is not admission"
    store.admit("d1", "rule", "p 0.001")
    assert trained(store) == ["core-1", "d1"]
    store.exit("d1", "rule", "0/50 three times")
    assert trained(store) == ["core-1"]
    store.revive("d1", "rule", "9/50")
    assert trained(store) == ["core-1", "d1"]
    entry = store.state.entries["d1"]
    assert [(c.version, c.event, c.by, c.note) for c in entry.history] == [
        (3, "drafted", "", ""),
        (5, "approved", "Dr B", "clear"),
        (6, "admitted", "rule", "p 0.001"),
        (7, "exited", "rule", "0/50 three times"),
        (8, "revived", "rule", "9/50"),
    ]
    assert entry.provenance == MODEL
    assert entry.history[0].at == "2026-01-01T00:00:02"
    assert [event for _, one, event in lives(store.state) if one == "d1"] == [c.event for c in entry.history]


def test_scopes(store):
    store.approve("d2", "Dr B")
    store.admit("d2", "rule", "p")
    assert [one.id for one in store.state.rubric("case-2").items] == ["d2"]
    assert trained(store) == ["core-1", "d2"]
    assert [one.id for one in store.state.hold_out("case-1").items] == ["held-1"]
    assert store.state.hold_out("case-2").items == ()


def test_every_version_can_be_read_again(store):
    store.approve("d1", "Dr B")
    store.admit("d1", "rule", "p")
    store.measure("d1", Measured(epoch=1, violations=9, judged=40, unjudged=2))
    store.score(Scored(epoch=1, train=0.8, held_out=0.7, samples=40))
    now = read_state(store.path)
    assert (now.version, now.entries, now.scores) == (8, store.state.entries, store.state.scores)
    assert now.entries["d1"].measured[0].rate == 9 / 40
    then = read_state(store.path, version=5)
    assert then.entries["d1"].status is Status.approved
    assert read_state(store.path, version=0).entries == {}
    with pytest.raises(ValueError, match="read_state: version: want 0 to 8; got 9"):
        read_state(store.path, version=9)


def test_store_goes_on_after_it_was_closed(store):
    store.approve("d1", "Dr B")
    store.close()
    with RubricStore(store.path) as again:
        assert again.state.entries == store.state.entries
        again.admit("d1", "rule", "p")
    assert read_state(store.path).version == 6


REFUSED = {
    "core_twice": (lambda s: s.add_core("case-1", [item("x", "More.")], HUMAN), "core: want a set that is fixed once"),
    "hold_out_twice": (
        lambda s: s.hold_out("case-1", [item("x", "More.")], HUMAN),
        "want a set that is fixed",
    ),
    "no_clause": (lambda s: s.add_core("case-9", [], HUMAN), "core: want one clause or more; got none for 'case-9'"),
    "id_twice": (lambda s: s.draft("*", item("d1", "Other."), MODEL), "drafted: want an id used once; got 'd1' again"),
    "hold_out_into_training": (
        lambda s: s.draft("*", item("x", "Explained the next steps!"), MODEL),
        "want a clause not said yet; got 'x', twin of 'held-1' (held_out)",
    ),
    "training_into_hold_out": (
        lambda s: s.hold_out("*", [item("x", "asks for the ONSET")], HUMAN),
        "got 'x', twin of 'core-1' (core)",
    ),
    "edited_into_hold_out": (
        lambda s: s.approve("d1", "Dr B", criterion="Explains the next step."),
        "approved: want a clause not said yet; got 'd1', twin of 'held-1' (held_out)",
    ),
    "admit_unapproved": (
        lambda s: s.admit("d1", "rule", "p"),
        "admitted: want one that is approved; got 'd1', drafted",
    ),
    "exit_core": (lambda s: s.exit("core-1", "rule", "x"), "exited: want one that is active; got 'core-1', core"),
    "approve_hold_out": (lambda s: s.approve("held-1", "Dr B"), "got 'held-1', held_out"),
    "unknown": (lambda s: s.approve("nobody", "Dr B"), "approved: want one that is drafted; got 'nobody', unknown"),
    "nobody_approves": (lambda s: s.approve("d1", ""), "approved: want who did it; got nobody"),
    "rejected_without_reason": (lambda s: s.reject("d1", "Dr B", ""), "rejected: want why; got nothing"),
    "points": (lambda s: s.approve("d1", "Dr B", points=0), "points of 'd1': want a number in [-10, 10], not 0"),
    "author": (
        lambda s: s.draft("*", item("x", "Other."), Provenance(author="robot", by="r")),
        "drafted: provenance: want an author of",
    ),
    "measured_unwatched": (
        lambda s: s.measure("d1", Measured(epoch=1, violations=0, judged=1)),
        "measured: want one that is approved or active or exited; got 'd1', drafted",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_happen_is_refused_and_not_written(store, call, message):
    before, entries = store.path.read_bytes(), dict(store.state.entries)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(store)
    assert store.path.read_bytes() == before
    assert (store.state.version, store.state.entries) == (4, entries)


MEASURED = {
    "more_violations_than_judged": Measured(epoch=2, violations=3, judged=2),
    "same_epoch": Measured(epoch=1, violations=0, judged=2),
}


@pytest.mark.parametrize("found", MEASURED.values(), ids=MEASURED)
def test_measurement_that_cannot_be(store, found):
    store.approve("d1", "Dr B")
    store.measure("d1", Measured(epoch=1, violations=0, judged=2))
    with pytest.raises(ValueError, match="rubric store: measured: want"):
        store.measure("d1", found)


def test_rate_of_nothing_judged_is_none():
    assert Measured(epoch=1, violations=0, judged=0, unjudged=5).rate is None


# -- a kill in the middle ---------------------------------------------------------------------------------------------
def test_event_cut_short_anywhere_is_ignored_and_reported(store):
    store.approve("d1", "Dr B")
    store.close()
    whole = store.path.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    cuts = [last + 1, (last + len(whole)) // 2, len(whole) - 1]
    found = []
    for cut in cuts:
        store.path.write_bytes(whole[:cut])
        assert read_state(store.path).entries["d1"].status is Status.drafted
        with RubricStore(store.path, clock=lambda: "2026-01-01T00:00:04") as again:
            assert again.torn
            again.approve("d1", "Dr B")
        found.append(store.path.read_bytes())
    assert found == [whole] * 3, "the torn event is gone and the next one stands in its place"


def test_damage_elsewhere_is_refused_by_line(store):
    store.close()
    lines = store.path.read_bytes().split(b"\n")
    lines[2] = lines[2][:-5]
    store.path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"rubrics.jsonl:3: want a line as it was written"):
        RubricStore(store.path)


def test_event_that_cannot_have_happened_is_refused_by_line(store):
    store.close()
    lines = store.path.read_bytes().split(b"\n")
    store.path.write_bytes(b"\n".join([*lines[:4], lines[3], *lines[4:]]))
    with pytest.raises(ValueError, match=r"rubrics.jsonl:5: .* want an id used once; got 'd1' again"):
        RubricStore(store.path)


def test_one_writer(store):
    with pytest.raises(ValueError, match="want a journal that no other run is writing"):
        RubricStore(store.path)


def test_file_of_something_else(tmp_path):
    Journal(tmp_path / "log.jsonl", run={"schema": "other"}).close()
    with pytest.raises(ValueError, match=r"got schema = 'm3.rubrics/v1', where the run that began it had 'other'"):
        RubricStore(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"want the journal of .*m3.rubrics/v1.*; got .*other"):
        read_state(tmp_path / "log.jsonl")
    (tmp_path / "notes.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"read_journal: path: want a journal"):
        read_state(tmp_path / "notes.jsonl")


# -- the expert's file ------------------------------------------------------------------------------------------------
def edited(store, tmp_path, **changes):
    path = tmp_path / "pending.json"
    assert write_pending(store, path) == 2
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[0] |= changes
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_pending_file_shows_what_an_expert_needs(store, tmp_path):
    row = json.loads(edited(store, tmp_path).read_text(encoding="utf-8"))[0]
    assert row == {
        "id": "d1",
        "scope": "case-1",
        "criterion": "Blames the patient.",
        "points": -4,
        "drafted_by": "miner-1",
        "samples": ["s1", "s2"],
        "reason": "blames in s1",
        "decision": "",
        "by": "",
        "why": "",
    }


def test_approval_with_an_edit(store, tmp_path):
    path = edited(store, tmp_path, decision="approve", by="Dr B", points=-6, criterion="Blames the patient or family.")
    found = take_decisions(store, path)
    assert (found.approved, found.rejected, found.open, found.earlier) == (("d1",), (), ("d2",), ())
    entry = store.state.entries["d1"]
    assert (entry.status, entry.item.points, entry.item.criterion) == (
        Status.approved,
        -6,
        "Blames the patient or family.",
    )
    assert entry.item.tags == ("axis:a",)
    assert read_state(store.path).entries["d1"] == entry
    assert take_decisions(store, path).earlier == ("d1",), "taken in twice, nothing changes"
    assert store.state.version == 5


def test_rejection(store, tmp_path):
    found = take_decisions(store, edited(store, tmp_path, decision="reject", by="Dr B", why="no sharp boundary"))
    assert found.rejected == ("d1",)
    assert store.state.entries["d1"].history[-1].note == "no sharp boundary"
    with pytest.raises(ValueError, match="twin of 'd1'"):
        store.draft("case-1", item("d9", "Blames the patients"), MODEL)


BAD_FILE = {
    "decision": ({"decision": "yes"}, "draft 1 (d1): decision: want approve, reject or nothing; got 'yes'"),
    "by": ({"decision": "approve"}, "draft 1 (d1): by: want the expert's name; got nothing"),
    "why": ({"decision": "reject", "by": "Dr B"}, "draft 1 (d1): why: want the reason; got nothing"),
    "id": ({"id": "d7"}, "draft 1: id: want that of a draft; got 'd7'"),
    "points": ({"points": "many"}, "draft 1 (d1): RubricItem: points of 'd1': want a number in [-10, 10]"),
    "criterion": ({"criterion": None}, "draft 1 (d1): criterion: want text; got None"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FILE.values(), ids=BAD_FILE)
def test_bad_file_names_draft_and_field_and_decides_nothing(store, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        take_decisions(store, edited(store, tmp_path, **changes))
    assert store.state.version == 4


def test_decisions_are_taken_all_or_none(store, tmp_path):
    path = edited(store, tmp_path, decision="approve", by="Dr B")
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[1] |= {"decision": "approve", "by": "Dr B", "criterion": "Explains the next step."}
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(ValueError, match="got 'd2', twin of 'held-1'"):
        take_decisions(store, path)
    assert store.state.version == read_state(store.path).version == 4


def test_file_that_is_not_json(store, tmp_path):
    (tmp_path / "pending.json").write_text('[\n{"id": }]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"pending.json:2: want JSON"):
        take_decisions(store, tmp_path / "pending.json")
