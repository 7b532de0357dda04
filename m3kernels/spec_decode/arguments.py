"""Checks of the spec_decode family's arguments: shapes, dtypes, devices always; values where reading them is free."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from m3kernels.checks import has_data, is_strided, refuse
from m3kernels.spec_decode.types import BITS, COLDEST

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_NAMES = "float32, bfloat16 or float16"
CACHE_DTYPES = (*DTYPES, torch.int8)
INTEGERS = (torch.int32, torch.int64)
MOST = 2**31 - 1  # of integers that kernels take as int32


def want(op: str, argument: str, wanted: str, got: object, good: bool) -> None:
    """Raise the error of a broken contract unless good."""
    if not good:
        raise refuse(op, argument, wanted, got)


def logits_like(value: object, ndim: int) -> bool:
    return is_strided(value) and value.ndim == ndim and value.dtype in DTYPES


def near(value: Tensor, first: Tensor) -> bool:
    return value.device == first.device


def on(first: Tensor) -> str:
    return "" if first.device.type == "cpu" else f" on {first.device}"


def is_integer(value: object, low: int | None = None, high: int | None = None) -> bool:
    good = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return good and (low is None or high is None or low <= value <= high)  # type: ignore[operator]


def is_number(value: object) -> bool:
    """Whether value is a number that is finite in fp32."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return good and abs(value) <= torch.finfo(torch.float32).max  # type: ignore[arg-type]


def as_int32(value: Tensor) -> Tensor:
    """Contiguous; what int32 cannot hold becomes its nearest bound, not another valid value."""
    narrow = value if value.dtype == torch.int32 else value.clamp(-MOST - 1, MOST).to(torch.int32)
    return narrow.contiguous()


def check_constant(op: str, **given: Tensor | None) -> None:
    """No op of the family is differentiable: a gradient that is wanted would be lost silently."""
    for name, value in given.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise refuse(op, name, "no gradient (call under torch.no_grad())", "requires_grad")


def all_positive(values: Tensor) -> bool:
    return bool((values.isfinite() & (values > 0)).all())


def readable(*values: Tensor) -> bool:
    """Whether values can be looked at here without a synchronisation: plain CPU tensors outside a trace."""
    plain = all(type(value) is Tensor and has_data(value) and value.is_cpu for value in values)
    return plain and not torch.compiler.is_compiling()


def expect(
    op: str, name: str, value: object, first: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """value, a tensor of this shape and one of these dtypes on first's device, without a gradient."""
    if not (is_strided(value) and value.shape == shape and value.dtype in dtypes and value.device == first.device):
        names = " or ".join(str(choice).removeprefix("torch.") for choice in dtypes)
        raise refuse(op, name, f"{tuple(shape)} {names}{on(first)}", value)
    if value.requires_grad:
        check_constant(op, **{name: value})
    return value


def vector(
    op: str,
    name: str,
    value: object,
    first: Tensor,
    dtypes: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    count: int | None = None,
) -> Tensor:
    """A (count,) tensor of one of dtypes on first's device, as contiguous dtype; count defaults to first's requests."""
    found = expect(op, name, value, first, (first.shape[0] if count is None else count,), dtypes)
    if found.dtype == dtype and found.is_contiguous():
        return found
    return as_int32(found) if dtype == torch.int32 else found.to(dtype).contiguous()


def check_caches(op: str, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor], first: Tensor) -> None:
    written = op == "tree_commit"
    names = ("k_caches", "v_caches") if written else ("k_cache", "v_cache")
    for name, caches in zip(names, (k_caches, v_caches), strict=True):
        want(op, name, "a list or tuple of tensors", caches, isinstance(caches, (list, tuple)))
    want(op, names[1], f"{len(k_caches)} caches, as {names[0]}", f"{len(v_caches)}", len(v_caches) == len(k_caches))
    for name, caches in zip(names, (k_caches, v_caches), strict=True):
        for cache in caches:
            _check_cache(op, name, cache, k_caches[0], first, written)


