"""K-QA (MIT): patients' questions with physicians' statements, as rows of HealthBench's form.

A statement that an answer must have is a clause of level 2, one that is nice to have of level 1; the weights are ours.
The physicians' own answer is the ideal completion. K-QA's second measure, statements that an answer contradicts, is no
clause: it needs a verdict of contradiction, not of presence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3.environment.converters.drafting import LEVEL_POINTS, digest
from m3.environment.converters.loss import SkippedRow, Tally, field, texts
from m3.rewards.rubric import HealthBenchRow, Rubric, RubricItem

LICENCE = "MIT"
CAVEATS = ("weights of clauses are ours: K-QA counts statements",)
_LISTS = (("Must_have", 2), ("Nice_to_have", 1))
_KEPT = ("Question", "Free_form_answer", "Must_have", "Nice_to_have", "Sources", "ICD_10_diag")


def row_of(row: Mapping[str, Any], tally: Tally) -> HealthBenchRow:
    """A row's rubric; ValueError names the field, SkippedRow the reason."""
    question, answer = field(row, "Question", str).strip(), field(row, "Free_form_answer", str)
    found: dict[str, RubricItem] = {}
    for name, level in _LISTS:
        for text in texts(row, name):
            said, same = text.strip(), digest(text)
            if not said or same in found:
                tally.dropped[f"{name}: {'empty statements' if not said else 'statements that stand there twice'}"] += 1
                continue
            tags = (f"level:{level}", f"kqa:{name.lower()}")
            criterion = f"States that: {said.rstrip('.')}."
            found[same] = RubricItem(id=str(len(found)), criterion=criterion, points=LEVEL_POINTS[level], tags=tags)
            tally.kept[f"({name} statements)"] += 1
    if not found:
        raise SkippedRow("no statements")
    tally.fields(row, _KEPT)
    tally.defaults["rubrics.points: by level"] += len(found)
    tally.provenance["rubrics.criterion (human)"] += 1
    tally.provenance["rubrics.points (rule)"] += 1
    name = f"kqa-{digest(question)}"
    return HealthBenchRow(
        prompt_id=name,
        prompt=({"role": "user", "content": question},),
        rubric=Rubric(tuple(found.values()), id=name),
        example_tags=("dataset:kqa",),
        rest={
            "ideal_completions_data": {"ideal_completion": answer},
            "kqa": {"sources": row.get("Sources"), "icd_10_diag": row.get("ICD_10_diag")},
        },
    )
