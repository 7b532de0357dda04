"""What a verifier said about a claim: one of three labels, or the name of the reason why it said none.

Labels of Baichuan-M3 (arXiv 2602.06570, on the fact verifier) are supported, refuted and uncertain. "Uncertain" is a
finding: the evidence was searched and does not tell. A timeout is none: it has another name, counts in no rate and no
reward, and is not kept by a cache.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from m3.rollout.chat import Failure


class Label(enum.StrEnum):
    """Of one claim put to a verifier."""

    supported = "supported"
    refuted = "refuted"
    uncertain = "uncertain"  # the evidence that was found does not tell
    unparsable = "unparsable"  # it answered, and the answer is no verdict, after every retry
    timeout = "timeout"
    unreachable = "unreachable"  # no connection, or the server failed or refused, after every retry
    over_budget = "over_budget"  # not asked: the budget of calls, tokens or seconds was spent

    @property
    def judged(self) -> bool:
        """Whether this is a verdict."""
        return self in (Label.supported, Label.refuted, Label.uncertain)


LABEL_OF_FAILURE: Mapping[Failure, Label] = {
    Failure.timeout: Label.timeout,
    Failure.unreachable: Label.unreachable,
    Failure.refused: Label.unreachable,
    Failure.over_budget: Label.over_budget,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactVerdict:
    """Of one claim. ``evidence``: ids of the passages that decided; ``cached``: nothing was searched this time."""

    claim: str
    label: Label
    evidence: tuple[str, ...] = ()
    explanation: str = ""
    verifier: str = ""
    searches: int = 0
    malformed: int = 0  # replies of a model that could not be read, those of a retry that then succeeded included
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``from_json`` reads it."""
        row = dataclasses.asdict(self)
        return {**row, "label": str(self.label), "evidence": list(self.evidence)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> FactVerdict:
        """The verdict of ``to_json``.

        Raises:
            ValueError: an unknown label.
            TypeError: an unknown or missing field.
        """
        return cls(**{**row, "label": Label(row["label"]), "evidence": tuple(row.get("evidence", ()))})


def count_labels(verdicts: Iterable[FactVerdict]) -> dict[str, int]:
    """How many verdicts have each label, all seven names, in their order."""
    found = Counter(verdict.label for verdict in verdicts)
    return {str(label): found[label] for label in Label}
