"""Log-probabilities of a segment, read while others are still drawn and while it is judged.

The last token of a response is drawn; its reward may take seconds of waiting for a judge, other rollouts are under way.
So reading begins at once: the trainer's own log-probabilities (its weights do not change within a batch) and those of
the reference. Each segment is read alone, so what is read depends on nothing that runs beside it. Source: Baichuan-M3,
arXiv 2602.06570: judging is overlapped with the log-probs of pi_ref and pi_old.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

from m3.environment.case import Case
from m3.environment.pipeline import Answer, Consultation
from m3.environment.segment import Context
from m3.environment.trajectory import Message
from m3.train.rollouts import stream_of
from m3.train.streams import Sample
from m3.train.teachers import Teacher


class ReadAhead:
    """A ``Consultation`` whose answers are read as soon as they are complete.

    Args:
        consultation: of a physician whose every token is known.
        readers: by the stream that they fill: "old_logprobs", "ref_logprobs".
        temperature: that the policy draws at.
    """

    def __init__(self, consultation: Consultation, readers: Mapping[str, Teacher], *, temperature: float) -> None:
        self._consultation, self._readers, self._temperature = consultation, dict(readers), temperature
        self._reading: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self.policy, self.name = consultation.policy, consultation.name

    @property
    def version(self) -> int:
        """As the consultation's."""
        return self._consultation.version

    async def open(self, case: Case, *, seed: int) -> tuple[Message, ...]:
        """As the consultation's."""
        return await self._consultation.open(case, seed=seed)

    async def answer(self, context: Context, *, seed: int, rollout: int) -> Answer:
        """As the consultation's; the answer's reading has begun when this returns."""
        found = await self._consultation.answer(context, seed=seed, rollout=rollout)
        if not self._readers:
            return found
        name = context.segment(rollout)
        drawn = stream_of(name, context.messages, found.messages, temperature=self._temperature)
        self._reading[name] = asyncio.create_task(self._read(drawn), name=f"reading {name}")
        return found

    async def _read(self, sample: Sample) -> dict[str, Any]:
        return {stream: (await reader.logprobs([sample]))[0] for stream, reader in self._readers.items()}

    async def taken(self, sample: Sample) -> Sample:
        """The sample of a segment with what was read of it.

        Raises:
            What the reader raised.
        """
        return dataclasses.replace(sample, **await self._reading.pop(sample.id)) if self._readers else sample

    async def drop(self) -> None:
        """Forget what nobody took: of groups that stayed out of the batch. Waits for what is being read."""
        tasks = list(self._reading.values())
        self._reading.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
