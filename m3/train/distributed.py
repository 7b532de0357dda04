"""One training run over several processes: each holds a slice of the model (FSDP2) and a part of every batch.

    torchrun --nproc-per-node 2 -m m3 train task-rl -c recipe.toml -o run      or a program of one's own:

    with joined() as ranks:
        model = PolicyModel.load(folder)
        ranks.shard(model)
        asyncio.run(train(source, model, config, out, ranks=ranks))

weights    each parameter, its gradient and its moments are cut along their first dimension over the ranks. A layer is
           gathered where it is used; embedding, last norm and head once a pass, for the losses read the head's weight
gradients  of the ranks are summed, not averaged: the normaliser of a loss is that of the whole batch (objective.py)
batches    all ranks are given the same batch; the samples of an update are dealt to them by a fixed rule
           (``Relayed``: rank 0 makes it). A model that judges samples may be sharded too
errors     of one rank end all; one rank tells (``tells``)
files      rank 0 writes: metrics, the same checkpoints as those of one process, the exported weights. A run goes on
           with another number of ranks; its numbers differ by rounding alone. Ranks read one file system

Source: FSDP, arXiv 2304.11277; torch.distributed.fsdp.fully_shard. gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3.train import checkpoint
from m3.train.loop import Alone
from m3.train.objective import MetricSum
from m3.train.optim import SEPARATOR, Optimizer
from m3.train.policy_model import PolicyModel, whole
from m3.train.stage import Objective, OtherRankError, Source, StepBatch
from m3.train.streams import Sample, microbatches
from m3kernels.checks import refuse

OP = "distributed"
PATIENCE = datetime.timedelta(hours=2)  # ours: one rank may make a batch, or write a checkpoint, while others wait
LINGER = 2.0  # seconds; ours: for the others to say why they stopped


@contextlib.contextmanager
def joined(patience: datetime.timedelta = PATIENCE) -> Iterator[Alone | Together]:
    """The ranks of this program: those that torchrun started, or this process alone.

    Args:
        patience: how long a rank waits for the others before it fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield Together(device)
    finally:
        dist.destroy_process_group()