def _check_cache(op: str, name: str, cache: Tensor, one: Tensor, first: Tensor, written: bool) -> None:
    if not (is_strided(cache) and cache.ndim == 4 and cache.dtype in CACHE_DTYPES and cache.device == first.device):
        raise refuse(op, name, f"(P, page_size, G, D) float32, bfloat16, float16 or int8{on(first)}", cache)
    if cache.shape != one.shape or cache.dtype != one.dtype or cache.shape[1] < 1:
        raise refuse(op, name, f"{tuple(one.shape)} {one.dtype}, page_size at least 1, like the first", cache)
    if cache.requires_grad:
        check_constant(op, **{name: cache})
    if not written or cache.is_contiguous():
        return
    if any(step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape, strict=True)):
        raise refuse(op, name, "elements that do not share memory", "an expanded tensor")
    if cache.stride(-1) != 1 and cache.shape[-1] > 1:
        raise refuse(op, name, "a last dimension that is contiguous", f"strides {cache.stride()}")


def check_scale(op: str, name: str, scale: object, cache: Tensor) -> None:
    """That scale is the one of each row of an int8 cache; None of any other."""
    if cache.dtype != torch.int8:
        if scale is not None:
            raise refuse(op, name, f"None with {str(cache.dtype).removeprefix('torch.')} caches", scale)
        return
    good = is_strided(scale) and scale.shape == cache.shape[:3] and scale.dtype == torch.float32 and near(scale, cache)
    if not (is_strided(scale) and good):
        raise refuse(op, name, f"{tuple(cache.shape[:3])} float32{on(cache)} with int8 caches", scale)
    if scale.requires_grad:
        check_constant(op, **{name: scale})


def check_scales(op: str, name: str, scales: Sequence[Tensor], caches: Sequence[Tensor]) -> None:
    """That scales are those of the caches of all layers, if these are int8, and can be written."""
    want(op, name, "a list or tuple of tensors", scales, isinstance(scales, (list, tuple)))
    count = len(caches) if len(caches) and caches[0].dtype == torch.int8 else 0
    want(op, name, f"{count} tensors, one of each int8 cache", f"{len(scales)}", len(scales) == count)
    for scale, cache in zip(scales, caches, strict=False):
        check_scale(op, name, scale, cache)
        if any(step == 0 and size > 1 for step, size in zip(scale.stride(), scale.shape, strict=True)):
            raise refuse(op, name, "elements that do not share memory", "an expanded tensor")


def check_block_table(op: str, block_table: object, first: Tensor, requests: int | None = None) -> int:
    good = is_strided(block_table) and block_table.ndim == 2 and block_table.dtype in INTEGERS
    good = good and near(block_table, first) and requests in (None, len(block_table))  # type: ignore[arg-type]
    if not good:
        wanted = f"({'B' if requests is None else requests}, max_pages) int32 or int64{on(first)}"
        raise refuse(op, "block_table", wanted, block_table)
    return len(block_table)  # type: ignore[arg-type]


def with_rows(value: Tensor) -> Tensor:
    """value, or a copy of it, whose last dimension is contiguous."""
    return value if value.stride(-1) == 1 or value.shape[-1] <= 1 else value.contiguous()


def gate_rows(gate: Tensor) -> bool:
    """Whether each row of a gate, (T, H) or (T, H, D), is contiguous; rows may have any distance."""
    if gate.is_contiguous():
        return True
    shape, strides = gate.shape, gate.stride()
    return (strides[-1] == 1 or shape[-1] <= 1) and (gate.ndim == 2 or strides[1] == shape[2] or shape[1] <= 1)


