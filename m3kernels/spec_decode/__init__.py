"""Tree drafting and verification: lossless, seed-exact, row-invariant; straight from logits and a paged cache."""

from m3kernels.spec_decode.exact_law import exact_law, target_law
from m3kernels.spec_decode.ops import (
    draft_topk,
    tree_attention,
    tree_budget,
    tree_commit,
    tree_finalize,
    tree_verify,
)
from m3kernels.spec_decode.sgl_compat import (
    build_tree_kernel_efficient,
    chain_speculative_sampling,
    chain_speculative_sampling_triton,
    reconstruct_indices_from_tree_mask,
    tree_speculative_sampling_target_only,
    verify_tree_greedy,
)
from m3kernels.spec_decode.types import Committed, Drafts, Tree, Verified

__all__ = [
    "Committed",
    "Drafts",
    "Tree",
    "Verified",
    "build_tree_kernel_efficient",
    "chain_speculative_sampling",
    "chain_speculative_sampling_triton",
    "draft_topk",
    "exact_law",
    "reconstruct_indices_from_tree_mask",
    "target_law",
    "tree_attention",
    "tree_budget",
    "tree_commit",
    "tree_finalize",
    "tree_speculative_sampling_target_only",
    "tree_verify",
    "verify_tree_greedy",
]
