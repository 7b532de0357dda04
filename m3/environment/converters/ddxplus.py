"""DDXPlus's conditions and evidences (CC BY 4.0) as a structured environment: patients are sampled here, none is real.

``release_conditions.json`` names each condition's symptoms and antecedents, ``release_evidences.json`` asks for each in
English and lists its values. The release gives no probabilities (they are in its patients, which are not read), so the
sampler is ours and its cases are marked: each symptom of the condition is present with one probability, each antecedent
with another, independently, a value uniform among those that are not the default. A detail ("where is the pain?") is
asked only where what it is a detail of ("do you have pain?") is present. Every other question of DDXPlus has a denial
for its fact: the world is closed, as in DDXPlus, and a patient can answer all of its questions.

The checklist asks for the condition's evidences; that a symptom is level 2 and an antecedent 1 is ours. Cases of one
condition are all in one split (drafting.split_of): held-out cases are of held-out conditions.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from m3.environment import icd10
from m3.environment.case import Case, Disclosure
from m3.environment.converters.drafting import EXACT, LEVEL_POINTS, Draft, Mapped, case_row, facts_of, slug
from m3.environment.converters.loss import SkippedRow, Tally, field
from m3.rewards import diagnosis
from m3kernels.checks import refuse

LICENCE = "CC BY 4.0"
CAVEATS = ("cases are sampled by rule and synthetic: their frequencies mean nothing",)
CONDITIONS, EVIDENCES = "release_conditions.json", "release_evidences.json"
_KEPT = ("cond-name-eng", "icd10-id", "symptoms", "antecedents", "severity")
_YES, _NO = ("Y", "O"), ("N", "NA")
_DEFAULTS = ("NA", "N", "nowhere")  # values that say that there is nothing
_ASKS = re.compile(r"^(do|did|have|are|were|can|could) you\b\s*(.*?)\s*\?*$", re.IGNORECASE)
_MINE = {"you": "I", "your": "my", "yourself": "myself", "yours": "mine"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Of the sampler; the release gives no frequencies, all ours."""

    cases_per_condition: int = 4
    symptom: float = 0.7  # probability that a symptom of the condition is present
    antecedent: float = 0.3  # probability that an antecedent is
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("symptom", "antecedent"):
            if not 0 <= getattr(self, name) <= 1:
                raise refuse("ddxplus.Config", name, "a probability in [0, 1]", getattr(self, name))
        if self.cases_per_condition < 1:
            raise refuse("ddxplus.Config", "cases_per_condition", "1 or more", self.cases_per_condition)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """One question. ``parent``: the evidence it is a detail of, itself for a question of its own."""

    name: str
    parent: str
    question: str
    kind: str  # B binary, C one of values, M some of values
    values: tuple[str, ...]  # English, without those that say that there is nothing
    antecedent: bool


def read_evidences(folder: Path) -> dict[str, Evidence]:
    """Evidences by name; ValueError names file and field."""
    found = {}
    for name, row in _read(folder / EVIDENCES).items():
        try:
            meaning = field(row, "value_meaning", dict)
            values = [meaning[one]["en"] if one in meaning else str(one) for one in field(row, "possible-values", list)]
            found[name] = Evidence(
                name=name,
                parent=field(row, "code_question", str),
                question=field(row, "question_en", str).strip(),
                kind=field(row, "data_type", str),
                values=tuple(value for value in values if value not in _DEFAULTS),
                antecedent=bool(row.get("is_antecedent")),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / EVIDENCES}: {name}: {error}") from error
    return found


