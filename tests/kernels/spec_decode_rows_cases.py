"""What the tests of the native kernels of rows of logits share: flat arguments of tree_verify and draft_topk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels.spec_decode.reference import links, make_inputs

MODES = ("greedy", "target_only", "chain", "coupled")

# logits, and what becomes of them: V, dtype, a change
ROWS: dict[str, dict[str, Any]] = {
    "one_token": dict(vocabulary=1),
    "two_tokens": dict(vocabulary=2),
    "odd": dict(vocabulary=37),
    "one_group": dict(vocabulary=256),
    "group_and_one": dict(vocabulary=257, dtype=torch.bfloat16),
    "block_and_part": dict(vocabulary=1031, dtype=torch.float16),
    "blocks": dict(vocabulary=4096, sharpness=1.0),
    "blocks_and_part": dict(vocabulary=2100),
    "flat": dict(vocabulary=3001, sharpness=0.01),
    "constant": dict(vocabulary=1500, change="constant"),
    "ties": dict(vocabulary=2500, change="ties", dtype=torch.bfloat16),
    "few_allowed": dict(vocabulary=700, change="few"),
    "holes": dict(vocabulary=515, change="holes"),
    "nothing_after_the_root": dict(vocabulary=66, change="nothing"),
    "nan": dict(vocabulary=300, change="nan", dtype=torch.float16),
    "infinite": dict(vocabulary=300, change="infinite"),
    "huge": dict(vocabulary=300, change="huge"),
    "lowest": dict(vocabulary=300, change="lowest"),
}
FILTERS: dict[str, dict[str, tuple[float, ...]]] = {
    "plain": dict(temperature=(1.0, 0.6, 1.7)),
    "mixed_with_greedy": dict(temperature=(0.0, 1.0, 0.0)),
    "top_k": dict(temperature=(1.0, 0.7, 1.3), top_k=(20, 1, 3)),
    "large_top_k": dict(temperature=(1.0, 0.7, 1.3), top_k=(1100, 290, 2000)),
    "top_p": dict(temperature=(1.0, 0.7, 1.3), top_p=(0.9, 0.5, 0.999)),
    "min_p": dict(temperature=(1.0, 0.7, 1.3), min_p=(0.05, 1.0, 1e-4)),
    "all": dict(temperature=(1.0, 0.7, 1.3), top_k=(20, 0, 2000), top_p=(0.9, 0.95, 0.8), min_p=(0.01, 0.0, 0.02)),
    "extreme": dict(temperature=(1e-6, 1e6, 3e38), top_p=(0.9, 0.3, 1e-6), min_p=(0.0, 0.2, 0.0)),
}


def changed(logits: Tensor, change: str) -> Tensor:
    """logits (B, N, V) with what the name says."""
    vocabulary = logits.shape[-1]
    if change == "constant":
        return torch.zeros_like(logits)
    if change == "ties":
        return (logits * 2).round() / 2
    if change == "few":
        return logits.masked_fill(torch.arange(vocabulary) % 97 != 3, -torch.inf)
    if change == "holes":
        return logits.masked_fill(torch.rand(logits.shape) < 0.5, -torch.inf)
    if change == "nothing":
        return torch.cat([logits[:, :1], torch.full_like(logits[:, 1:], -torch.inf)], 1)
    if change == "nan":
        return logits.masked_fill(torch.rand(logits.shape) < 0.2, torch.nan)
    if change == "infinite":
        logits[..., 5::61] = torch.inf
        return logits
    if change == "huge":
        return logits * 1e37
    if change == "lowest":
        return torch.full_like(logits, torch.finfo(torch.float32).min)
    return logits


def verification(
    mode: str,
    filters: dict[str, tuple[float, ...]],
    *,
    vocabulary: int,
    nodes: int = 7,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 3.0,
    change: str = "",
    coins: bool = True,
    grammar: bool = False,
    logprobs: str = "none",
    width: int | None = None,
    seed: int = 0,
) -> list[Any]:
    """The flat arguments of tree_verify for three requests."""
    x = make_inputs(3, nodes, vocabulary, topk=3, depth=3, sharpness=sharpness, seed=seed)
    logits = changed(x["logits"], change).to(dtype)
    kinds = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    parameters = [torch.tensor(filters[name], dtype=kind) if name in filters else None for name, kind in kinds.items()]
    drawn = [torch.rand(3, nodes).double() / 2, torch.rand(3).double()] if coins else [None, None]
    words = torch.randint(-(2**31), 2**31, (3, nodes, -(-vocabulary // 32))).int() if grammar else None
    return [
        logits, x["candidates"], x["next_token"], x["next_sibling"], *parameters, torch.tensor([3, -9, 2**40]),
        torch.tensor([11, 0, 2**33]), *drawn, (torch.randn(3, nodes, vocabulary) * 2).softmax(-1), words, mode,
        nodes if width is None else width, logprobs,
    ]  # fmt: skip


def single(logits: Tensor, mode: str, *, final_coins: Tensor, **given: Any) -> list[Any]:
    """The flat arguments for one node a request, logits (V,) for every request: what is drawn from one row."""
    requests, vocabulary = len(final_coins), len(logits)
    filled = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **given}
    parameters = [torch.full((requests,), filled[name]) for name in ("temperature", "top_p", "min_p")]
    parameters.insert(1, torch.full((requests,), filled["top_k"], dtype=torch.int32))
    none = torch.full((requests, 1), -1)
    return [
        logits.expand(requests, 1, vocabulary), none, none, none, *parameters, None, None,
        torch.zeros(requests, 1).double(), final_coins, None, None, mode, 1, "sampling",
    ]  # fmt: skip


def star(requests: int, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """candidates, next_token, next_sibling of roots whose children hold the tokens."""
    parents = torch.tensor([[-1, *[0] * len(tokens)]], dtype=torch.int32).expand(requests, -1)
    _, _, next_token, next_sibling = links(parents)
    return torch.tensor([[0, *tokens]]).repeat(requests, 1), next_token, next_sibling


DRAFTS: dict[str, dict[str, Any]] = {
    "one": dict(frontier=1, vocabulary=1, k=1),
    "first_step": dict(frontier=1, vocabulary=257, k=8, step=0),
    "second_step": dict(frontier=4, vocabulary=1031, k=4, step=1, dtype=torch.bfloat16),
    "third_step": dict(frontier=8, vocabulary=300, k=8, step=2, dtype=torch.float16),
    "whole_vocabulary": dict(frontier=2, vocabulary=67, k=67),
    "more_than_groups": dict(frontier=2, vocabulary=5000, k=64),
    "large_k": dict(frontier=1, vocabulary=9000, k=700),
    "ties": dict(frontier=3, vocabulary=2000, k=16, change="ties"),
    "constant": dict(frontier=3, vocabulary=600, k=5, change="constant"),
    "holes": dict(frontier=3, vocabulary=40, k=33, change="holes"),
    "nan": dict(frontier=2, vocabulary=300, k=7, change="nan"),
    "infinite": dict(frontier=2, vocabulary=300, k=7, change="infinite"),
    "lowest": dict(frontier=2, vocabulary=300, k=7, change="lowest"),
    "nothing": dict(frontier=3, vocabulary=50, k=6, change="nothing"),
    "other_ids": dict(frontier=2, vocabulary=300, k=7, offsets=True),
    "noise": dict(frontier=3, vocabulary=1031, k=9, noise=True),
    "noise_other_ids": dict(frontier=3, vocabulary=1031, k=9, noise=True, offsets=True),
    "noise_holes": dict(frontier=3, vocabulary=40, k=33, noise=True, change="holes"),
    "noise_lowest": dict(frontier=2, vocabulary=300, k=7, noise=True, change="lowest"),
    "noise_nothing": dict(frontier=3, vocabulary=50, k=6, noise=True, change="nothing", dtype=torch.bfloat16),
}


def drafting(
    *,
    frontier: int,
    vocabulary: int,
    k: int,
    step: int = 1,
    dtype: torch.dtype = torch.float32,
    change: str = "",
    offsets: bool = False,
    noise: bool = False,
) -> list[Any]:
    """The flat arguments of draft_topk for two requests, one of which has a path that is not possible."""
    logits = changed(torch.randn(2, frontier, vocabulary) * 3, change).to(dtype)
    scores = -torch.rand(2, frontier)
    scores[1, -1] = -torch.inf
    d2t = torch.randint(0, 9, (vocabulary,)).cumsum(0) if offsets else None
    keys = [torch.tensor([5, -(2**60)]), torch.tensor([2**35, 8])] if noise else [None, None]
    return [logits, scores, d2t, *keys, k, step]
