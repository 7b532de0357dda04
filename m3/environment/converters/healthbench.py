"""HealthBench (MIT): rows are read, checked and kept as they are; what is written is equal to what was read.

Rows carry a canary and are for evaluation only: nothing of their text stands in a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3.environment.converters.loss import Tally
from m3.rewards.rubric import HealthBenchRow

LICENCE = "MIT"
CAVEATS = ("rows carry a canary: for evaluation only, never for training",)


def row_of(row: Mapping[str, Any], tally: Tally) -> HealthBenchRow:
    """The row; ValueError names the field."""
    found = HealthBenchRow.from_json(row)
    if found.to_json() != row:
        raise ValueError("row: want fields that are written back as they were read; got others")
    tally.fields(row, row)
    tally.kept["(clauses)"] += len(found.rubric.items)
    tally.provenance["* (human)"] += 1
    return found
