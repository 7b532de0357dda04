"""Triton room of spec_decode, for NVIDIA and AMD GPUs; interpreted on CPU tensors. The kernels lie beside it:

    triton_arithmetic  launches, order of floats, Philox noise
    triton_attention   tree_attention
    triton_verify      tree_verify
    triton_draft       draft_topk
    triton_tree        tree_finalize, build_tree_kernel_efficient, reconstruct_indices_from_tree_mask
    triton_commit      tree_commit
    triton_sampling    verify_tree_greedy, tree_speculative_sampling_target_only, chain_speculative_sampling

A launch reads no device memory on the host and allocates by torch.empty alone: calls can be captured in a CUDA graph
after a first one (tree_commit makes its table of addresses there). Nothing is atomic; every result is deterministic and
depends on its own row and request only. What the CPU rooms refuse after reading values, a kernel survives: it touches
no memory that is not the call's. Interpreted, bf16 is loaded, stored and rounded right and computed as fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels.spec_decode import (
    triton_attention,
    triton_commit,
    triton_draft,
    triton_sampling,
    triton_tree,
    triton_verify,
)
from m3kernels.spec_decode.triton_arithmetic import INTERPRET
from m3kernels.spec_decode.triton_attention import tree_attention
from m3kernels.spec_decode.triton_commit import tree_commit
from m3kernels.spec_decode.triton_draft import MOST, draft_topk
from m3kernels.spec_decode.triton_sampling import (
    chain_speculative_sampling,
    tree_speculative_sampling_target_only,
    verify_tree_greedy,
)
from m3kernels.spec_decode.triton_tree import (
    build_tree_kernel_efficient,
    reconstruct_indices_from_tree_mask,
    tree_finalize,
)
from m3kernels.spec_decode.triton_verify import tree_verify
from m3kernels.triton_compile import CompileCase

__all__ = [
    "build_tree_kernel_efficient",
    "chain_speculative_sampling",
    "compile_cases",
    "draft_topk",
    "reconstruct_indices_from_tree_mask",
    "tree_attention",
    "tree_commit",
    "tree_finalize",
    "tree_speculative_sampling_target_only",
    "tree_verify",
    "unsupported",
    "verify_tree_greedy",
]

LARGEST_HEAD = 256


def unsupported(op: str, first: Tensor, *args: Any) -> str:
    if op == "tree_attention" and first.shape[-1] > LARGEST_HEAD:
        return f"heads of at most {LARGEST_HEAD} elements, not {first.shape[-1]}"
    if op == "draft_topk" and max(args[4], first.shape[1]) > MOST:
        return f"at most {MOST} rows and {MOST} tokens of each"
    if first.device.type == "cpu":
        return "" if INTERPRET else "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
    if first.device.type != "cuda":
        return f"no Triton target for {first.device.type} tensors"
    if INTERPRET:
        return "TRITON_INTERPRET=1 interprets kernels: CPU tensors only"
    if torch.version.hip is None and torch.cuda.get_device_capability(first.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return ""


def compile_cases(target: str) -> list[CompileCase]:
    """Every launch that the compile test builds for a target."""
    parts = (triton_attention, triton_verify, triton_draft, triton_tree, triton_commit, triton_sampling)
    return [case for part in parts for case in part.cases(target)]
