"""The rubrics of a training run, versioned: a log of everything that happened to them, from which they are replayed.

The core set of a context is fixed. A dynamic rubric is drafted, approved or rejected by a human expert, admitted to
training, exits when nobody violates it any more, and is revived when somebody does again. A hold-out set is frozen
once and never trained on. Version n is what the first n events give. Source: Baichuan-M3, arXiv 2602.06570, on dynamic
rubric evolution; events, versions and the hold-out set are ours.

A rubric's scope is the context it belongs to (a prompt's or a case's id), or "*", every context.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3.environment.journal import Journal, Sync, read_journal
from m3.rewards.rubric import Rubric, RubricItem
from m3.text.words import stems
from m3kernels.checks import refuse

RUN: Mapping[str, Any] = {"schema": "m3.rubrics/v1"}
EVERYWHERE = "*"
AUTHORS = ("human", "rule", "llm")


class Status(enum.StrEnum):
    """Where a rubric stands."""

    core = "core"  # in training from the first to the last
    held_out = "held_out"  # never in training
    drafted = "drafted"  # waits for an expert
    rejected = "rejected"
    approved = "approved"  # waits for significance
    active = "active"  # in training
    exited = "exited"  # was in training; watched still


MOVES: Mapping[str, tuple[tuple[Status, ...], Status]] = {
    "approved": ((Status.drafted,), Status.approved),
    "rejected": ((Status.drafted,), Status.rejected),
    "admitted": ((Status.approved,), Status.active),
    "exited": ((Status.active,), Status.exited),
    "revived": ((Status.exited,), Status.active),
}
TRAINED = (Status.core, Status.active)
WATCHED = (Status.approved, Status.active, Status.exited)  # whose violation rate is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a rubric comes from. ``samples``: ids of the responses it was drafted from."""

    author: str  # of AUTHORS
    by: str  # a person, a rule or a model, by name
    samples: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """How often current responses violate a rubric, at one epoch; ``unjudged`` responses count for neither."""

    epoch: int
    violations: int
    judged: int
    unjudged: int = 0

    @property
    def rate(self) -> float | None:
        """Of the judged; None where none was."""
        return self.violations / self.judged if self.judged else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One event of a rubric's life; ``version`` is the number of events up to it."""

    version: int
    event: str
    at: str  # ISO 8601, UTC
    by: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One rubric and its life so far."""

    item: RubricItem
    scope: str
    status: Status
    provenance: Provenance
    history: tuple[Change, ...]
    measured: tuple[Measured, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """Mean reward of an epoch's responses by the rubrics in training and by the hold-out set."""

    epoch: int
    train: float
    held_out: float
    samples: int


