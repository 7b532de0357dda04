"""One run of a stage: its recipe written beside it, the loop over what the recipe opens, scores at the end.

Under torchrun its processes train together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from m3.train.distributed import Together, joined
from m3.train.loop import Outcome, Progress, train
from m3.train.open_stage import check, opened
from m3.train.recipe import Recipe, save

SCORES = "scores.json"  # of the trained model on held-out cases, by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended. ``scores``: of the trained model on held-out cases; empty after a signal, or without cases."""

    outcome: Outcome
    scores: Mapping[str, float]


async def run_stage(recipe: Recipe, out: str | Path, progress: Progress = lambda done, steps, metrics: None) -> Ended:
    """Train as the recipe says, or go on where a run under ``out`` was. Of several ranks the first has the scores.

    Raises:
        ValueError: the run under ``out`` was begun with another recipe. What ``loop.train`` raises.
    """
    with joined() as ranks:
        check(recipe)  # first: a folder belongs to the recipe that is saved there
        if ranks.rank == 0:
            save(recipe, out)
        async with opened(_in_folder(recipe, Path(out)), ranks if isinstance(ranks, Together) else None) as stage:
            outcome = await train(
                stage.source,
                stage.model,
                recipe.train_config(),
                out,
                reference=stage.reference,
                teachers=stage.teachers,
                decode=stage.decode,
                progress=progress,
                ranks=ranks,
            )
            scores: Mapping[str, float] = {}
            if outcome.signal is None and stage.evaluate is not None and ranks.rank == 0:
                scores = await stage.evaluate()
                (Path(out) / SCORES).write_text(json.dumps(dict(scores), indent=1) + "\n", encoding="utf-8")
    return Ended(outcome=outcome, scores=scores)


def _in_folder(recipe: Recipe, out: Path) -> Recipe:
    """What the source makes goes into the run's folder, where the recipe names none."""
    folder = recipe.source.folder or str(out)
    return dataclasses.replace(recipe, source=dataclasses.replace(recipe.source, folder=folder))
