"""PriMock57 (CC BY 4.0): mock consultations of primary care with clinicians' checklists.

A consultation becomes a trajectory of mode "recorded" and a case whose checklist is that of Clinician_1: critical is
level 2, non_critical level 1, irrelevant is dropped. An item of the history is a fact as well, polarity by its words;
one of the introduction is met by the physician's words alone. The label is the impression in the clinician's note; a
consultation whose note has none is skipped. No age and sex are given. Points and dimensions are ours.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from m3.environment.case import Case
from m3.environment.converters.drafting import (
    LEVEL_POINTS,
    Draft,
    case_row,
    code_of,
    digest,
    facts_of,
    keys_of,
    says_nothing,
    slug,
    told_by,
)
from m3.environment.converters.loss import SkippedRow, Tally, field
from m3.environment.trajectory import Trajectory
from m3.evaluate.replay import recorded_messages

LICENCE = "CC BY 4.0"
CAVEATS = (
    "checklists list what was elicited in that very consultation: human coverage is complete by construction, so no"
    " comparison with clinicians can be made on them",
    "patients are actors or doctors acting",
)
_KEPT = ("id", "presenting_complaint", "turns", "checklists.Clinician_1")
_IMPRESSION = re.compile(r"^\s*(d?dx|imp(?:ression)?|diagnos[ie]s|∆+)\s*[:;\-]\s*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_HEDGE = re.compile(r"^(?:probable|probably|possible|possibly|likely|suspected)\s+", re.IGNORECASE)
_LEVELS = {"critical": 2, "non_critical": 1}
_SECTIONS = {"sh": "SH", "dh": "DH", "dhx": "DH", "pmh": "PMH", "fh": "FH", "o/e": "exam", "ros": "ROS", "ob": "OB"}
_INTRODUCTION = ("introduction", "none", "")
_DIMENSIONS = {"HPI": "C", "exam": "C"}  # clarity of the complaint; the rest of the history: association


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One entry of a clinician's list. ``path``: the entries above it and itself, for it may be a word only."""

    path: tuple[str, ...]
    section: str  # "" for the introduction
    level: int

    @property
    def text(self) -> str:
        """The entry in its context."""
        return ": ".join(self.path)


def converted(row: Mapping[str, Any], tally: Tally) -> tuple[Case, Trajectory]:
    """A row's case and trajectory; ValueError names the field, SkippedRow the reason."""
    name, complaint = field(row, "id", str), field(row, "presenting_complaint", str).strip()
    turns = list(_turns(row))
    if not turns:
        raise SkippedRow("no transcript")
    labels = impression(field(row, "note", str))
    if not labels:
        raise SkippedRow("the clinician's note names no impression")
    tally.fields(row, _KEPT)
    tally.kept["note (the impression alone)"] += 1
    tally.dropped["turns.start, turns.end"] += len(turns)
    items = list(_items(row, tally))
    history = [item for item in items if item.section]
    drafts = [Draft(text=item.text, section=item.section, polarity=_polarity(item.path[-1])) for item in history]
    facts = facts_of(drafts, tally)
    by_text = {digest(fact["text"]): fact["id"] for fact in facts}
    if not facts:
        tally.warnings["no list of Clinician_1: a case without facts or checklist"] += 1
    case = slug(name)
    return (
        case_row(
            id=case,
            dataset="PriMock57",
            row=name,
            licence=LICENCE,
            synthetic=True,
            complaint=complaint,
            opening_facts=told_by(complaint, facts),
            age=None,
            sex="unknown",
            department="general_practice",
            facts=facts,
            label=labels[0],
            mapped=code_of(labels[0]),
            more_diagnosis={"differential": [{"icd10cm": code_of(one).code, "label": one} for one in labels[1:]]},
            checklist=_checklist(items, by_text, facts, tally),
            provenance={
                "facts": {"author": "human", "note": "Clinician_1's list; polarity and keys by rule"},
                "checklist": {"author": "human", "note": "Clinician_1's list of what was elicited; level graded"},
                "checklist.points": {"author": "rule", "note": "ours, by level"},
                "checklist.dimension": {"author": "rule", "note": "ours, by section"},
                "diagnosis": {"author": "human", "note": "the impression in the clinician's note"},
            },
            tally=tally,
        ),
        Trajectory(
            case=case,
            case_version=1,
            policy="clinician",
            seed=0,
            mode="recorded",
            messages=recorded_messages(turns),
        ),
    )


