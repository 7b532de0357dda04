"""tree_commit of the CUDA room: caches of one shape and stride move in one launch, with the hidden states."""

from __future__ import annotations

from collections import defaultdict
from math import gcd

import torch
from torch import Tensor

from m3kernels import _cuda_ext, cuda
from m3kernels.checks import refuse
from m3kernels.cuda import span

UNITS = (16, 4, 2, 1)  # bytes that a thread copies at a time


def refusal(accept_index: Tensor, *args: object) -> str:
    return ""


def _bytes(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


Sizes = tuple[int, ...]


def _group(caches: list[Tensor]) -> tuple[list[int], int, Sizes, Sizes]:
    """Caches of one shape and stride: addresses, bytes of a unit, shape and strides in units."""
    first, size = caches[0], caches[0].element_size()
    pages, page_size, heads, row = first.shape
    addresses = [cache.data_ptr() for cache in caches]
    strides = [stride * size for stride in first.stride()[:3]]
    common = gcd(*addresses, *strides, row * size, UNITS[0])
    unit = next(unit for unit in UNITS if common % unit == 0)
    return addresses, unit, (pages, page_size, heads, row * size // unit), tuple(stride // unit for stride in strides)


def tree_commit(
    accept_index: Tensor,
    accept_length: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    op = "tree_commit"
    requests, width = accept_index.shape
    alike: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for cache in (*k_caches, *v_caches):
        if cache.ndim != 4 or cache.device != accept_index.device or (cache.stride(3) != 1 and cache.shape[3] > 1):
            raise refuse(op, "k_caches", f"caches (P, page_size, G, D), D contiguous, on {accept_index.device}", cache)
        if cache.numel() and block_table.shape[1]:
            alike[(cache.shape, cache.stride(), cache.element_size())].append(cache)
    new_seqlens = torch.empty_like(cache_seqlens)
    accepted = torch.empty(0, dtype=torch.float32, device=accept_index.device)
    source: tuple[tuple[int, int], int, int, tuple[int, int]] = ((0, 0), 0, 0, (0, 0))
    if hidden is not None:
        if hidden.ndim != 3 or len(hidden) != requests or not hidden.is_contiguous():
            raise refuse(op, "hidden", f"contiguous ({requests}, N, C)", hidden)
        accepted = hidden.new_empty(requests, width, hidden.shape[2])
        source = (_bytes(hidden), hidden.shape[1], hidden.shape[2] * hidden.element_size(), _bytes(accepted))
    with cuda.on_device(accept_index):
        _cuda_ext.spec_decode_tree_commit(
            span(op, "accept_index", accept_index, torch.int32, accept_index),
            span(op, "accept_length", accept_length, torch.int32, accept_index),
            requests,
            width,
            span(op, "block_table", block_table, torch.int32, accept_index),
            block_table.shape[1],
            span(op, "cache_seqlens", cache_seqlens, torch.int32, accept_index),
            [_group(caches) for caches in alike.values()],
            source,
            span(op, "cache_seqlens", new_seqlens, torch.int32, accept_index),
            cuda.stream(accept_index),
        )
    return new_seqlens, accepted