def tells(error: Exception) -> bool:
    """Whether this rank is the one to say why it stopped: another has not said the same, nor is the cause of it."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return True
    own = "" if isinstance(error, OtherRankError) or "/gloo/" in str(error) else f"{type(error).__name__} {error}"
    try:
        place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        held = dist.TCPStore(place, port, is_master=False, timeout=datetime.timedelta(seconds=LINGER))
        store = dist.PrefixStore(f"m3-stopped-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", held)
        store.set(f"{rank}", own)
        until = time.monotonic() + LINGER
        while rank > 0 or not own:
            others = [one for one in ((0,) if own else range(size)) if one != rank and store.check([f"{one}"])]
            told = [store.get(f"{one}").decode() for one in others]
            if own and told:  # rank 0's
                return told[0] != own
            if any(told):
                time.sleep(LINGER / 4)  # whoever ends first may end the others before they have told
                return False
            if time.monotonic() > until:
                break
            time.sleep(0.02)
    except (RuntimeError, OSError):  # the one that held the store is gone
        return True
    return True


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """What is said between CPUs, within; a rank that is not there any more has stopped."""
    try:
        yield
    except RuntimeError as error:
        raise OtherRankError(f"{OP}: another rank has stopped: {error}") from error


class Together:
    """The processes of torch.distributed's default group, as ``loop.Ranks``.

    Args:
        device: where this process computes: "cpu", or its own GPU.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.device = torch.device(device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.device.type, (self.size,))
        self.words = dist.new_group(backend="gloo")  # for what is said between CPUs

    # -- the model ----------------------------------------------------------------------------------------------------
    def shard(self, model: PolicyModel, *, compute: torch.dtype | None = None) -> None:
        """Cut a model over the ranks, in place, before an optimiser is made for it. All ranks have loaded the same.

        Args:
            compute: dtype of passes and of what is gathered (such as bf16) where weights, moments and summed gradients
                keep theirs; None: that of the weights.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        names = set(getattr(model.causal, "_no_split_modules", None) or ())
        layers = [module for module in model.causal.modules() if type(module).__name__ in names]
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=None if compute is None else torch.float32)
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        # the losses read the head's weight after the forward pass: what is not in a layer stays gathered until then
        fully_shard(model, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no product with a sum

    def state_of(
        self, model: PolicyModel, optimizer: Optimizer, moment: checkpoint.Moment, run: Mapping[str, Any]
    ) -> checkpoint.State:
        """The state of one process, in the memory of rank 0's CPU; without tensors on the others."""
        _resharded(model)
        own = checkpoint.state_of(model, optimizer, moment, run)
        return dataclasses.replace(own, model=self._gathered(own.model), optimizer=self._gathered(own.optimizer))

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            value = whole(tensor)
            if self.rank == 0:
                found[name] = value.cpu()
        return found

    def restore(self, state: checkpoint.State, model: PolicyModel, optimizer: Optimizer) -> None:
        """Put a state of any number of ranks into this rank's slices."""
        _resharded(model)
        named = dict(model.trained())
        moments = {
            key: self._cut(value, named.get(key.rpartition(SEPARATOR)[0]) if value.ndim else None)
            for key, value in state.optimizer.items()
        }
        weights = {name: self._cut(value, named.get(name)) for name, value in state.model.items()}
        checkpoint.restore(dataclasses.replace(state, model=weights, optimizer=moments), model, optimizer)

    def _cut(self, value: Tensor, like: Tensor | None) -> Tensor:
        """This rank's slice of a whole tensor, cut as ``like`` is."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return value
        value = value.to(self.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    def export(self, model: PolicyModel, folder: Path) -> None:
        if self.rank == 0:
            checkpoint.export(model, folder)
        else:
            with _heard():
                model.tensors()  # gathers as ``save`` does
        with _heard():
            dist.barrier(self.words)

    # -- a batch ------------------------------------------------------------------------------------------------------
    def microbatches(self, samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
        """This rank's part of ``dealt``."""
        return dealt(samples, max_tokens, self.size)[self.rank]

    def summed(self, metrics: MetricSum) -> MetricSum:
        total = MetricSum()
        for part in self._told(metrics):  # in one order on all ranks
            total.merge(part)
        return total

    def any(self, flag: bool) -> bool:
        return any(self._told(flag))

    def mean(self, value: float | None, weight: float) -> float | None:
        known = [(one, count) for one, count in self._told((value, weight)) if one is not None]
        total = math.fsum(count for _, count in known)
        return math.fsum(one * count for one, count in known) / total if total else None

    def _told(self, value: Any) -> list[Any]:
        """What each rank says."""
        found: list[Any] = [None] * self.size
        with _heard():
            dist.all_gather_object(found, value, group=self.words)
        return found


class Relayed:
    """Rank 0's source for all ranks: it makes the batches (with an engine, say), the others are sent them.

    Args:
        source: of rank 0; None on the others.
        model: whose ``tensors()`` the source reads, once in each ``updated``: the other ranks gather them with it.
            None: the source does not read weights of a sharded model.
    """

    relays = True

    def __init__(
        self, ranks: Together, objective: Objective, source: Source | None, *, model: PolicyModel | None = None
    ) -> None:
        if (source is None) != (ranks.rank > 0):
            raise refuse(OP, "source", "a source on rank 0, None on the others", f"{source} on rank {ranks.rank}")
        self.ranks, self.objective, self.source, self.model = ranks, objective, source, model

    async def batch(self, step: int) -> StepBatch | None:
        """The batch of rank 0; None on all where there is no more, or where rank 0's caller was cancelled meanwhile.

        Raises: what rank 0's source raises; on the other ranks OtherRankError, with what it was.
        """
        batch, failure = None, None
        if self.source is not None:  # the others wait: a failure is told first, raised below
            making = asyncio.ensure_future(self.source.batch(step))
            try:
                await asyncio.wait({making})
            except asyncio.CancelledError:
                making.cancel()
                await asyncio.wait({making})
            if not making.cancelled():
                failure = making.exception()
                batch = None if failure is not None else making.result()
        told: list[Any] = [batch, None if failure is None else repr(failure)]
        telling = asyncio.ensure_future(asyncio.to_thread(self._tell, told))
        while not telling.done():  # what one rank has heard all must hear
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({telling})
        telling.result()
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise OtherRankError(f"{OP}: the source of rank 0: {told[1]}")
        return told[0]

    def _tell(self, told: list[Any]) -> None:
        with _heard():
            dist.broadcast_object_list(told, src=0, group=self.ranks.words)

    async def updated(self, step: int, version: int) -> None:
        if self.source is not None:
            await self.source.updated(step, version)
        elif self.model is not None:
            await asyncio.to_thread(self._follow, self.model)

    def _follow(self, model: PolicyModel) -> None:
        with _heard():
            model.tensors()

    def state(self) -> Mapping[str, Any]:
        return {} if self.source is None else self.source.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self.source is not None:
            self.source.load_state(state)

    async def close(self) -> None:
        if self.source is not None:
            await self.source.close()


