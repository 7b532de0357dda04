"""One run of a stage: its recipe written beside it, the loop over what the recipe opens, scores at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from m3.train.loop import Outcome, Progress, train
from m3.train.open_stage import opened
from m3.train.recipe import Recipe, save


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended. ``scores``: of the trained model on held-out cases; empty after a signal, or without cases."""

    outcome: Outcome
    scores: Mapping[str, float]


async def run_stage(recipe: Recipe, out: str | Path, progress: Progress = lambda done, steps, metrics: None) -> Ended:
    """Train as the recipe says, or go on where a run under ``out`` was.

    Raises:
        ValueError: the run under ``out`` was begun with another recipe. What ``loop.train`` raises.
    """
    save(recipe, out)
    async with opened(_in_folder(recipe, Path(out))) as stage:
        outcome = await train(
            stage.source,
            stage.model,
            recipe.train_config(),
            out,
            reference=stage.reference,
            teachers=stage.teachers,
            decode=stage.decode,
            progress=progress,
        )
        scores: Mapping[str, float] = {}
        if outcome.signal is None and stage.evaluate is not None:
            scores = await stage.evaluate()
    return Ended(outcome=outcome, scores=scores)


def _in_folder(recipe: Recipe, out: Path) -> Recipe:
    """What the source makes goes into the run's folder, where the recipe names none."""
    folder = recipe.source.folder or str(out)
    return dataclasses.replace(recipe, source=dataclasses.replace(recipe.source, folder=folder))
