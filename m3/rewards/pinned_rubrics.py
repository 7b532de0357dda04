"""The rubrics of a store at one version, for a training run: experts go on deciding while the run holds still.

A run looks at the store between two batches. Which version it trains on is part of its state: a run that goes on after
a kill trains on the same rubrics, whatever was approved in between, and learns of it one batch later as it would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3.environment.journal import read_journal
from m3.rewards.rubric import Rubric
from m3.rewards.rubric_store import RUN, State, replay
from m3kernels.checks import refuse

OP = "PinnedRubrics"


class PinnedRubrics:
    """The newest version of the store at ``path``, until ``look`` or ``load_state``.

    Attributes:
        version: events up to it. digest: SHA-256 of them, which another history does not have.
    Raises:
        ValueError: not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pin(None)

    def _pin(self, version: int | None) -> None:
        run, records = read_journal(self.path)
        if run != dict(RUN):
            raise refuse(OP, "path", f"the journal of {dict(RUN)}", f"{self.path}, of {run}")
        if version is not None and version > len(records):
            raise refuse(OP, "state", f"a store of {version} events or more", f"{self.path}, of {len(records)}")
        events = [record["event"] for record in records[:version]]
        self._state: State = replay(events, where=str(self.path))
        self.version = len(events)
        self.digest = hashlib.sha256("\n".join(json.dumps(one, sort_keys=True) for one in events).encode()).hexdigest()

    def rubric(self, scope: str) -> Rubric:
        """What a context is trained on at this version: its core set and what is active."""
        return self._state.rubric(scope)

    def look(self) -> None:
        """Take the newest version."""
        self._pin(None)

    def state(self) -> dict[str, Any]:
        return {"version": self.version, "digest": self.digest}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Back to the version of ``state``.

        Raises:
            ValueError: the store's history is another one; the version stays.
        """
        before = self.version
        self._pin(int(state["version"]))
        if self.digest != state["digest"]:
            got = f"{self.path}, digest {self.digest[:12]}..."
            self._pin(before)
            want = f"the store whose first {state['version']} events have digest {state['digest'][:12]}..."
            raise refuse(OP, "state", want, got)
