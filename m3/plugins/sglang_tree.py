"""Which of SGLang's tree kernels m3kernels replaces, by the path under which SGLang has them.

The functions are those of m3kernels.spec_decode.sgl_compat as they are: same names, arguments and buffers. SGLang's
hook registry carries a replacement into every module that has imported the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from m3kernels.spec_decode import sgl_compat

_OPS = "sglang.kernels.ops.speculative"
REPLACEMENTS: dict[str, Callable[..., Any]] = {
    f"{_OPS}.tree.build_tree_kernel_efficient": sgl_compat.build_tree_kernel_efficient,
    f"{_OPS}.tree.reconstruct_indices_from_tree_mask": sgl_compat.reconstruct_indices_from_tree_mask,
    f"{_OPS}.tree.verify_tree_greedy": sgl_compat.verify_tree_greedy,
    f"{_OPS}.sampling.tree_speculative_sampling_target_only": sgl_compat.tree_speculative_sampling_target_only,
}
