"""What a stage of training is to the loop: a source of batches, the objective that is taken on them, and its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from m3.train.streams import Sample
from m3kernels.policy_loss.types import DistillSpec, LossSpec


class NonFiniteError(RuntimeError):
    """A stream, a loss or a gradient is nan or inf; the message says which."""


class OtherRankError(RuntimeError):
    """Another of the processes that train together has stopped, and says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a batch: a policy loss, or a distillation from stored log-probabilities of teachers.

    Args:
        spec: of m3kernels.policy_loss; which streams it needs follows from it.
        aggregation: of a DistillSpec (a LossSpec has its own).
        on_policy: the policy itself stands for the old one at every update of a batch, so that what is held constant
            (A_t, w_t of MOPD) is that of the policy as it moves; old_logprobs are not read.
    """

    spec: LossSpec | DistillSpec
    aggregation: str = "token_mean"
    on_policy: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatch:
    """All samples of one optimiser step, and what the source measured on the way (rewards, turns, seconds)."""

    step: int
    samples: Sequence[Sample]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """Makes the batches of a stage, one a step. Resumable: step n after ``load_state`` is step n of an unbroken run."""

    objective: Objective

    async def batch(self, step: int) -> StepBatch | None:
        """The batch of a step; None: there is no more."""
        ...

    async def updated(self, step: int, version: int) -> None:
        """The trainer's weights have changed: a source that samples from them refreshes its sampler."""
        ...

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint must hold: JSON."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        ...

    async def close(self) -> None:
        """Free what it holds."""
        ...


class Stateless:
    """The rest of a Source whose batches depend on the step alone: nothing to note, to refresh or to free."""

    async def updated(self, step: int, version: int) -> None:
        pass

    def state(self) -> Mapping[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    async def close(self) -> None:
        pass
