"""Stage 2, offline distillation: the student learns from stored trajectories of the teachers, each in its own domain.

    clip_forward  1(log pi < log pi_teacher) * -log pi       (Eq 2)
    forward       -log pi: the forward KL of the teacher's own tokens, but for the teacher's entropy, a constant

Batches are a mixture of domains. Each domain is gone through in an order drawn anew for each of its epochs. Source:
Baichuan-M3, arXiv 2602.06570, on offline policy distillation, and its comparison of the two losses.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import random
from collections.abc import Mapping
from typing import Any

import torch

from m3.algorithms import clip_forward_kl
from m3.environment.seeds import derive_seed
from m3.train.stage import Objective, StepBatch
from m3.train.streams import Sample
from m3.train.trajectory_store import Shard, TrajectoryStore
from m3kernels.checks import refuse

OP = "OfflineDistill"
DIVERGENCES = ("clip_forward", "forward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineDistillConfig:
    """Numbers of offline distillation; the paper gives none but the loss.

    Args:
        divergence: as above. loss: its aggregation.
        batch_size: samples of a step.
        weights: of the domains in the mixture, relative, > 0; a domain that is not named is left out. None: by their
            counts of samples, so that all domains end their epochs together.
        epochs: the source ends after this many times the samples of its domains, over all of them.
    """

    divergence: str = "clip_forward"
    loss: clip_forward_kl.Config = dataclasses.field(default_factory=clip_forward_kl.Config)
    batch_size: int = 32  # ours: a usual size
    weights: Mapping[str, float] | None = None
    epochs: float = 1.0  # ours: a trajectory is seen once
    seed: int = 0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise refuse("OfflineDistillConfig", "divergence", f"one of {DIVERGENCES}", repr(self.divergence))
        if self.batch_size < 1:
            raise refuse("OfflineDistillConfig", "batch_size", "at least 1", self.batch_size)
        if not 0 < self.epochs < float("inf"):
            raise refuse("OfflineDistillConfig", "epochs", "a number > 0", self.epochs)
        for domain, weight in (self.weights or {}).items():
            if not 0 < weight < float("inf"):
                raise refuse("OfflineDistillConfig", f"weights[{domain!r}]", "a number > 0", weight)

    def objective(self) -> Objective:
        """The loss. For "forward" every sample is one of a ``certain`` teacher."""
        return Objective(spec=clip_forward_kl.loss_spec(self.loss), aggregation=self.loss.aggregation)


class OfflineDistill:
    """The Source of stage 2.

    Raises:
        ValueError: an empty store; a weight for a domain that it does not hold.
    """

    def __init__(self, store: TrajectoryStore, config: OfflineDistillConfig | None = None) -> None:
        self.config = config or OfflineDistillConfig()
        self.objective = self.config.objective()
        self._store = store
        weights = self.config.weights
        if weights is None:
            weights = {domain: float(store.count(domain)) for domain in store.domains}
        if not weights:
            raise refuse(OP, "store", "trajectories", f"none in {store.folder}")
        for domain in weights:
            if domain not in store.domains:
                raise refuse(OP, "weights", f"domains of the store, {list(store.domains)}", repr(domain))
        self._weights = dict(sorted(weights.items()))
        self._rows: dict[str, list[tuple[Shard, int]]] = {
            domain: [(shard, row) for shard in store.of(domain) for row in range(shard.samples)]
            for domain in self._weights
        }
        self.total = math.ceil(self.config.epochs * sum(len(rows) for rows in self._rows.values()))
        self._taken: collections.Counter[str] = collections.Counter()
        self._run = {
            "store": store.digest(),
            "weights": self._weights,
            **{name: getattr(self.config, name) for name in ("divergence", "batch_size", "epochs", "seed")},
        }

    @property
    def steps(self) -> int:
        """Batches until the end."""
        return math.ceil(self.total / self.config.batch_size)

    async def batch(self, step: int) -> StepBatch | None:
        """The step's mixture; None after the last epoch. The last batch may be smaller.

        Raises:
            ValueError: a shard is not what was written; names it.
        """
        count = min(self.config.batch_size, self.total - self._taken.total())
        if count <= 0:
            return None
        samples = []
        for domain in self._mixture(step, count):
            shard, row = self._next(domain)
            samples.append(self._store.sample(shard, row))
        return StepBatch(step=step, samples=[self._judged(one) for one in samples], metrics=self._measured(samples))

    async def updated(self, step: int, version: int) -> None:
        """Nothing is sampled here."""

    def state(self) -> Mapping[str, Any]:
        """How many samples of each domain were taken, and of which store."""
        return {"run": self._run, "taken": dict(sorted(self._taken.items()))}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: of another store (one that has grown too), or of other numbers; nothing has changed.
        """
        for name, value in self._run.items():
            if state["run"].get(name) != value:
                got = f"{name} = {value!r}, where it was {state['run'].get(name)!r}"
                raise refuse(OP, "state", "of a run like this one", got)
        self._taken = collections.Counter(state["taken"])

    async def close(self) -> None:
        """The store is the caller's."""

    # -- who is next --------------------------------------------------------------------------------------------------
    def _mixture(self, step: int, count: int) -> list[str]:
        chance = random.Random(derive_seed(self.config.seed, "mixture", step))
        return chance.choices(list(self._weights), list(self._weights.values()), k=count)

    def _next(self, domain: str) -> tuple[Shard, int]:
        rows = self._rows[domain]
        epoch, place = divmod(self._taken[domain], len(rows))
        self._taken[domain] += 1
        return rows[_order(self.config.seed, domain, epoch, len(rows))[place]]

    def _judged(self, sample: Sample) -> Sample:
        """The sample as the loss wants it."""
        return sample if self.config.divergence == "clip_forward" else certain(sample)

    def _measured(self, samples: list[Sample]) -> dict[str, float]:
        """samples/DOMAIN; teacher_nll/DOMAIN: -log pi_teacher of the drawn tokens, nats; epoch: of all domains."""
        found: dict[str, float] = {"epoch": self._taken.total() / sum(len(rows) for rows in self._rows.values())}
        for domain in self._weights:
            of = [sample for sample in samples if sample.domain == domain]
            found[f"samples/{domain}"] = len(of)
            told = [one.teacher_logprobs[one.mask > 0] for one in of if one.teacher_logprobs is not None and one.drawn]
            if told:
                found[f"teacher_nll/{domain}"] = -float(torch.cat(told).double().mean())
        return found


def certain(sample: Sample) -> Sample:
    """The sample of a teacher that gives each of its tokens the probability 1: all of them are taught, -log pi."""
    return dataclasses.replace(sample, teacher_logprobs=torch.zeros(sample.tokens))


@functools.lru_cache(maxsize=64)
def _order(seed: int, domain: str, epoch: int, count: int) -> list[int]:
    return random.Random(derive_seed(seed, "order", domain, epoch)).sample(range(count), count)