class State:
    """What the first ``version`` events give. ``entries`` by id, in order of their first event."""

    def __init__(self) -> None:
        self.version = 0
        self.entries: dict[str, Entry] = {}
        self.scores: list[Scored] = []

    def copy(self) -> State:
        """Another, equal to this one."""
        other = State()
        other.version, other.entries, other.scores = self.version, dict(self.entries), list(self.scores)
        return other

    def of(self, *status: Status) -> list[Entry]:
        """Entries that stand there."""
        return [entry for entry in self.entries.values() if entry.status in status]

    def rubric(self, scope: str) -> Rubric:
        """What a context is trained on: its core set and what is active."""
        return self._of_scope(scope, TRAINED)

    def hold_out(self, scope: str) -> Rubric:
        """What a context is never trained on."""
        return self._of_scope(scope, (Status.held_out,))

    def _of_scope(self, scope: str, status: Sequence[Status]) -> Rubric:
        items = (entry.item for entry in self.of(*status) if entry.scope in (scope, EVERYWHERE))
        return Rubric(tuple(items), id=scope)

    def twin(self, item: RubricItem, scope: str) -> Entry | None:
        """An entry, rejected ones too, that says the same in words of the same stems, in a context of this scope."""
        said = stems(item.criterion)
        for entry in self.entries.values():
            meets = entry.scope == scope or EVERYWHERE in (entry.scope, scope)
            if meets and entry.item.id != item.id and stems(entry.item.criterion) == said:
                return entry
        return None

    def apply(self, row: Mapping[str, Any]) -> None:
        """Take in one event; ValueError, and nothing changed, where it cannot happen now."""
        event, change = row["event"], self._change(row)
        if event in ("core", "held_out", "drafted"):
            self._add(row, change)
        elif event in MOVES:
            self._move(row, change)
        elif event == "measured":
            entry = self._entry(row["id"], event, WATCHED)
            found = Measured(**{name: row[name] for name in ("epoch", "violations", "judged", "unjudged")})
            if not 0 <= found.violations <= found.judged or found.unjudged < 0:
                raise refuse("rubric store", event, "0 <= violations <= judged", f"{found}")
            if entry.measured and entry.measured[-1].epoch >= found.epoch:
                raise refuse("rubric store", event, f"an epoch after {entry.measured[-1].epoch}", found.epoch)
            self.entries[row["id"]] = dataclasses.replace(entry, measured=(*entry.measured, found))
        elif event == "scored":
            scored = Scored(**{name: row[name] for name in ("epoch", "train", "held_out", "samples")})
            if self.scores and self.scores[-1].epoch >= scored.epoch:
                raise refuse("rubric store", event, f"an epoch after {self.scores[-1].epoch}", scored.epoch)
            self.scores.append(scored)
        else:
            raise refuse("rubric store", "event", "a known one", repr(event))
        self.version += 1

    def _change(self, row: Mapping[str, Any]) -> Change:
        return Change(
            version=self.version + 1,
            event=row["event"],
            at=row["at"],
            by=row.get("by", ""),
            note=row.get("note", ""),
        )

    def _entry(self, one: str, event: str, status: Sequence[Status]) -> Entry:
        entry = self.entries.get(one)
        if entry is None or entry.status not in status:
            want = f"one that is {' or '.join(status)}"
            raise refuse("rubric store", event, want, f"{one!r}, {entry.status if entry else 'unknown'}")
        return entry

    def _add(self, row: Mapping[str, Any], change: Change) -> None:
        event, scope = row["event"], row["scope"]
        status = Status(event)
        if status is not Status.drafted and any(e.status is status and e.scope == scope for e in self.entries.values()):
            raise refuse("rubric store", event, "a set that is fixed once", f"another for {scope!r}")
        provenance = Provenance(**{**row["provenance"], "samples": tuple(row["provenance"]["samples"])})
        if provenance.author not in AUTHORS or not provenance.by:
            raise refuse("rubric store", f"{event}: provenance", f"an author of {AUTHORS} and a name", f"{provenance}")
        added: dict[str, Entry] = {}
        for fields in row["items"]:
            item = RubricItem(**{**fields, "tags": tuple(fields["tags"])})
            if item.id in self.entries or item.id in added:
                raise refuse("rubric store", event, "an id used once", f"{item.id!r} again")
            self._refuse_twin(item, scope, event)
            added[item.id] = Entry(item=item, scope=scope, status=status, provenance=provenance, history=(change,))
        if not added:
            raise refuse("rubric store", event, "one clause or more", f"none for {scope!r}")
        self.entries.update(added)

    def _refuse_twin(self, item: RubricItem, scope: str, event: str) -> None:
        twin = self.twin(item, scope)
        if twin is not None:
            what = f"{item.id!r}, twin of {twin.item.id!r} ({twin.status})"
            raise refuse("rubric store", event, "a clause not said yet", what)

    def _move(self, row: Mapping[str, Any], change: Change) -> None:
        before, after = MOVES[row["event"]]
        entry = self._entry(row["id"], row["event"], before)
        if not change.by:
            raise refuse("rubric store", row["event"], "who did it", "nobody")
        if after is Status.rejected and not change.note:
            raise refuse("rubric store", "rejected", "why", "nothing")
        item = dataclasses.replace(entry.item, **row.get("edited", {}))
        if item != entry.item:
            self._refuse_twin(item, entry.scope, row["event"])
        self.entries[row["id"]] = dataclasses.replace(entry, item=item, status=after, history=(*entry.history, change))


