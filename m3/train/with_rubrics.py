"""A source whose rewards read a store of rubrics: which version it is at belongs to its state."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

from m3.rewards.pinned_rubrics import PinnedRubrics
from m3.train.stage import Source, StepBatch


class WithRubrics:
    """A Source around another. Between two batches it takes the store's newest version.

    The version of the next batch is settled when the step before is done, and stands in that step's checkpoint.
    """

    def __init__(self, source: Source, rubrics: PinnedRubrics) -> None:
        self.objective = source.objective
        self._source, self._rubrics = source, rubrics
        self._settled = 0  # version of the weights for whose batch the rubrics are settled

    async def batch(self, step: int) -> StepBatch | None:
        """As the source's; ``rubrics_version`` among its metrics."""
        found = await self._source.batch(step)
        if found is None:
            return None
        version = float(self._rubrics.version)
        return dataclasses.replace(found, metrics={**found.metrics, "rubrics_version": version})

    async def updated(self, step: int, version: int) -> None:
        """The source is told; then the store is looked at, once for these weights."""
        await self._source.updated(step, version)
        if version != self._settled:
            await asyncio.to_thread(self._rubrics.look)
            self._settled = version

    def state(self) -> Mapping[str, Any]:
        return {"rubrics": self._rubrics.state(), "settled": self._settled, "source": self._source.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ValueError: the store is another one; as the source."""
        self._rubrics.load_state(state["rubrics"])
        self._source.load_state(state["source"])
        self._settled = int(state["settled"])

    async def close(self) -> None:
        await self._source.close()
