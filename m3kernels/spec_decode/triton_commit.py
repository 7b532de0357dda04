"""Commit of an accepted path: keys and values of all layers move in one launch, hidden states are gathered in another.

The caches of a model, and the scales of int8 ones, which come as caches of rows of one element, are named by their
addresses, in an int64 tensor that is made once per list of caches; those of one shape and stride share a launch. A path
ascends, so node accept_index[j] >= j: in ascending order of j no slot is read after it was written, and a program owns
its columns of every slot, so that no other program can disturb it.
"""
# The arguments of a Triton kernel have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import functools
from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.spec_decode.triton_arithmetic import block, case, launch
from m3kernels.triton_compile import CompileCase

COLUMNS = 1024  # elements of a slot per program

WORD = {2: torch.int16, 4: torch.int32}  # elements are copied as bits
TL_WORD = {1: tl.int8, 2: tl.int16, 4: tl.int32}


@functools.lru_cache(maxsize=64)
def _address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device; made once for a list of caches, so that a captured graph only reads it."""
    table = torch.tensor(addresses, dtype=torch.int64)
    return table.to(device) if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


# Grid: (caches, requests, column blocks). A program owns COLUMNS elements of every slot of one request in one cache and
# copies slot prefix + accept_index[j] to slot prefix + j, j = 1.. in order (the root is where it belongs). A slot whose
# block id lies outside the cache is neither read nor written.
@triton.jit(do_not_specialize=["width", "table_width"])
def _move_kernel(
    addresses,
    accept_index,
    accept_length,
    block_table,
    cache_seqlens,
    width,
    table_width,
    pages,
    page_size,
    heads,
    head_size,
    page_stride,
    slot_stride,
    head_stride,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(1)
    address = tl.load(addresses + tl.program_id(0))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    cache = address.to(tl.pointer_type(WORD))
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    head = column // head_size
    at = head.to(tl.int64) * head_stride + (column - head * head_size)
    accept_index += b.to(tl.int64) * width
    block_table += b.to(tl.int64) * table_width
    prefix = tl.load(cache_seqlens + b)
    last = tl.minimum(tl.load(accept_length + b), width - 1)
    for j in range(last + 1):
        node = tl.load(accept_index + j)
        source = prefix + node
        target = prefix + j
        room = (prefix >= 0) & (node > j) & (source // page_size < table_width)
        source_block = tl.load(block_table + source // page_size, mask=room, other=-1)
        target_block = tl.load(block_table + target // page_size, mask=room, other=-1)
        good = room & (source_block >= 0) & (source_block < pages) & (target_block >= 0) & (target_block < pages)
        source_at = source_block.to(tl.int64) * page_stride + (source % page_size).to(tl.int64) * slot_stride
        target_at = target_block.to(tl.int64) * page_stride + (target % page_size).to(tl.int64) * slot_stride
        mask = head < tl.where(good, heads, 0)
        value = tl.load(cache + source_at + at, mask=mask)
        tl.store(cache + target_at + at, value, mask=mask)


# Grid: (requests * width, column blocks). A program writes COLUMNS columns of slot j: those of the path's j-th node,
# zeros after the path.
@triton.jit(do_not_specialize=["width", "nodes"])
def _hidden_kernel(hidden, accept_index, accept_length, out, width, nodes, columns, COLUMNS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    b = slot // width
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    node = tl.load(accept_index + slot)
    used = (slot - b * width <= tl.load(accept_length + b)) & (node >= 0) & (node < nodes)
    read = column < tl.where(used, columns, 0)
    value = tl.load(hidden + (b * nodes + node) * columns + column, mask=read, other=0)
    tl.store(out + slot * columns + column, value, mask=column < columns)


def tree_commit(
    accept_index: Tensor,
    accept_length: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    requests, width = accept_index.shape
    device = accept_index.device
    alike: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for cache in (*k_caches, *v_caches):
        if cache.numel() and block_table.shape[1]:
            alike[(cache.shape, cache.stride(), cache.element_size())].append(cache)
    for caches in alike.values():
        pages, page_size, heads, head_size = caches[0].shape
        size = caches[0].element_size()
        strides = caches[0].stride()
        assert head_size == 1 or strides[3] == 1, "rows of a cache are contiguous"
        addresses = tuple(cache.data_ptr() for cache in caches)
        aligned = all(address % 16 == 0 for address in addresses)
        columns = block(heads * head_size, COLUMNS)
        launch(
            _move_kernel,
            (len(caches), requests, triton.cdiv(heads * head_size, columns)),
            accept_index,
            _address_table(addresses, device), accept_index, accept_length, block_table, cache_seqlens,
            width, block_table.shape[1], pages, page_size, heads, head_size, *strides[:3],
            WORD=TL_WORD[size],
            ALIGNED=aligned,
            COLUMNS=columns,
        )  # fmt: skip
    seqlens = torch.add(cache_seqlens, accept_length).add_(1)
    if hidden is None:
        return seqlens, torch.empty(0, dtype=torch.float32, device=device)
    _, nodes, columns = hidden.shape
    accepted = torch.empty(requests, width, columns, dtype=hidden.dtype, device=device)
    bits = hidden.view(WORD[hidden.element_size()])
    launch(
        _hidden_kernel,
        (requests * width, triton.cdiv(columns, COLUMNS)),
        accept_index,
        bits, accept_index, accept_length, accepted.view(bits.dtype), width, nodes, columns,
        COLUMNS=block(columns, COLUMNS),
    )  # fmt: skip
    return seqlens, accepted


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def cases(target: str) -> list[CompileCase]:
    moves = [move_case(2, aligned=True), move_case(2, aligned=False), move_case(4, aligned=True)]
    return [*moves, move_case(1, aligned=True), hidden_case()]


def move_case(size: int, *, aligned: bool) -> CompileCase:
    return case(
        f"move_{8 * size}bit{'' if aligned else '_unaligned'}",
        _move_kernel,
        "addresses *i64, accept_index *i32, accept_length *i32, block_table *i32, cache_seqlens *i32, width i32, "
        "table_width i32, pages i32, page_size i32:16, heads i32, head_size i32:16, page_stride i32:16, "
        "slot_stride i32:16, head_stride i32:16",
        WORD=TL_WORD[size],
        ALIGNED=aligned,
        COLUMNS=COLUMNS,
    )


def hidden_case() -> CompileCase:
    return case(
        "hidden",
        _hidden_kernel,
        "hidden *i16, accept_index *i32, accept_length *i32, out *i16, width i32, nodes i32, columns i32:16",
        COLUMNS=COLUMNS,
    )