class RubricStore:
    """The log, open for writing by this process alone, and its state.

    Args:
        path: a journal (m3/environment/journal.py), new or of a store.
        clock: the time of an event, ISO 8601; the default is now, in UTC.
    Attributes:
        torn: whether a last event that a kill cut short was dropped at opening.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], str] | None = None) -> None:
        self._clock = clock or (lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        self._journal = Journal(path, run=RUN, sync=Sync.each)
        self.path, self.torn = self._journal.path, self._journal.cut_bytes > 0
        try:
            self.state = replay([record["event"] for record in self._journal.records()], where=str(path))
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> RubricStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        self._journal.close()

    def add_core(self, scope: str, items: Sequence[RubricItem], provenance: Provenance) -> None:
        """Fix the core set of a context, once."""
        self._add("core", scope, items, provenance)

    def hold_out(self, scope: str, items: Sequence[RubricItem], provenance: Provenance) -> None:
        """Freeze the hold-out set of a context, once."""
        self._add("held_out", scope, items, provenance)

    def draft(self, scope: str, item: RubricItem, provenance: Provenance) -> None:
        """A candidate, for an expert to decide on."""
        self._add("drafted", scope, [item], provenance)

    def approve(
        self, one: str, by: str, *, note: str = "", criterion: str | None = None, points: float | None = None
    ) -> None:
        """An expert's yes, with the clause as the expert edited it."""
        self._record(_approval(one, by, note, criterion, points))

    def reject(self, one: str, by: str, why: str) -> None:
        """An expert's no."""
        self._record({"event": "rejected", "id": one, "by": by, "note": why})

    def admit(self, one: str, by: str, note: str) -> None:
        """Into training."""
        self._record({"event": "admitted", "id": one, "by": by, "note": note})

    def exit(self, one: str, by: str, note: str) -> None:
        """Out of training, watched still."""
        self._record({"event": "exited", "id": one, "by": by, "note": note})

    def revive(self, one: str, by: str, note: str) -> None:
        """Back into training."""
        self._record({"event": "revived", "id": one, "by": by, "note": note})

    def measure(self, one: str, found: Measured) -> None:
        """How often it was violated."""
        self._record({"event": "measured", "id": one, **dataclasses.asdict(found)})

    def score(self, found: Scored) -> None:
        """An epoch's mean rewards."""
        self._record({"event": "scored", **dataclasses.asdict(found)})

    def _add(self, event: str, scope: str, items: Sequence[RubricItem], provenance: Provenance) -> None:
        rows = [dataclasses.asdict(item) for item in items]
        origin = dataclasses.asdict(provenance)
        self._record({"event": event, "scope": scope, "items": rows, "provenance": origin})

    def _record(self, *events: Mapping[str, Any]) -> None:
        """Write events down, all or, where one cannot happen, none."""
        at = self._clock()
        rows = [{**event, "at": at} for event in events]
        after = self.state.copy()
        for row in rows:
            after.apply(row)
        for row in rows:
            self._journal.append({"kind": "event", "event": row})
        self.state = after


def _approval(one: str, by: str, note: str, criterion: str | None, points: float | None) -> dict[str, Any]:
    edited = {name: value for name, value in (("criterion", criterion), ("points", points)) if value is not None}
    return {"event": "approved", "id": one, "by": by, "note": note, **({"edited": edited} if edited else {})}


def read_state(path: str | Path, version: int | None = None) -> State:
    """A store as it is, or as it was after so many events, without opening it for writing.

    Raises:
        ValueError: not a store, an event that cannot have happened (by line), or fewer events.
    """
    run, records = read_journal(path)
    if run != dict(RUN):
        raise refuse("read_state", "path", f"the journal of {dict(RUN)}", f"{path}, of {run}")
    if version is not None and not 0 <= version <= len(records):
        raise refuse("read_state", "version", f"0 to {len(records)}", version)
    return replay([record["event"] for record in records[:version]], where=str(path))


