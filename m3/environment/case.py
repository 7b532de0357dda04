"""A clinical case, schema ``m3.case/v1``: the patient's facts, the checklist, the examinations, the diagnosis.

The shape is a JSON Schema shipped beside this file, checked by a library; what a schema cannot say (ids that exist,
checklist items that can be met, categories of examinations) is checked here. A case is read from a ``.jsonl`` file
(one a line) or a ``.json`` file (one case), and an error names file, line and field.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import json_source_map
import jsonschema

from m3.environment.exams import CATEGORIES
from m3.text.jsonl import read_objects
from m3kernels.checks import refuse

SCHEMA = "m3.case/v1"
SCHEMA_FILE = Path(__file__).parent / "case.schema.json"
OWN_CASES = Path(__file__).parent.parent / "data" / "cases"  # ours: synthetic, written for this project
UNKNOWN_CATEGORY = "unknown"


class Disclosure(enum.StrEnum):
    """When the patient tells a fact."""

    volunteer = "volunteer"  # with the first thing that is asked, or in the opening line
    on_ask = "on_ask"  # to a question about its topic or about itself
    on_specific_ask = "on_specific_ask"  # to a question about itself only


class Phase(enum.StrEnum):
    """The four stages of a consultation, in order (Baichuan-M3, arXiv 2602.06570, on the segmented pipeline)."""

    inquiry = "inquiry"
    differential = "differential"
    lab = "lab"
    diagnosis = "diagnosis"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Persona:
    """How the patient speaks; never what is true."""

    verbosity: str = "plain"
    literacy: str = "average"
    recall: str = "good"
    anxiety: str = "low"
    biases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """One atomic fact. ``keys``: each a few words that together ask for it; ``keywords``: its topics."""

    id: str
    text: str
    section: str
    polarity: str
    disclosure: Disclosure
    lay_text: str = ""
    keywords: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    red_flag: bool = False
    value: tuple[float, str] | None = None  # (number, unit)
    source_span: tuple[int, int] | None = None

    @property
    def said(self) -> str:
        """The patient's words for it."""
        return self.lay_text or self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChecklistItem:
    """One item a good consultation meets (or, with negative points, avoids)."""

    id: str
    criterion: str
    level: int  # 2 is critical
    dimension: str  # S safety, C clarity, A association, N normative protocol
    phase: Phase
    points: int  # -10..10, not 0
    kind: str  # must_ask, must_do, must_not, veto
    facts: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    section: str = ""
    evidence: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exam:
    """An examination that could be ordered, and what it shows."""

    id: str
    name: str
    category: str  # of exams.CATEGORIES, or "unknown"
    need: str  # essential, optional, irrelevant, harmful, unknown
    result: str = ""
    abnormal: bool | None = None
    cost: float | None = None
    loinc: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedLabel:
    """A diagnosis by ICD-10-CM code and name; ``credit`` in (0, 1] where it is an acceptable answer."""

    icd10cm: str | None
    label: str = ""
    credit: float = 1.0
    probability: float | None = None
    must_exclude: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the patient has."""

    icd10cm: str | None
    label: str
    synonyms: tuple[str, ...] = ()
    acceptable: tuple[CodedLabel, ...] = ()
    differential: tuple[CodedLabel, ...] = ()
    severity: int | None = None  # 1 is the most severe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Safety:
    """What must and must not be done, whatever the score."""

    must_escalate: bool | None
    escalation: str = ""
    forbidden_actions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A whole case. ``raw`` is the JSON object it came from; ``Case.from_json(case.raw) == case``."""

    id: str
    version: int
    synthetic: bool
    lang: str
    split: str
    department: str
    dataset: str
    chief_complaint: str
    opening_line: str
    age: float | None
    sex: str
    setting: str
    persona: Persona
    facts: tuple[Fact, ...]
    checklist: tuple[ChecklistItem, ...]
    exams: tuple[Exam, ...]
    diagnosis: Diagnosis
    safety: Safety
    opening_facts: tuple[str, ...] = ()
    snippet: tuple[tuple[str, str], ...] = ()  # (role, content): seen by the physician, not by the patient
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False, hash=False)

    @functools.cached_property
    def fact(self) -> Mapping[str, Fact]:
        """Facts by id."""
        return {fact.id: fact for fact in self.facts}

    def items(self, phase: Phase) -> tuple[ChecklistItem, ...]:
        """The checklist's items of one stage."""
        return tuple(item for item in self.checklist if item.phase == phase)

    def provenance(self, field: str) -> Mapping[str, Any]:
        """Who wrote a field (dotted name): the entry of the longest name that holds it, else that of ``*``."""
        entries: Mapping[str, Any] = self.raw["provenance"]
        parts = field.split(".")
        for n in range(len(parts), 0, -1):
            if (name := ".".join(parts[:n])) in entries:
                return entries[name]
        return entries.get("*", {})

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str = "case") -> Case:
        """A case from its JSON object.

        Raises:
            ValueError: names ``where``, the field, what was wanted and what came.
        """
        return _checked(row, lambda field: where)


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def find_problems(row: Any) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of everything wrong with a case's JSON object; the schema first, then the references."""
    found = sorted(_validator().iter_errors(row), key=lambda error: [str(part) for part in error.absolute_path])
    for error in found:
        yield _dotted(error.absolute_path), error.message[:300]
    if found:
        return
    facts = [fact["id"] for fact in row["facts"]]
    for name in ("facts", "checklist", "exams"):
        ids = [entry["id"] for entry in row[name]]
        for i, one in enumerate(ids):
            if one in ids[:i]:
                yield f"{name}.{i}.id", f"want an id used once; got {one!r} again"
    known = set(facts)
    for i, one in enumerate(row["presentation"].get("facts", ())):
        if one not in known:
            yield f"presentation.facts.{i}", f"want the id of a fact; got {one!r}"
    for i, item in enumerate(row["checklist"]):
        for j, one in enumerate(item.get("facts", ())):
            if one not in known:
                yield f"checklist.{i}.facts.{j}", f"want the id of a fact; got {one!r}"
        wants_positive = item["kind"] in ("must_ask", "must_do")
        if wants_positive != (item["points"] > 0):
            sign = "positive" if wants_positive else "negative"
            yield f"checklist.{i}.points", f"want {sign} points for {item['kind']}; got {item['points']}"
    for i, exam in enumerate(row["exams"]):
        if exam["category"] not in CATEGORIES and exam["category"] != UNKNOWN_CATEGORY:
            yield f"exams.{i}.category", f"want one of the 38 categories or 'unknown'; got {exam['category']!r}"


