"""Cases of the policy_loss tests: named heads and specs, and what plain torch with full logits makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.policy_loss import LossSpec, linear_policy_loss, policy_loss_from_logprobs
from m3kernels.policy_loss.reference import TOLERANCE, make_inputs
from m3kernels.testing import check_error

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
every_room_and_triton = pytest.mark.parametrize("backend", (*ROOMS, "triton"), indirect=True)
native = pytest.mark.parametrize("backend", ("cpu",), indirect=True)
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": dict(bias=True),
    "temperature": dict(temperature=0.7),
    "temperatures": dict(temperature="each"),
    "softcap": dict(softcap=2.0),
    "scale": dict(logit_scale=0.3),
    "everything": dict(bias=True, temperature="each", softcap=3.0, logit_scale=1.7),
}
SPECS: dict[str, dict[str, Any]] = {
    "token": {},
    "step": dict(ratio_level="step", clip_low=0.01, clip_high=0.02),
    "sequence": dict(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"),
    "dual": dict(dual_clip=1.5, aggregation="constant", constant_length=40),
    "one_sided": dict(clip="one_sided", clip_high=0.1, kl_coef=0.2, kl_estimator="k1"),
    "no_clip": dict(clip="none", kl_coef=0.3, kl_estimator="k2", kl_in="reward"),
    "kl_loss": dict(kl_coef=0.3, kl_ratio_weighted=True),
    "kl_sequence": dict(kl_coef=0.3, ratio_level="sequence", kl_ratio_weighted=True),
    "entropy": dict(entropy_coef=0.05),
    "truncated": dict(sampler_level="token", sampler_high=1.1),
    "masked": dict(sampler_level="token", sampler_mode="mask", sampler_low=0.8, sampler_high=1.2),
    "sequence_truncated": dict(sampler_level="sequence", sampler_high=1.5, ratio_level="step"),
}
every_spec = pytest.mark.parametrize("spec", SPECS)


def in_rooms(cases: Iterable[str], triton: tuple[str, ...], name: str) -> pytest.MarkDecorator:
    """Every case in every room, and a few in Triton's interpreter, which is slow (test_policy_loss_triton.py: more)."""
    pairs = [(room, case) for room in ROOMS for case in cases] + [("triton", case) for case in triton]
    return pytest.mark.parametrize(("backend", name), pairs, indirect=["backend"])


STREAMS = ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs", "mask", "segment_ids", "cu_seqlens")


def inputs(rows: int = 53, size: int = 24, vocabulary: int = 301, **options: Any) -> dict[str, Any]:
    return make_inputs(rows, size, vocabulary, **{"sequences": 4, "density": 0.7, **options})


def streams(case: dict[str, Any]) -> dict[str, Any]:
    return {name: case[name] for name in STREAMS}


def head_of(options: dict[str, Any], rows: int) -> dict[str, Any]:
    """Keyword arguments of a head, without its bias."""
    found = {key: value for key, value in options.items() if key != "bias"}
    if found.get("temperature") == "each":
        found["temperature"] = torch.linspace(0.5, 2.0, max(rows, 1))[:rows]
    return found


def leaves(case: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """hidden, weight and, if there is one, bias, as fresh leaves."""
    tensors = [case[key] for key in ("hidden", "weight", "bias") if case[key] is not None]
    return [x.to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def run(case: dict[str, Any], dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, list[Tensor], Any]:
    """(loss, gradients, metrics) of linear_policy_loss."""
    x = leaves(case, dtype)
    bias = x[2] if len(x) > 2 else None
    loss, metrics = linear_policy_loss(x[0], x[1], case["ids"], bias=bias, **{**streams(case), **options})
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in x], metrics  # type: ignore[misc]


def logits_in_torch(x: list[Tensor], temperature: Any = 1.0, softcap: float = 0.0, logit_scale: float = 1.0) -> Tensor:
    z = F.linear(x[0], x[1], x[2] if len(x) > 2 else None) * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    scale = temperature[:, None].to(z.dtype) if isinstance(temperature, Tensor) else temperature
    return z / scale


def run_in_torch(case: dict[str, Any], dtype: torch.dtype, spec: LossSpec, **head: Any) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) with full logits and autograd, all in dtype; log-softmax in fp32 for halves, as trainers do."""
    x = leaves(case, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logp = logits_in_torch(x, **head).to(wide).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, case["ids"][:, None])[:, 0]
    loss, _ = policy_loss_from_logprobs(chosen, spec=spec, entropy=entropy, **streams(case))
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in x]  # type: ignore[misc]


def check_run(actual: Any, case: dict[str, Any], spec: LossSpec, dtype: torch.dtype, **head: Any) -> None:
    """The error rule on the loss and on every gradient."""
    loss, grads, _ = actual
    exact_loss, exact = run_in_torch(case, torch.float64, spec, **head)
    torch_loss, in_torch = run_in_torch(case, dtype, spec, **head)
    scale = torch.ones(1)  # a loss near 0 is a sum that cancels: what rounding does to it is relative to its terms
    check_error(loss + scale, exact_loss + scale.double(), torch_loss + scale, TOLERANCE)
    for ours, theirs, best in zip(grads, in_torch, exact, strict=True):
        check_error(ours, best, theirs, TOLERANCE)