def replay(rows: Sequence[Mapping[str, Any]], *, where: str = "rubrics") -> State:
    """The state that events give; ValueError names the line of one that cannot have happened or is malformed."""
    state = State()
    for line, row in enumerate(rows, 2):  # line 1 is the header
        try:
            state.apply(row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}:{line}: want an event's fields; missing or malformed: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}:{line}: {error}") from error
    return state


# -- what waits for an expert -----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decided:
    """Ids by what became of them. ``open``: no decision in the file; ``earlier``: decided before."""

    approved: tuple[str, ...]
    rejected: tuple[str, ...]
    open: tuple[str, ...]
    earlier: tuple[str, ...]


def write_pending(store: RubricStore, path: str | Path) -> int:
    """Write the drafts for an expert to edit: fill in "decision" (approve or reject), "by" and "why"; how many."""
    rows = [
        {
            "id": entry.item.id,
            "scope": entry.scope,
            "criterion": entry.item.criterion,
            "points": entry.item.points,
            "drafted_by": entry.provenance.by,
            "samples": list(entry.provenance.samples),
            "reason": entry.provenance.note,
            "decision": "",
            "by": "",
            "why": "",
        }
        for entry in store.state.of(Status.drafted)
    ]
    Path(path).write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return len(rows)


def take_decisions(store: RubricStore, path: str | Path) -> Decided:
    """Take in a file of drafts that an expert has edited; clause and points count as they stand in the file.

    The whole file is checked first; taking it in twice changes nothing.

    Raises:
        ValueError: names the file, the draft and the field.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: want JSON; {error.msg}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: want a list of drafts; got {type(rows).__name__}")
    found: dict[str, list[str]] = {"approve": [], "reject": [], "": [], "earlier": []}
    edited: dict[str, RubricItem] = {}
    for number, row in enumerate(rows):
        place = f"{path}: draft {number + 1}"
        if not isinstance(row, dict) or row.get("id") not in store.state.entries:
            raise ValueError(
                f"{place}: id: want that of a draft; got {row.get('id') if isinstance(row, dict) else row!r}"
            )
        one, decision = row["id"], row.get("decision")
        place += f" ({one})"
        if decision not in ("approve", "reject", ""):
            raise ValueError(f"{place}: decision: want approve, reject or nothing; got {decision!r}")
        if decision and not row.get("by"):
            raise ValueError(f"{place}: by: want the expert's name; got nothing")
        if decision == "reject" and not row.get("why"):
            raise ValueError(f"{place}: why: want the reason; got nothing")
        entry = store.state.entries[one]
        criterion: Any = row.get("criterion")
        points: Any = row.get("points")
        if not isinstance(criterion, str):
            raise ValueError(f"{place}: criterion: want text; got {criterion!r}")
        try:
            edited[one] = RubricItem(id=one, criterion=criterion, points=points, tags=entry.item.tags)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        found["earlier" if entry.status is not Status.drafted else decision].append(one)
    by_id = {row["id"]: row for row in rows}
    events: list[Mapping[str, Any]] = []
    for one in found["approve"]:
        row, old, item = by_id[one], store.state.entries[one].item, edited[one]
        criterion = item.criterion if item.criterion != old.criterion else None
        points = item.points if item.points != old.points else None
        events.append(_approval(one, row["by"], row.get("why", ""), criterion, points))
    for one in found["reject"]:
        events.append({"event": "rejected", "id": one, "by": by_id[one]["by"], "note": by_id[one]["why"]})
    store._record(*events)
    approved, rejected, left, earlier = (tuple(found[name]) for name in ("approve", "reject", "", "earlier"))
    return Decided(approved=approved, rejected=rejected, open=left, earlier=earlier)


def lives(state: State) -> list[tuple[int, str, str]]:
    """(version, id, event) of every change, in order: the log of births, deaths and revivals."""
    changes = itertools.chain.from_iterable(
        ((change.version, one, change.event) for change in entry.history) for one, entry in state.entries.items()
    )
    return sorted(changes)
