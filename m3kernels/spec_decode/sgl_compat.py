"""Placeholder until the drop-in set is written."""

from __future__ import annotations

from typing import Any


def build_tree_kernel_efficient(*args: Any) -> None: ...


def verify_tree_greedy(*args: Any) -> None: ...


def tree_speculative_sampling_target_only(*args: Any) -> None: ...


def chain_speculative_sampling(*args: Any) -> None: ...


chain_speculative_sampling_triton = chain_speculative_sampling


def reconstruct_indices_from_tree_mask(*args: Any) -> None: ...
