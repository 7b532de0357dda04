"""Rolling out a frozen teacher in its domain, into a store: the first half of stage 2.

The teacher draws as a student would, through a source of on-policy samples (TaskRL over consultations, PromptRollouts
over prompts) whose physician is the teacher and whose weights nobody changes. A batch of the source is a shard of the
store, with the source's state after it: after a kill the batch under way is drawn again, the same bit for bit.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

from m3.train.stage import Source
from m3.train.teachers import Teacher, judged
from m3.train.trajectory_store import DOMAIN, TrajectoryStore
from m3kernels.checks import refuse

Progress = Callable[[int, int], None]  # (samples of the domain, samples wanted)


async def roll_out(
    source: Source,
    teacher: Teacher,
    store: TrajectoryStore,
    *,
    domain: str,
    samples: int,
    progress: Progress = lambda done, wanted: None,
) -> int:
    """Fill the store until it holds so many samples of a domain, or the source ends; how many it holds then.

    The last batch is kept whole: there may be a few more.

    Args:
        source: its physician is the teacher. Not closed here.
        teacher: says its log-probabilities of every token that it drew (SamplingTeacher: those of the drawing itself).
        domain: of all these samples, whatever the source calls theirs.
    Raises:
        ValueError: a store that another teacher, or another run of the source, began.
        What source and teacher raise; what is in the store stays.
    """
    if samples < 1 or not DOMAIN.fullmatch(domain):
        raise refuse(
            "roll_out", "samples, domain", f"at least 1, a name like {DOMAIN.pattern}", f"{samples}, {domain!r}"
        )
    before = store.of(domain)
    if before:
        if before[-1].teacher != teacher.name:
            raise refuse("roll_out", "teacher", f"{before[-1].teacher}, who began {domain!r}", teacher.name)
        source.load_state(before[-1].state)
    while (held := store.count(domain)) < samples:
        batch = await source.batch(len(store.of(domain)))
        if batch is None:
            break
        told = await judged("teacher_logprobs", batch.samples, teacher)
        kept = [dataclasses.replace(sample, domain=domain) for sample in told]
        await asyncio.to_thread(store.append, domain, kept, teacher=teacher.name, state=source.state())
        progress(store.count(domain), samples)
    return held