def read_cases(path: str | Path) -> Iterator[Case]:
    """Cases of a ``.jsonl`` file, a ``.json`` file, or of every such file in a folder, in order of names.

    Raises:
        ValueError: the first broken case, by file, line and field; an id that occurs twice.
        OSError: no such file.
    """
    path = Path(path)
    seen: dict[str, str] = {}
    for file in _files(path):
        for place, case in [_read_one(file)] if file.suffix == ".json" else _read_lines(file):
            if case.id in seen:
                raise ValueError(f"{place}: id: want an id used once; got {case.id!r}, also at {seen[case.id]}")
            seen[case.id] = place
            yield case


def own_cases(split: str | None = None) -> tuple[Case, ...]:
    """The project's own synthetic cases, all or those of one split ("train", "held_out")."""
    if split not in (None, "train", "held_out"):
        raise refuse("own_cases", "split", "'train', 'held_out' or None", repr(split))
    return tuple(case for case in _own() if split in (None, case.split))


@functools.cache
def _own() -> tuple[Case, ...]:
    return tuple(read_cases(OWN_CASES))


def write_cases(path: str | Path, cases: Iterable[Case]) -> int:
    """Write cases as ``.jsonl``, one a line; how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for case in cases:
            file.write(json.dumps(case.raw, ensure_ascii=False) + "\n")
            count += 1
    return count


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if not files:
            raise refuse("read_cases", "path", "a folder with .json or .jsonl files", str(path))
        return files
    return [path]


def _read_lines(file: Path) -> Iterator[tuple[str, Case]]:
    for place, row in read_objects(file):
        yield place, Case.from_json(row, place)


def _read_one(file: Path) -> tuple[str, Case]:
    """The case of a ``.json`` file; an error names the line on which the field stands."""
    text = file.read_text(encoding="utf-8")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: want JSON; {error.msg}") from error
    return f"{file}:1", _checked(row, lambda field: f"{file}:{1 + _line_of(text, field)}")


def _checked(row: Any, place: Callable[[str], str]) -> Case:
    """``place``: where a field stands, by its dotted name."""
    problems = list(find_problems(row))
    if problems:
        field, problem = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{place(field)}: {field}: {problem}{more}")
    return _build(row)


def _line_of(text: str, field: str) -> int:
    """The line, from 0, on which a field of a JSON text stands."""
    pointer = "" if field == "(top)" else "/" + field.replace("~", "~0").replace("/", "~1").replace(".", "/")
    entry = json_source_map.calculate(text).get(pointer)
    return 0 if entry is None else int(entry.value_start.line)


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(str(part) for part in path) or "(top)"


def _coded(row: Mapping[str, Any]) -> CodedLabel:
    return CodedLabel(**row)


def _build(row: Mapping[str, Any]) -> Case:
    shown, profile, diagnosis, safety = row["presentation"], row["profile"], row["diagnosis"], row["safety"]
    persona = dict(profile.get("persona", {}))
    persona["biases"] = tuple(persona.get("biases", ()))
    return Case(
        id=row["id"],
        version=row["version"],
        synthetic=row["synthetic"],
        lang=row["lang"],
        split=row["split"],
        department=row["department"],
        dataset=row["source"]["dataset"],
        chief_complaint=shown["chief_complaint"],
        opening_line=shown["opening_line"],
        opening_facts=tuple(shown.get("facts", ())),
        snippet=tuple((message["role"], message["content"]) for message in shown.get("snippet", ())),
        age=profile["age"],
        sex=profile["sex"],
        setting=profile.get("setting", ""),
        persona=Persona(**persona),
        facts=tuple(_fact(fact) for fact in row["facts"]),
        checklist=tuple(_item(item) for item in row["checklist"]),
        exams=tuple(Exam(**exam) for exam in row["exams"]),
        diagnosis=Diagnosis(
            icd10cm=diagnosis["icd10cm"],
            label=diagnosis["label"],
            synonyms=tuple(diagnosis.get("synonyms", ())),
            acceptable=tuple(_coded(entry) for entry in diagnosis.get("acceptable", ())),
            differential=tuple(_coded(entry) for entry in diagnosis.get("differential", ())),
            severity=diagnosis.get("severity"),
        ),
        safety=Safety(
            must_escalate=safety["must_escalate"],
            escalation=safety.get("escalation", ""),
            forbidden_actions=tuple(safety.get("forbidden_actions", ())),
        ),
        raw=row,
    )


def _fact(row: Mapping[str, Any]) -> Fact:
    fields = dict(row)
    value = fields.pop("value", None)
    span = fields.pop("source_span", None)
    for name in ("keywords", "keys"):
        fields[name] = tuple(fields.get(name, ()))
    fields["disclosure"] = Disclosure(fields["disclosure"])
    return Fact(
        value=None if value is None else (value["number"], value.get("unit", "")),
        source_span=None if span is None else (span[0], span[1]),
        **fields,
    )


def _item(row: Mapping[str, Any]) -> ChecklistItem:
    fields = dict(row)
    for name in ("facts", "keys"):
        fields[name] = tuple(fields.get(name, ()))
    fields["phase"] = Phase(fields["phase"])
    return ChecklistItem(**fields)