class Copied:
    """Rank 0's source that draws from ``copy``, a whole model: it is given the sharded model's weights after an update.

    Args:
        copy: with the names that ``model.tensors()`` has, such as a model loaded from the same folder.
    """

    def __init__(self, source: Source, model: PolicyModel, copy: PolicyModel) -> None:
        self.source, self.model, self.copy = source, model, copy
        self.objective = source.objective

    async def batch(self, step: int) -> StepBatch | None:
        return await self.source.batch(step)

    async def updated(self, step: int, version: int) -> None:
        await asyncio.to_thread(self._refresh)
        await self.source.updated(step, version)

    def _refresh(self) -> None:
        found = {name: value.detach() for name, value in self.model.tensors().items()}
        kept = dict(self.copy.causal.named_parameters())
        if found.keys() != kept.keys():
            other = sorted(found.keys() ^ kept.keys())
            raise refuse(OP, "copy", "the parameters of the model", f"{len(other)} others, first {other[0]!r}")
        with torch.no_grad():
            for name, parameter in kept.items():
                parameter.copy_(found[name])

    def state(self) -> Mapping[str, Any]:
        return self.source.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.source.load_state(state)

    async def close(self) -> None:
        await self.source.close()


def dealt(samples: Sequence[Sample], max_tokens: int, ranks: int) -> list[list[list[Sample]]]:
    """The microbatches of each rank, as many on one as on another; a function of the samples' lengths alone.

    The longest sample first, each to the rank with the fewest tokens yet; within a rank in the order given. A rank
    with fewer microbatches than another halves its longest ones, and where nothing is left to halve it is given a
    short sample without weight: it adds nothing to a loss, a gradient or a metric.

    Raises:
        ValueError: no sample, or ``max_tokens`` or ``ranks`` below 1.
    """
    if not samples or ranks < 1:
        raise refuse(OP, "samples, ranks", "at least one of each", f"{len(samples)}, {ranks}")
    places: list[list[int]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for index in sorted(range(len(samples)), key=lambda index: -samples[index].tokens):
        rank = min(range(ranks), key=held.__getitem__)
        places[rank].append(index)
        held[rank] += samples[index].tokens
    parts = [microbatches([samples[index] for index in sorted(mine)], max_tokens) for mine in places]
    count = max(len(mine) for mine in parts)
    for mine in parts:
        while len(mine) < count:
            many = [index for index, one in enumerate(mine) if len(one) > 1]
            if not many:
                mine.append([_weightless(min(samples, key=lambda sample: sample.tokens))])
                continue
            index = max(many, key=lambda index: sum(sample.tokens for sample in mine[index]))
            one = mine[index]
            mine[index : index + 1] = [one[: len(one) // 2], one[len(one) // 2 :]]
    return parts


def _weightless(sample: Sample) -> Sample:
    return dataclasses.replace(sample, mask=torch.zeros_like(sample.mask))


def _resharded(model: PolicyModel) -> None:
    """Undo what a pass without a gradient has left gathered."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
