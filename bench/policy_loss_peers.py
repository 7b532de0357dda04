"""The policy loss of other projects as arms: torch, TRL, Liger and verl, each fed the same tensors and the same loss.

Liger's policy loss is one function. The others give log-probabilities; the few lines of the loss on top of them are
``LossProblem.token_losses`` for all. An arm drops the tokens whose mask is 0 where the project's function can: TRL's
takes any rows, and ``torch_rows`` is what a user can do by hand; Liger's and verl's compute all tokens.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from bench.harness import Arm, UnavailableError
from bench.workloads import CLIP, LossProblem

# Relative RMS error of the loss and of either gradient: fp32 throughout, or anything rounded to bf16 on the way.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
TRL_COLUMNS = 32768  # of a tile, as TRL's fused head asks for
VERL_TOKENS = 512  # of a chunk, verl's default
IGNORED = -100  # the label of a token that does not count


class LossArm(Arm):
    """A loss of a problem's leaves; ``run`` leaves the loss in ``loss`` and the gradients in the leaves."""

    def __init__(self, problem: LossProblem, threads: int) -> None:
        self.problem, self.threads = problem, threads
        self.computes, self.tolerance = problem.dtype, TOLERANCE[problem.dtype]

    def enter(self) -> None:
        """Thread count, and no gradients of the arm before."""
        super().enter()
        self.problem.hidden.grad = self.problem.weight.grad = None

    def run(self, part: int) -> None:
        loss = self.forward()
        loss.backward()
        self.loss = loss.detach()

    def forward(self) -> Tensor:
        """The loss, 0-D."""
        raise NotImplementedError


class PeerLoss(LossArm):
    """An arm of another project: what it raises when run becomes the reason why it is absent."""

    @functools.cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """hidden (T, D), a view, and ids (T,)."""
        return self.problem.hidden.flatten(0, 1), self.problem.ids.flatten()

    def run(self, part: int) -> None:
        self.__dict__.pop("tokens", None)  # the view belongs to one graph
        try:
            super().run(part)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise UnavailableError(f"does not run here: {type(error).__name__}: {first}") from error

    def of_all(self, logprobs: Tensor) -> Tensor:
        """The loss from the log-probabilities (T,) of all tokens."""
        mask = self.problem.mask.flatten()
        losses = self.problem.token_losses(logprobs, torch.arange(len(mask), device=mask.device))
        return (losses * mask).sum() / mask.sum()


def imported(package: str, module: str) -> Any:
    """A module of another project. Raises UnavailableError where it, or something it needs, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package} cannot be imported: {error}") from error


# -- torch ------------------------------------------------------------------------------------------------------------
class Torch(PeerLoss):
    """All logits at once, softmax in fp32, autograd; ``compact``: of the tokens that count alone."""

    def __init__(self, problem: LossProblem, threads: int, *, compact: bool) -> None:
        super().__init__(problem, threads)
        if compact and len(problem.rows) == problem.head.tokens:
            raise UnavailableError("every token counts: the same as torch")
        self.compact = compact

    def forward(self) -> Tensor:
        hidden, ids = self.tokens
        rows = self.problem.rows
        if self.compact:
            hidden, ids = hidden[rows], ids[rows]
        logits = torch.nn.functional.linear(hidden, self.problem.weight).float()
        logprobs = -torch.nn.functional.cross_entropy(logits, ids, reduction="none")
        return self.problem.token_losses(logprobs, rows).mean() if self.compact else self.of_all(logprobs)


# -- TRL --------------------------------------------------------------------------------------------------------------
class Trl(PeerLoss):
    """trl.kernels.ChunkedLogProbFunction, as its fused head calls it: tiles of 4096 tokens by 32768 columns."""

    def __init__(self, problem: LossProblem, threads: int) -> None:
        super().__init__(problem, threads)
        self.function = imported("trl", "trl.kernels").ChunkedLogProbFunction

    def forward(self) -> Tensor:
        hidden, ids = self.tokens
        rows = self.problem.rows
        columns = min(TRL_COLUMNS, self.problem.head.vocabulary)
        logprobs, *_ = self.function.apply(
            hidden[rows], self.problem.weight, None, ids[rows], 1.0, columns, None, 1.0, ()
        )
        return self.problem.token_losses(logprobs, rows).mean()


# -- Liger ------------------------------------------------------------------------------------------------------------
class LigerLoss(PeerLoss):
    """LigerFusedLinearGRPOLoss over all sequences at once, its fastest setting, not compiled.

    torch.compile takes the loss on the log-probabilities alone, and changes no time that can be seen beside products.
    """

    def __init__(self, problem: LossProblem, threads: int) -> None:
        super().__init__(problem, threads)
        module = imported("liger_kernel", "liger_kernel.chunked_loss.grpo_loss")
        self.function = module.LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            compiled=False,
            chunk_size=problem.head.sequences,
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            loss_type="dapo",  # mean over the tokens that count
        )

    def forward(self) -> Tensor:
        problem = self.problem
        streams = (problem.ids, problem.mask.float(), problem.advantages)
        loss, _ = self.function(problem.hidden, problem.weight, *streams, old_per_token_logps=problem.old_logprobs)
        return loss


class LigerCrossEntropy(PeerLoss):
    """LigerFusedLinearScaledCrossEntropyFunction: its Hopper kernel on such a GPU, else its torch fall-back."""

    def __init__(self, problem: LossProblem, threads: int) -> None:
        super().__init__(problem, threads)
        self.function = imported("liger_kernel", "liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def forward(self) -> Tensor:
        hidden, ids = self.tokens
        labels = ids.masked_fill(~self.problem.mask.flatten(), IGNORED)
        return self.of_all(-self.function.apply(hidden, self.problem.weight, labels))


# -- verl -------------------------------------------------------------------------------------------------------------
class Verl(PeerLoss):
    """verl's FusedLinearForPPO, its torch implementation; it computes the entropy too."""

    def __init__(self, problem: LossProblem, threads: int) -> None:
        super().__init__(problem, threads)
        module = imported("verl", "verl.utils.experimental.torch_functional")
        self.function = module.FusedLinearForPPO(chunk_size=VERL_TOKENS, impl_backend="torch")

    def forward(self) -> Tensor:
        logprobs, _ = self.function(self.problem.hidden, self.problem.weight, self.problem.ids)
        return self.of_all(logprobs.flatten())


class VerlTriton(PeerLoss):
    """verl's Triton linear_cross_entropy."""

    def __init__(self, problem: LossProblem, threads: int) -> None:
        super().__init__(problem, threads)
        if not problem.hidden.is_cuda:
            raise UnavailableError("verl's Triton kernels need a GPU")
        self.function = imported("verl", "verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def forward(self) -> Tensor:
        hidden, ids = self.tokens
        logprobs, _ = self.function(hidden, self.problem.weight, ids, 1.0, "none", None)
        return self.of_all(logprobs)