def rows(folder: Path, config: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of each case to sample: the release's conditions in order, once for each number of a case."""
    conditions = _read(folder / CONDITIONS)
    for number in range(config.cases_per_condition):
        for name, row in conditions.items():
            yield f"{folder / CONDITIONS}: {name}", {"condition": row, "number": number}


def case_of(row: Mapping[str, Any], evidences: Mapping[str, Evidence], config: Config, tally: Tally) -> Case:
    """A sampled case of a condition; ValueError names the field."""
    condition, number = field(row, "condition", dict), field(row, "number", int)
    label = field(condition, "cond-name-eng", str).strip()
    symptoms = list(field(condition, "symptoms", dict))
    antecedents = list(field(condition, "antecedents", dict))
    for name in (*symptoms, *antecedents):
        if name not in evidences:
            raise ValueError(f"symptoms: want names of evidences; got {name!r}")
    name = f"ddxplus-{slug(label)}-{number + 1}"
    found = sampled(symptoms, antecedents, evidences, config, random.Random(f"{config.seed}/{name}"))
    opening = next((one for one in symptoms if found.get(one) and evidences[one].kind == "B"), None)
    if opening is None:
        opening = next((one for one in symptoms if found.get(one)), None)
    if opening is None:
        raise SkippedRow("no symptom was sampled")
    tally.fields(condition, _KEPT)
    drafts = [_draft(evidences[one], values, one == opening) for one, values in found.items()]
    closed = [one for one in evidences.values() if one.parent == one.name and one.name not in found]
    drafts += [_draft(one, (), False) for one in closed]
    facts = facts_of(drafts, tally)
    known = {fact["id"]: fact for fact in facts}
    tally.kept["(facts)"] += len(facts)
    mapped, others = _codes(condition, label, tally)
    complaint = known[slug(opening)].get("lay_text", known[slug(opening)]["text"])
    severity = condition.get("severity")
    asked = [one for one in (*symptoms, *antecedents) if one in found and slug(one) in known]
    tally.defaults["checklist.level: symptom 2, antecedent 1; points by level"] += len(asked)
    return case_row(
        id=name,
        dataset="DDXPlus (sampled)",
        row=f"{label} {number + 1}",
        licence=LICENCE,
        synthetic=True,
        complaint=complaint,
        opening_facts=[slug(opening)],
        age=None,
        sex="unknown",
        facts=facts,
        label=label,
        mapped=mapped,
        more_diagnosis={
            **({"acceptable": [{"icd10cm": one, "credit": 1.0} for one in others]} if others else {}),
            **({"severity": severity} if severity in range(1, 6) else {}),
        },
        checklist=[_item(evidences[one], one in symptoms) for one in asked],
        provenance={
            "facts": {"author": "rule", "note": f"sampled, seed {config.seed}; questions are DDXPlus's"},
            "checklist": {"author": "rule", "note": "the condition's evidences; levels and points are ours"},
            "diagnosis": {"author": "human", "note": "DDXPlus's conditions, codes and severity"},
        },
        tally=tally,
    )


def sampled(
    symptoms: list[str], antecedents: list[str], evidences: Mapping[str, Evidence], config: Config, draw: random.Random
) -> dict[str, tuple[str, ...]]:
    """Values of each evidence of a condition that the patient can be asked for: () where it is absent.

    Details come after what they are details of, which is present if one of them is to be.
    """
    found: dict[str, tuple[str, ...]] = {}
    chances = {**dict.fromkeys(antecedents, config.antecedent), **dict.fromkeys(symptoms, config.symptom)}
    first = [one for one in chances if evidences[one].parent == one or evidences[one].parent not in chances]
    for one in first:
        present = draw.random() < chances[one]
        found[one] = _values(evidences[one], draw) if present else ()
    for one in chances:
        if one not in found and found.get(evidences[one].parent):
            found[one] = _values(evidences[one], draw)  # a detail of what is present has a value
    return found


def _values(evidence: Evidence, draw: random.Random) -> tuple[str, ...]:
    """One value, or of a question with several answers one to three."""
    if evidence.kind == "B" or not evidence.values:
        return ("Y",)
    count = 1 if evidence.kind == "C" else draw.randint(1, min(3, len(evidence.values)))
    return tuple(draw.sample(evidence.values, count))


def _draft(evidence: Evidence, values: tuple[str, ...], opening: bool) -> Draft:
    absent = not values or all(value in _NO for value in values)
    yes = bool(values) and all(value in _YES for value in values)
    answer = "No" if absent else "Yes" if yes else ", ".join(values)
    question = evidence.question.rstrip(" :?")
    return Draft(
        id=slug(evidence.name),
        text=f"{question}? {answer}.",
        lay_text=said(evidence.question, yes) if absent or yes else f"{_mine(question)}: {answer}.",
        section="PMH" if evidence.antecedent else "HPI",
        polarity="absent" if absent else "present",
        disclosure=Disclosure.volunteer if opening else Disclosure.on_ask,
    )


def said(question: str, yes: bool) -> str:
    """A yes or no in full: "Do you have a fever?" is answered "Yes, I do have a fever."; others are said back."""
    match = _ASKS.match(question)
    if match is None:
        return f"{_mine(question.rstrip(' :?'))}: {'yes' if yes else 'no'}."
    verb = {"are": "am", "were": "was"}.get(match[1].lower(), match[1].lower())
    return f"{'Yes' if yes else 'No'}, I {verb}{'' if yes else ' not'} {_mine(match[2])}."


def _mine(text: str) -> str:
    return re.sub(r"\b(?:you|your|yourself|yours)\b", lambda found: _MINE[found[0].lower()], text, flags=re.IGNORECASE)


def _item(evidence: Evidence, symptom: bool) -> dict[str, Any]:
    level = 2 if symptom else 1
    return {
        "id": f"c-{slug(evidence.name)}",
        "criterion": f"Asks: {evidence.question}",
        "level": level,
        "dimension": "C" if symptom else "A",
        "facts": [slug(evidence.name)],
        "phase": "inquiry",
        "points": LEVEL_POINTS[level],
        "kind": "must_ask",
        "section": "HPI" if symptom else "PMH",
    }


def _codes(condition: Mapping[str, Any], label: str, tally: Tally) -> tuple[Mapped, list[str]]:
    """The condition's code as the release of ICD-10-CM writes it, and further ones that the condition lists.

    Of several, one for diseases that are classified elsewhere comes last. Where the label's own words are those of
    another category, the source contradicts itself: no code, and a warning.
    """
    tree = icd10.tree()
    written = [part.strip() for part in field(condition, "icd10-id", str).split(",") if part.strip()]
    codes = [code for part in written if (code := tree.nearest(part)) is not None]
    codes.sort(key=lambda code: "classified elsewhere" in tree.describe(code))
    if not codes:
        tally.warnings[f"{label}: no code {written} in ICD-10-CM"] += 1
        return Mapped(code=None, note=f"{written} is no code of ICD-10-CM"), []
    named, _ = diagnosis.look_up(label, EXACT)
    said = set(diagnosis.words_of(label)) <= {
        word for code in codes for word in diagnosis.words_of(tree.describe(code))
    }
    if named and not said and tree.category(named) not in {tree.category(code) for code in codes}:
        what = f"the source says {', '.join(codes)} ({tree.describe(codes[0])}); its label is {named}"
        tally.warnings[f"{label}: {what}: no code"] += 1
        return Mapped(code=None, note=what), []
    return Mapped(code=codes[0], note=f"mapped_by: the source's {', '.join(written)}", confidence=1.0), codes[1:]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: want JSON; {error.msg}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: want an object by name; got {type(found).__name__}")
    return found
