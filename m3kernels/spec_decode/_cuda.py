"""CUDA room of the spec_decode family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from m3kernels import cuda
from m3kernels.spec_decode import cuda_attention, cuda_commit
from m3kernels.spec_decode.cuda_attention import tree_attention
from m3kernels.spec_decode.cuda_commit import tree_commit

__all__ = ["tree_attention", "tree_commit", "unsupported"]

REFUSALS: dict[str, Callable[..., str]] = {"tree_attention": cuda_attention.refusal, "tree_commit": cuda_commit.refusal}


def unsupported(op: str, first: Tensor, *args: Any) -> str:
    return cuda.refusal(first) or (REFUSALS[op](first, *args) if op in REFUSALS else "")