def packed(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def check_queries(
    op: str,
    cu: Tensor,
    seqlens: Tensor,
    block_table: Tensor,
    rows: Tensor,
    page_size: int,
    mask_bits: Tensor | None,
    tree_lens: Tensor | None,
) -> None:
    """Values of the small integer tensors, on CPU."""
    if not readable(cu, seqlens) or (tree_lens is not None and not readable(tree_lens)):
        return
    bounds, lengths = cu.tolist(), seqlens.tolist()
    count = [stop - start for start, stop in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != len(rows) or min(count, default=0) < 0:
        raise refuse(op, "cu_seqlens_q", f"0 = cu[0] <= ... <= cu[-1] = {len(rows)}", f"{bounds[:8]}")
    trees = count if tree_lens is None else tree_lens.tolist()
    if tree_lens is not None and min(trees, default=0) < 0:
        raise refuse(op, "tree_lens", "values of at least 0", f"{trees[:8]}")
    if any(length < tree for length, tree in zip(lengths, trees, strict=True)):
        wanted = "at least the queries of each request" if tree_lens is None else "at least tree_lens"
        raise refuse(op, "cache_seqlens", wanted, f"{lengths[:8]}")
    longest = max((length for length, queries in zip(lengths, count, strict=True) if queries), default=0)
    if -(-longest // page_size) > block_table.shape[1]:
        raise refuse(op, "block_table", f"room for {-(-longest // page_size)} pages a request", block_table)
    if mask_bits is not None:
        most = max((tree for tree, queries in zip(trees, count, strict=True) if queries), default=0)
        if mask_bits.shape[-1] * BITS < most:
            raise refuse(op, "mask_bits", f"at least {most} bits a row", mask_bits)


def check_paths(op: str, accept_index: Tensor, accept_length: Tensor, seqlens: Tensor, most: int) -> None:
    """Values of the small integer tensors, on CPU: paths of ascending nodes below ``most``."""
    if not readable(accept_index, accept_length, seqlens):
        return
    width = accept_index.shape[1]
    for length in seqlens.tolist():
        if not 0 <= length <= MOST - width:
            raise refuse(op, "cache_seqlens", f"values in 0..{MOST - width}", f"{seqlens.tolist()[:8]}")
    for path, length in zip(accept_index.tolist(), accept_length.tolist(), strict=True):
        if not 0 <= length < width:
            raise refuse(op, "accept_length", f"values in 0..{width - 1}", f"{accept_length.tolist()[:8]}")
        used = [-1, *path[: length + 1], most]
        if any(node >= following for node, following in itertools.pairwise(used)):
            raise refuse(op, "accept_index", f"ascending nodes in 0..{most - 1} along each path", f"{path[:8]}")


def check_walks(
    next_token: Tensor,
    next_sibling: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
    min_p: Tensor | None,
    coins: Tensor | None,
    final_coins: Tensor | None,
) -> None:
    """The values that tree_verify reads, for a room that does not check them itself.

    A child and a younger sibling have larger indices, so that every walk ends inside the tree.
    """
    op, nodes = "tree_verify", next_token.shape[1]
    index = torch.arange(nodes, device=next_token.device)
    for name, value in (("next_token", next_token), ("next_sibling", next_sibling)):
        bad = (value != -1) & ((value <= index) | (value >= nodes))
        _refuse_first(op, name, f"-1, or an index greater than the node's own and below {nodes}", value, bad)
    bad = (temperature != 0) & ~((temperature >= COLDEST) & temperature.isfinite())
    _refuse_first(op, "temperature", "0, or a finite number of at least 1e-6", temperature, bad)
    if top_p is not None:
        _refuse_first(op, "top_p", "values in (0, 1]", top_p, ~((top_p > 0) & (top_p <= 1)))
    if min_p is not None:
        _refuse_first(op, "min_p", "values in [0, 1]", min_p, ~((min_p >= 0) & (min_p <= 1)))
    for name, coin in (("coins", coins), ("final_coins", final_coins)):
        if coin is not None:
            _refuse_first(op, name, "values in [0, 1)", coin, ~((coin >= 0) & (coin < 1)))


def _refuse_first(op: str, name: str, wanted: str, value: Tensor, bad: Tensor) -> None:
    if bool(bad.any()):
        raise refuse(op, name, wanted, f"{value[bad][0].item()}")
