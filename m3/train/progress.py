"""Progress of training on a terminal: a line a stage, with its steps, its time, what is left, and its last figures.

Where the output is no terminal (a log file), a line of text is printed at each tenth of a stage.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from m3.terminal import errors


class StageBars:
    """Shown while it is entered; ``told`` after each step."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[told]}"),
        )  # fmt: skip
        self.progress = Progress(*columns, console=errors, disable=not errors.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> StageBars:
        from transformers.utils import logging

        logging.disable_progress_bar()  # of files that are loaded: they would write into these lines
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)

    def told(self, stage: str, done: int, steps: int, metrics: Mapping[str, float]) -> None:
        """``done`` of ``steps`` are; ``metrics`` of the last one."""
        names = ("reward", "loss") if "advantage" in metrics else ("loss",)  # else the reward is that of its teachers
        shown = " ".join(f"{name} {metrics[name]:.3f}" for name in names if name in metrics)
        if stage not in self._tasks:
            self._begun[stage] = time.monotonic(), done
            self._tasks[stage] = self.progress.add_task(stage, total=steps, completed=done, told=shown)
        self.progress.update(self._tasks[stage], completed=done, told=shown)
        if not errors.is_terminal and done and (done == steps or done % max(1, steps // 10) == 0):
            errors.print(f"{stage} {done}/{steps}, {self._left(stage, done, steps)} left, {shown}", soft_wrap=True)

    def scored(self, stage: str, text: str) -> None:
        """What held-out cases say of a stage that is done."""
        self.progress.update(self._tasks[stage], told=text)
        if not errors.is_terminal:
            errors.print(f"{stage} done, {text}", soft_wrap=True)

    def _left(self, stage: str, done: int, steps: int) -> str:
        begun, first = self._begun[stage]
        if done == first:
            return "?"
        seconds = int((time.monotonic() - begun) / (done - first) * (steps - done))
        return f"{seconds // 60}:{seconds % 60:02}"
