"""CRAFT-MD replays (MIT; atomic facts of MediQ, CC BY 4.0): recorded consultations of language models, and their cases.

A row is one trial of one doctor on one case: a trajectory of mode "recorded". The answer and what a recorded grader
said of it stay in its ``meta``. The first row of a case makes the case, from its atomic facts and reference answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from m3.environment.case import Case
from m3.environment.converters.drafting import age_and_sex, case_row, code_of, facts_of, slug
from m3.environment.converters.loss import SkippedRow, Tally, field, texts
from m3.environment.converters.mediq import drafts_of
from m3.environment.trajectory import Trajectory
from m3.evaluate.replay import of_craft_md

LICENCE = "MIT; facts CC BY 4.0"
CAVEATS = ("both speakers are language models; the recorded grader is one too",)
_KEPT = ("case_id", "doctor", "trial", "question", "answer", "facts", "frq", "frq_extracted", "frq_eval", "turns")


def trajectory_of(row: Mapping[str, Any], tally: Tally) -> Trajectory:
    """A row's trajectory; ValueError names the field, SkippedRow the reason."""
    for name in ("case_id", "doctor", "answer", "question"):
        field(row, name, str)
    field(row, "trial", int)
    if row.get("frq", 0) is not None:  # null: the doctor gave no answer
        field(row, "frq", str)
    for i, turn in enumerate(field(row, "turns", list)):
        for name in ("role", "text"):
            if not isinstance(turn, Mapping) or not isinstance(turn.get(name), str):
                raise ValueError(f"turns.{i}.{name}: want text; it is missing")
        if turn["role"] not in ("doctor", "patient"):
            raise ValueError(f"turns.{i}.role: want doctor or patient; got {turn['role']!r}")
    texts(row, "facts")
    if "diagnosis" not in row["question"]:
        raise SkippedRow("the question asks for no diagnosis")
    if _asks_beyond(row["question"]):
        raise SkippedRow("the question asks for more than the diagnosis")
    tally.fields(row, _KEPT)
    found = of_craft_md(row)
    meta = {"question": row["question"], "answer": found.answer, "graded": found.graded}
    if isinstance(row.get("frq_extracted"), str):
        meta["extracted"] = row["frq_extracted"]
    return dataclasses.replace(found.trajectory, case=case_id(row), meta=meta)


def case_of(row: Mapping[str, Any], tally: Tally) -> Case:
    """The case of a row that ``trajectory_of`` accepts."""
    drafts = drafts_of(row["facts"])
    if not drafts:
        raise ValueError("facts: want one or more; got none")
    facts = facts_of(drafts, tally)
    tally.kept["(facts)"] += len(facts)
    opening = next((fact for fact in facts if fact["section"] not in ("demographic", "exam")), facts[0])
    age, sex = age_and_sex(" ".join(draft.text for draft in drafts))
    label = row["answer"].strip()
    return case_row(
        id=case_id(row),
        dataset="CRAFT-MD",
        row=row["case_id"],
        licence=LICENCE,
        synthetic=False,
        complaint=opening["text"],
        opening_facts=[opening["id"]] if opening["section"] != "exam" else [],
        age=age,
        sex=sex,
        facts=facts,
        label=label,
        mapped=code_of(label),
        provenance={
            "facts": {"author": "llm", "note": "MediQ's atomic facts of the vignette; sections and keys by rule"},
            "presentation": {"author": "rule", "note": "the first fact that is no age, sex or finding"},
            "synthetic": {"author": "rule", "note": "false: the source does not say that no patient is behind it"},
        },
        tally=tally,
    )


def case_id(row: Mapping[str, Any]) -> str:
    """The id of a row's case."""
    return f"craft-md-{slug(row['case_id'])}"


def _asks_beyond(question: str) -> bool:
    """Whether a question asks for a finding or treatment of the diagnosis."""
    return any(word in question for word in ("finding", "treatment", "characteristic"))
