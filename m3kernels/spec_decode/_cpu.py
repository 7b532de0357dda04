"""Native CPU room of the spec_decode family: AVX-512, AVX2, NEON or portable kernels, chosen at the first call."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def unsupported(op: str, first: Tensor, *args: Any) -> str:
    return "" if first.is_cpu else f"needs CPU tensors, not {first.device.type}"


# -- rows of logits: draft_topk, tree_verify --------------------------------------------------------------------------


# -- attention: tree_attention ----------------------------------------------------------------------------------------


# -- trees: tree_finalize, tree_commit, the drop-in set ---------------------------------------------------------------