def impression(note: str) -> list[str]:
    """Labels that a note gives under "Imp" or "DDx", the likeliest first; [] where it gives none."""
    match = _IMPRESSION.search(note)
    if not match:
        return []
    said = re.split(r"\.\s|\.$", match[2].strip())[0]
    parts = re.split(r",\s*|\s+vs\.?\s+", said) if match[1].lower() == "ddx" else [said]
    return [label for part in parts if (label := _HEDGE.sub("", part.strip(" ?.\t")))]


def _turns(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for i, turn in enumerate(field(row, "turns", list)):
        for name in ("role", "text"):
            if not isinstance(turn, Mapping) or not isinstance(turn.get(name), str):
                raise ValueError(f"turns.{i}.{name}: want text; it is missing")
        if turn["role"] not in ("doctor", "patient"):
            raise ValueError(f"turns.{i}.role: want doctor or patient; got {turn['role']!r}")
        yield turn["role"], turn["text"]


def _items(row: Mapping[str, Any], tally: Tally) -> Iterator[Item]:
    if "Clinician_1" not in field(row, "checklists", dict):
        return
    above: list[str] = []
    for i, entry in enumerate(field(row, "checklists.Clinician_1", list)):
        where = f"checklists.Clinician_1.{i}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: want an object; got {type(entry).__name__}")
        text, depth, level = (
            field(entry, name, kind) for name, kind in (("text", str), ("depth", int), ("level", str))
        )
        if level not in (*_LEVELS, "irrelevant"):
            raise ValueError(f"{where}.level: want critical, non_critical or irrelevant; got {level!r}")
        above = [*above[:depth], text.strip()]
        if level == "irrelevant" or says_nothing(text):
            tally.dropped[f"checklists.Clinician_1: {'irrelevant' if level == 'irrelevant' else 'empty'} items"] += 1
            continue
        tally.kept[f"checklists.Clinician_1: {level} items"] += 1
        name = str(entry.get("section") or "").strip().lower()
        section = "" if name in _INTRODUCTION else _SECTIONS.get(name, "HPI")
        yield Item(path=tuple(above), section=section, level=_LEVELS[level])


def _polarity(text: str) -> str:
    """Of the entry itself: those above it say what it belongs to."""
    return "absent" if re.match(r"(?:no|not|nor|nil|none|never|denies|cant|doesnt|nkda)\b", text.lower()) else "present"


def _checklist(
    items: list[Item], by_text: Mapping[str, str], facts: list[dict[str, Any]], tally: Tally
) -> list[dict[str, Any]]:
    known = {fact["id"]: fact for fact in facts}
    keys = keys_of([item.text for item in items])
    found: dict[str, dict[str, Any]] = {}
    for n, (item, ways) in enumerate(zip(items, keys, strict=True), 1):
        fact = by_text.get(digest(item.text)) if item.section else None
        row: dict[str, Any] = {
            "id": f"c{n}",
            "criterion": f"Elicits: {item.text}." if item.section else f"In the introduction: {item.text}.",
            "level": item.level,
            "dimension": _DIMENSIONS.get(item.section, "A") if item.section else "N",
            "phase": "inquiry",
            "points": LEVEL_POINTS[item.level],
            "kind": "must_ask" if item.section else "must_do",
        }
        if item.section:
            row["section"] = item.section
        if fact is not None and known[fact]["section"] != "exam":
            row["facts"] = [fact]
        elif ways:
            row["keys"] = ways
        if (same := digest(item.text)) in found:
            tally.dropped["checklists.Clinician_1: items that stand there twice"] += 1
        else:
            found[same] = row
    tally.defaults["checklist.points: by level; checklist.dimension: by section"] += len(found)
    return list(found.values())
