"""The reward of ordering examinations: weighted F1 over the 38 categories, essential ones weighing more.

    recall    = sum of w over the wanted categories that were ordered / sum of w over all wanted ones
    precision = wanted ordered / (wanted ordered + irrelevant + unknown + h * harmful)
    F1        = 2 precision recall / (precision + recall)

A category is wanted where the case has an examination of it that is essential (w = 3) or optional (w = 1); every other
category is irrelevant. An order is first sought among the case's examinations by its name: so an examination that the
case calls irrelevant or harmful is that, whatever else its category holds. Several orders of one category count once.
Source: ScanBench's second station, Baichuan-M3, arXiv 2602.06570 (38 categories, weighted F1, recall of essential tests
weighs more than of optional ones); it gives no weights: all numbers are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from m3.environment.case import UNKNOWN_CATEGORY, Case
from m3.environment.exams import CATEGORIES, categories
from m3.environment.results import find_exam
from m3kernels.checks import refuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """One examination ordered. ``categories``: of its name, several for a panel; () where no rule knows it."""

    text: str
    categories: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Weights; all ours."""

    essential: float = 3.0
    optional: float = 1.0
    harmful: float = 3.0  # irrelevant categories that a harmful one outweighs
    unknown: float = 1.0  # likewise of an order that names no known examination

    def __post_init__(self) -> None:
        if not math.inf > self.essential > self.optional > 0:
            raise refuse("exam_choice.Config", "essential", "essential > optional > 0, finite", str(self))
        if not (1 <= self.harmful < math.inf and 0 <= self.unknown < math.inf):
            raise refuse("exam_choice.Config", "harmful", "harmful >= 1 and unknown >= 0, finite", str(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Categories ordered, by what the case says of them, each once, in the order of the orders.

    A case's examination without a category stands by its id. ``unjudged``: the case has it and does not say its need.
    """

    essential: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    irrelevant: tuple[str, ...] = ()
    harmful: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()  # texts of orders that name no known examination


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamScore:
    """``f1`` in [0, 1]. ``missed``: essential categories not ordered; a recall is None where none is wanted."""

    f1: float
    precision: float
    recall: float
    essential_recall: float | None
    optional_recall: float | None
    choice: Choice
    missed: tuple[str, ...] = ()


_MARK = re.compile(r"^\s*(?:[-*\N{BULLET}\N{EN DASH}]|\(?\d{1,3}[.):])\s+(.+)$")
_REASON = re.compile(
    r"\s+(?:to (?:rule|check|assess|evaluate|look|exclude|confirm|see|determine|detect|identify|monitor|measure|screen)"
    r"|for|because|in order|if|as|given|looking|since|due to|which|that)\b.*$|\s+[-\N{EN DASH}\N{EM DASH}]\s+.*$",
    re.IGNORECASE,
)
_NOT = re.compile(r"\b(?:no|not|avoid|without|don't|do not|unnecessary|defer|never|hold off)\b", re.IGNORECASE)
_LEAD = re.compile(
    r"^\W*(?:(?:an? (?=\w)|the (?=\w)"
    r"|i(?: would|'d| will|'ll| want to)|please|let's|let us|we should|should|also|and|then|next"
    r"|urgent(?:ly)?|repeat|order(?:ed)?|request(?:ing)?(?: test)?|perform|obtain|get|do|check|send|recommend"
    r"|tests?(?= |:)|labs?(?= |:)|imaging:|bloods?:|blood (?:tests?|work)|laboratory(?: tests)?|investigations?"
    r"|examinations?|orders?)(?:\b|(?<=:))\s*:?\s*)+",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"\s*[,;\n]\s*|\s+(?:and|plus|as well as|with|&|\+)\s+|\s*\+\s*", re.IGNORECASE)


def read_orders(text: str) -> list[Order]:
    """The examinations that a message orders, in order, each once.

    Its list items or, without a list, its lines. A line of several tests ("CBC, CMP and a CT of the head") is several
    orders where each part is an examination; what an order is for, and what is not wanted, is left out.
    """
    lines = text.splitlines()
    items = [match.group(1) for line in lines if (match := _MARK.match(line))]
    found: dict[str, Order] = {}
    for item in items or [part for line in lines for part in re.split(r"(?<=[a-z)])\.\s", line)]:
        if item.rstrip().endswith("?"):
            continue
        for order in _orders(item):
            found.setdefault(order.text.casefold(), order)
    return list(found.values())


def _orders(line: str) -> list[Order]:
    line = " ".join(line.replace("*", " ").split()).strip(" .;:")
    if _NOT.search(line):
        line = line[: _NOT.search(line).start()].strip(" ,.;:-")  # type: ignore[union-attr]
    line = _LEAD.sub("", line)
    whole = _REASON.sub("", line).strip(" .;:,") or line
    if not re.search(r"[A-Za-z]{2}", whole):
        return []
    inside = [part for group in re.findall(r"\(([^)]*)\)", whole) for part in _SPLIT.split(group)]
    outside = re.sub(r"\([^)]*\)", " ", whole)
    parts = [part for part in (_LEAD.sub("", one).strip(" .;:") for one in _SPLIT.split(outside)) if part]
    known = [Order(text=part, categories=categories(part)) for part in parts]
    split = [order for order in known if order.categories]
    if len(parts) > 1 and len({order.categories for order in split}) > 1:
        return [*split, *_unknown_tests(known)]
    if not categories(outside) and (named := [part for part in inside if categories(part)]):
        return [Order(text=part, categories=categories(part)) for part in named]
    return [Order(text=whole, categories=categories(outside) or categories(whole))]


def _unknown_tests(orders: list[Order]) -> list[Order]:
    """Parts of a line that no rule knows but that call themselves an examination; the others belong to a neighbour."""
    calls = re.compile(r"\b(?:test|scan|level|panel|screen|assay|study|titre|titer|imaging|exam)", re.IGNORECASE)
    return [order for order in orders if not order.categories and calls.search(order.text)]


@functools.lru_cache(maxsize=1024)
def needs(case: Case) -> dict[str, str]:
    """The need of each category of a case's examinations, the strongest; an examination without category by its id.

    essential is stronger than optional, than irrelevant; harmful holds only where all of a category is.
    """
    strength = ("essential", "optional", "irrelevant", "unknown", "harmful")
    found: dict[str, str] = {}
    for exam in case.exams:
        key = exam.id if exam.category == UNKNOWN_CATEGORY else exam.category
        before = found.get(key, "harmful")
        found[key] = min(before, exam.need, key=strength.index)
    return found


def match(case: Case, orders: list[Order]) -> Choice:
    """What the case says of each order: by the name of one of its examinations, else by category."""
    need = needs(case)
    groups: dict[str, dict[str, None]] = {field.name: {} for field in dataclasses.fields(Choice)}
    for order in orders:
        exam = find_exam(case, order.text)
        if exam is not None:
            key = exam.id if exam.category == UNKNOWN_CATEGORY else exam.category
            groups[_group(exam.need)][key] = None
        others = [category for category in order.categories if exam is None or category != exam.category]
        if exam is not None and len(order.categories) < 2:
            others = []
        for category in others:
            groups[_group(need.get(category, "irrelevant"))][category] = None
        if exam is None and not order.categories:
            groups["unknown"][order.text] = None
    wanted = {*groups["essential"], *groups["optional"]}
    groups["irrelevant"] = {key: None for key in groups["irrelevant"] if key not in wanted}
    # an optional examination of a category that also has an essential one: the category is what is chosen
    for key in [key for key in groups["optional"] if need.get(key) == "essential"]:
        del groups["optional"][key]
        groups["essential"][key] = None
    return Choice(**{name: tuple(keys) for name, keys in groups.items()})


def _group(need: str) -> str:
    return "unjudged" if need == "unknown" else need


def weighted_f1(case: Case, orders: list[Order] | str, config: Config | None = None) -> ExamScore:
    """The score of the orders of a message, or of orders read from one. Nothing ordered: 0, for nothing was recalled.

    Raises:
        ValueError: the case has no essential and no optional examination: there is nothing to recall.
    """
    config = config or Config()
    need = needs(case)
    essential = [key for key, value in need.items() if value == "essential"]
    optional = [key for key, value in need.items() if value == "optional"]
    if not essential and not optional:
        raise refuse("exam_choice.weighted_f1", "case", "essential or optional examinations", f"none in {case.id!r}")
    choice = match(case, read_orders(orders) if isinstance(orders, str) else orders)
    right = len(choice.essential) + len(choice.optional)
    wrong = len(choice.irrelevant) + config.harmful * len(choice.harmful) + config.unknown * len(choice.unknown)
    precision = right / (right + wrong) if right else 0.0
    recalled = config.essential * len(choice.essential) + config.optional * len(choice.optional)
    recall = recalled / (config.essential * len(essential) + config.optional * len(optional))
    return ExamScore(
        f1=2 * precision * recall / (precision + recall) if right else 0.0,
        precision=precision,
        recall=recall,
        essential_recall=len(choice.essential) / len(essential) if essential else None,
        optional_recall=len(choice.optional) / len(optional) if optional else None,
        choice=choice,
        missed=tuple(key for key in essential if key not in choice.essential),
    )


def everything() -> list[Order]:
    """One order of each of the 38 categories: what a policy that orders all tests is scored on."""
    return [Order(text=category.replace("_", " "), categories=(category,)) for category in CATEGORIES]
