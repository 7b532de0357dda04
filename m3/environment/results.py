"""What the examinations that a physician orders show: the case's results, and nothing that is not recorded.

An order is one line of the physician's message ("- 12-lead ECG", "2. Troponin"). It is answered by

- ``result``: the case's examination of that name, with what it shows;
- ``finding``: findings of a physical examination that the case records as facts (section "exam");
- ``unrecorded``: the case knows the examination and records no result;
- ``unknown test``: no examination of the case: said so, no value is invented.

Which examination of the case an order names: all content words of the shorter of the two names are in the other, the
closest first. Scoring of orders is not here (rewards/exam_choice.py).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from m3.environment.asking import asked
from m3.environment.case import Case, Exam
from m3.text.words import content_stems

MAX_ORDERS = 100  # ours: more lines than there are kinds of test
_MARK = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,3}[.):])\s+(.+)$")
_DETAIL = frozenset(
    content_stems("test blood serum plasma level levels urgent panel profile scan exam examination 12-lead")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Of one order. ``exam``: id of the case's examination; ``facts``: ids of findings."""

    order: str
    event: str  # "result", "finding", "unrecorded", "unknown test"
    text: str = ""
    exam: str = ""
    facts: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """One line for the physician."""
        if self.event == "unknown test":
            return f"- {self.order}: unknown test, not done."
        return f"- {self.order}: {self.text or 'done, no result recorded.'}"

    def to_json(self) -> dict[str, Any]:
        """For the side-record of a message."""
        return {"order": self.order, "event": self.event, "exam": self.exam, "facts": list(self.facts)}


def read_order_lines(text: str) -> list[str]:
    """The orders of a message: its list items in order, each once; without any list, its lines that ask nothing."""
    lines = [match.group(1).strip() for line in text.splitlines() if (match := _MARK.match(line))]
    return list(dict.fromkeys(line.rstrip(" .;") for line in lines if line.strip(" .;")))[:MAX_ORDERS]


def answer_orders(case: Case, text: str) -> list[Result]:
    """A result for each order of a message, in order."""
    return [_answer(case, order) for order in read_order_lines(text)]


def _answer(case: Case, order: str) -> Result:
    exam = find_exam(case, order)
    if exam is not None:
        event = "result" if exam.result else "unrecorded"
        return Result(order=order, event=event, text=exam.result, exam=exam.id)
    findings = [
        case.fact[one]
        for ask in asked(case, f"Examine: {order}?")
        for one in ask.fact_ids
        if case.fact[one].section == "exam"
    ]
    if findings:
        texts = " ".join(fact.text for fact in findings)
        return Result(order=order, event="finding", text=texts, facts=tuple(fact.id for fact in findings))
    return Result(order=order, event="unknown test")


def find_exam(case: Case, order: str) -> Exam | None:
    """The case's examination that an order names, or None."""
    wanted = _words(order)
    best: tuple[float, Exam] | None = None
    for exam in case.exams:
        have = _words(exam.name)
        common = wanted & have
        if not common or common not in (wanted, have):
            continue
        closeness = len(common) / len(wanted | have)
        if best is None or closeness > best[0]:
            best = (closeness, exam)
    return best[1] if best else None


def _words(name: str) -> frozenset[str]:
    stems = frozenset(content_stems(name))
    return stems - _DETAIL or stems
