"""Int4Weight: one packed INT4 weight (or a stack of experts), in the one layout that every backend reads.

    W[n, k] = (u[n, k] - z[n, group(k)]) * s[n, group(k)],   u in 0..15,   group(k) = (first_k + k) // group_size

Layout. The weight is cut into tiles of 64 rows (n) and 16 columns (k), 512 bytes each, stored (N/64, K/16) with k
contiguous, so that slices for tensor parallelism and experts are whole tiles. N is padded to 64 and K to 16 inside.
In a tile, lane (g, t), g in 0..7, t in 0..3, owns 16 bytes at ``t*128 + (g ^ 2t)*16``: four 32-bit words, one per
16-row sub-tile a. Byte b of a word holds k = 2t + (0, 8, 1, 9)[b]; its low nibble is row 16a+g, its high nibble row
16a+g+8. Hence ``(word >> {0,4,8,12}) & 0x000f000f`` are the registers of an mma.m16n8k16 A fragment, the xor spreads
lanes over shared-memory banks, and 32 (64) contiguous bytes are 8 (16) rows of the same four k for AVX2 (AVX-512).
Scales and zeros are stored (N/64, G, 64) with row 16a+8h+g at position 32h+4g+a: contiguous for all three.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import describe, has_data, is_strided, refuse
from m3kernels.dispatch import offered

TILE_N, TILE_K = 64, 16
HUGE_PAGE = 2 << 20  # bytes
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SYMMETRIC_ZERO = 8


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def num_groups(in_features: int, group_size: int, first_k: int = 0) -> int:
    """Groups that columns first_k .. first_k + in_features - 1 touch; the first and the last may be partial."""
    if group_size == -1:
        return 1
    return (first_k + in_features - 1) // group_size - first_k // group_size + 1


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, moved to 2 MiB pages where that pays: on Linux, on the CPU, from 2 MiB on.

    A weight streamed from memory in 4 KiB pages misses the TLB every 64 cache lines, and the prefetcher stops there.
    """
    size = tensor.numel() * tensor.element_size()
    if not hasattr(mmap, "MADV_HUGEPAGE") or tensor.device.type != "cpu" or size < HUGE_PAGE:
        return tensor
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    length = ceil_div(size, HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    memory = mmap.mmap(-1, length, flags=flags)  # lives as long as the tensor
    memory.madvise(mmap.MADV_HUGEPAGE)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return placed.view(tensor.shape).copy_(tensor)


def _swizzle(device: torch.device) -> tuple[Tensor, Tensor]:
    t = torch.arange(4, device=device)[:, None].expand(4, 8)
    return t, torch.arange(8, device=device)[None, :] ^ (2 * t)  # an involution: packs and unpacks


def pack_nibbles(q: Tensor) -> Tensor:
    """(..., N, K) uint8 in 0..15 -> (..., ceil(N/64), ceil(K/16), 128) int32 tiles. Padding nibbles are 0."""
    if native := offered(__package__, "pack_tiles", q):
        return native(q, "bytes", q.shape[-2], q.shape[-1], None)
    *lead, n, k = q.shape
    nt, kt = ceil_div(n, TILE_N), ceil_div(k, TILE_K)
    q = torch.nn.functional.pad(q, (0, kt * TILE_K - k, 0, nt * TILE_N - n)).reshape(-1, nt, 4, 2, 8, kt, 2, 4, 2)
    q = q.permute(0, 1, 5, 7, 4, 2, 8, 6, 3)  # (lead, nt, kt, t, g, a, o, e, h): k = 8e + 2t + o, byte b = 2o + e
    data = q[..., 0] | (q[..., 1] << 4)
    t, g = _swizzle(q.device)
    return in_huge_pages(data[:, :, :, t, g].reshape(*lead, nt, kt, 512).view(torch.int32))


def unpack_nibbles(qweight: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of pack_nibbles: (..., Nt, Kt, 128) int32 -> (..., N, K) uint8."""
    *lead, nt, kt, _ = qweight.shape
    data = qweight.contiguous().view(torch.uint8).reshape(-1, nt, kt, 4, 8, 4, 2, 2)
    t, g = _swizzle(qweight.device)
    data = data[:, :, :, t, g]
    q = torch.stack((data & 15, data >> 4), dim=-1)  # (lead, nt, kt, t, g, a, o, e, h)
    q = q.permute(0, 1, 5, 8, 4, 2, 7, 3, 6).reshape(*lead, nt * TILE_N, kt * TILE_K)
    return q[..., :out_features, :in_features].contiguous()


def pack_groups(values: Tensor) -> Tensor:
    """(..., N, G) per-row values -> (..., ceil(N/64), G, 64), row 16a+8h+g at position 32h+4g+a; padding is 0."""
    *lead, n, groups = values.shape
    nt = ceil_div(n, TILE_N)
    values = torch.nn.functional.pad(values, (0, 0, 0, nt * TILE_N - n)).reshape(-1, nt, 4, 2, 8, groups)
    return values.permute(0, 1, 5, 3, 4, 2).reshape(*lead, nt, groups, TILE_N).contiguous()


def unpack_groups(values: Tensor, out_features: int) -> Tensor:
    """Inverse of pack_groups: (..., Nt, G, 64) -> (..., N, G)."""
    *lead, nt, groups, _ = values.shape
    values = values.reshape(-1, nt, groups, 2, 8, 4).permute(0, 1, 5, 3, 4, 2)
    return values.reshape(*lead, nt * TILE_N, groups)[..., :out_features, :].contiguous()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Int4Weight:
    """A packed INT4 weight (N, K), or E experts of one shape. Immutable; slices share storage with their source.

    Args:
        qweight: (Nt, Kt, 128) int32 tiles, or (E, Nt, Kt, 128); Nt = ceil(N/64), Kt = ceil(K/16). Contiguous.
        scales: (Nt, G, 64) fp16, bf16 or fp32, or (E, Nt, G, 64).
        zeros: uint8 of the shape of scales, values 0..16; None means symmetric (zero = 8).
        perm: (K,) or (E, K) int32, act-order: stored column j multiplies ``x[..., perm[j]]``. None: identity.
        out_features, in_features: N and K, without padding.
        group_size: -1 (one group) or a multiple of 16; 32, 64 and 128 are the usual ones. Need not divide K.
        first_k: column of the unsliced weight where this one starts, a multiple of 16: groups of a K slice (tensor
            parallelism) stay where they were, so a shard need not be a multiple of group_size.
    Raises:
        ValueError: a tensor or number out of contract; names it, what was wanted, what came.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None
    out_features: int
    in_features: int
    group_size: int
    first_k: int = 0

    def __post_init__(self) -> None:
        n, k = self.out_features, self.in_features
        for name in ("out_features", "in_features"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise refuse("Int4Weight", name, "an int in 1 .. 2**31 - 1", value)
        check_group_size("Int4Weight", self.group_size)
        if type(self.first_k) is not int or self.first_k % TILE_K or not 0 <= self.first_k < 2**31:
            raise refuse("Int4Weight", "first_k", "a multiple of 16 in 0 .. 2**31 - 1", self.first_k)
        nt, kt = ceil_div(n, TILE_N), ceil_div(k, TILE_K)
        groups = num_groups(k, self.group_size, self.first_k)
        lead = tuple(self.qweight.shape[:-3]) if isinstance(self.qweight, Tensor) and self.qweight.ndim == 4 else ()
        self._check("qweight", (*lead, nt, kt, 128), (torch.int32,))
        self._check("scales", (*lead, nt, groups, TILE_N), SCALE_DTYPES)
        if self.zeros is not None:
            self._check("zeros", (*lead, nt, groups, TILE_N), (torch.uint8,))
        if self.perm is not None:
            self._check("perm", (*lead, k), (torch.int32,))

    def _check(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        value = getattr(self, name)
        good = is_strided(value) and tuple(value.shape) == shape and value.dtype in dtypes
        if not good or value.device != self.qweight.device:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise refuse("Int4Weight", name, f"{shape} {names} on {getattr(self.qweight, 'device', 'cpu')}", value)
        if not value.is_contiguous():
            object.__setattr__(self, name, value.contiguous())

    # -- facts ------------------------------------------------------------------------------------------------------
    @property
    def num_experts(self) -> int | None:
        """E for a stack of experts, None for a plain weight."""
        return self.qweight.shape[0] if self.qweight.ndim == 4 else None

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def num_groups(self) -> int:
        return self.scales.shape[-2]

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding included."""
        tensors = (self.qweight, self.scales, self.zeros, self.perm)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def __repr__(self) -> str:
        experts = f"{self.num_experts} x " if self.num_experts is not None else ""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return (
            f"Int4Weight({experts}{self.out_features} x {self.in_features}, group {self.group_size}, {kind}, "
            f"{describe(self.scales.dtype)} scales{', act-order' if self.perm is not None else ''})"
        )

    # -- pack and unpack ----------------------------------------------------------------------------------------------
    @classmethod
    def pack(
        cls,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        group_size: int,
        perm: Tensor | None = None,
    ) -> Int4Weight:
        """Pack q (N, K) uint8 in 0..15, scales (N, G), zeros (N, G) uint8 or None; or all with a leading E.

        ``perm``: q's column j belongs to input ``perm[j]``; a permutation of 0..K-1.
        Raises ValueError: shape, dtype, value range of q or zeros, or a perm that is none.
        """
        if not has_data(q) or q.ndim not in (2, 3) or q.dtype != torch.uint8 or 0 in q.shape:
            raise refuse("Int4Weight.pack", "q", "(N, K) or (E, N, K) uint8, not empty", q)
        if q.max() > 15:
            raise refuse("Int4Weight.pack", "q", "values in 0..15", f"{int(q.max())}")
        check_group_size("Int4Weight.pack", group_size)
        *lead, n, k = q.shape
        shape = (*lead, n, num_groups(k, group_size))
        if not has_data(scales) or tuple(scales.shape) != shape or scales.dtype not in SCALE_DTYPES:
            raise refuse("Int4Weight.pack", "scales", f"{shape} float16, bfloat16 or float32", scales)
        if zeros is not None:
            if not has_data(zeros) or tuple(zeros.shape) != shape or zeros.dtype != torch.uint8:
                raise refuse("Int4Weight.pack", "zeros", f"{shape} uint8", zeros)
            if zeros.max() > 16:
                raise refuse("Int4Weight.pack", "zeros", "values in 0..16", f"{int(zeros.max())}")
        if perm is not None:
            perm = check_perm("Int4Weight.pack", perm, (*lead, k))
        return cls(
            qweight=pack_nibbles(q),
            scales=pack_groups(scales),
            zeros=None if zeros is None else pack_groups(zeros),
            perm=perm,
            out_features=n,
            in_features=k,
            group_size=group_size,
        )

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q (N, K) uint8, scales (N, G), zeros (N, G) uint8), bitwise what was packed; symmetric zeros are 8s."""
        q = unpack_nibbles(self.qweight, self.out_features, self.in_features)
        scales = unpack_groups(self.scales, self.out_features)
        if self.zeros is None:
            return q, scales, torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)
        return q, scales, unpack_groups(self.zeros, self.out_features)

    def group_index(self) -> Tensor:
        """(K,) int64: which of the G stored groups a stored column belongs to."""
        if self.group_size == -1:
            return torch.zeros(self.in_features, dtype=torch.int64, device=self.device)
        k = torch.arange(self.in_features, device=self.device) + self.first_k
        return k // self.group_size - self.first_k // self.group_size

    # -- slices and stacks --------------------------------------------------------------------------------------------
    def slice_out(self, start: int, stop: int) -> Int4Weight:
        """Rows start..stop-1 (column parallelism). Whole tiles (start % 64 == 0) are views; others are repacked."""
        check_range("Int4Weight.slice_out", start, stop, self.out_features)
        if start % TILE_N:
            q, scales, zeros = (tensor[..., start:stop, :].contiguous() for tensor in self.unpack())
            return dataclasses.replace(
                self,
                qweight=pack_nibbles(q),
                scales=pack_groups(scales),
                zeros=None if self.zeros is None else pack_groups(zeros),
                out_features=stop - start,
            )
        tiles = slice(start // TILE_N, ceil_div(stop, TILE_N))
        return dataclasses.replace(
            self,
            qweight=self.qweight[..., tiles, :, :],
            scales=self.scales[..., tiles, :, :],
            zeros=None if self.zeros is None else self.zeros[..., tiles, :, :],
            out_features=stop - start,
        )

    def slice_in(self, start: int, stop: int) -> Int4Weight:
        """Columns start..stop-1 (row parallelism); start must be a multiple of 16, groups need not divide the shard."""
        check_range("Int4Weight.slice_in", start, stop, self.in_features)
        if start % TILE_K:
            raise refuse("Int4Weight.slice_in", "start", "a multiple of 16", start)
        if self.perm is not None:
            raise refuse(
                "Int4Weight.slice_in",
                "self",
                "no act-order permutation (fold it into the layer that produces the input: "
                "producer.select_out(weight.perm), then weight.without_perm())",
                "an act-order weight",
            )
        first_k = self.first_k + start
        if self.group_size == -1:
            groups = slice(0, 1)
        else:
            first_group = first_k // self.group_size - self.first_k // self.group_size
            groups = slice(first_group, first_group + num_groups(stop - start, self.group_size, first_k))
        tiles = slice(start // TILE_K, ceil_div(stop, TILE_K))
        return dataclasses.replace(
            self,
            qweight=self.qweight[..., tiles, :],
            scales=self.scales[..., groups, :],
            zeros=None if self.zeros is None else self.zeros[..., groups, :],
            in_features=stop - start,
            first_k=first_k if self.group_size != -1 else 0,
        )

    def select_out(self, rows: Tensor) -> Int4Weight:
        """Rows ``rows`` (1-D integers), in that order; repacks. Folds a consumer's act-order into its producer."""
        if not has_data(rows) or rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64) or not len(rows):
            raise refuse("Int4Weight.select_out", "rows", "(R,) int32 or int64, not empty", rows)
        if rows.min() < 0 or rows.max() >= self.out_features:
            want = f"values in 0..{self.out_features - 1}"
            raise refuse("Int4Weight.select_out", "rows", want, f"{rows.tolist()[:8]}")
        q, scales, zeros = (tensor.index_select(-2, rows.to(self.device, torch.int64)) for tensor in self.unpack())
        return dataclasses.replace(
            self,
            qweight=pack_nibbles(q),
            scales=pack_groups(scales),
            zeros=None if self.zeros is None else pack_groups(zeros),
            out_features=len(rows),
        )

    def without_perm(self) -> Int4Weight:
        """The same tiles without the permutation: the caller now feeds ``x[..., perm]``."""
        return dataclasses.replace(self, perm=None)

    @classmethod
    def stack(cls, weights: Sequence[Int4Weight]) -> Int4Weight:
        """E plain weights of one shape, group size, symmetry and dtype -> one stack of experts."""
        if not isinstance(weights, Sequence):
            raise refuse("Int4Weight.stack", "weights", "a list of plain Int4Weight", weights)
        plain = all(isinstance(weight, Int4Weight) and weight.num_experts is None for weight in weights)
        if not weights or not plain:
            got = f"{list(map(describe, weights))}"
            raise refuse("Int4Weight.stack", "weights", "one or more plain Int4Weight", got)
        first = weights[0]

        def facts(weight: Int4Weight) -> tuple[object, ...]:
            numbers = (weight.out_features, weight.in_features, weight.group_size, weight.first_k)
            return (*numbers, weight.symmetric, weight.perm is None, weight.scales.dtype, weight.device)

        for index, weight in enumerate(weights):
            if facts(weight) != facts(first):
                raise refuse("Int4Weight.stack", f"weights[{index}]", f"like weights[0], {first}", f"{weight}")

        def stacked(name: str) -> Tensor | None:
            tensors = [getattr(weight, name) for weight in weights]
            return None if tensors[0] is None else in_huge_pages(torch.stack(tensors))

        tensors: dict[str, Any] = {name: stacked(name) for name in ("qweight", "scales", "zeros", "perm")}
        return dataclasses.replace(first, **tensors)

    def expert(self, index: int) -> Int4Weight:
        """Expert ``index`` of a stack, as a view."""
        if type(index) is not int or not 0 <= index < (self.num_experts or 0):
            raise refuse("Int4Weight.expert", "index", f"0 <= index < {self.num_experts or 0}", index)
        return self.slice_experts(index, index + 1)._map(lambda tensor: tensor[0])

    def slice_experts(self, start: int, stop: int) -> Int4Weight:
        """Experts start..stop-1 of a stack (expert parallelism), as a view."""
        check_range("Int4Weight.slice_experts", start, stop, self.num_experts or 0)
        return self._map(lambda tensor: tensor[start:stop])

    def _map(self, function: Any) -> Int4Weight:
        names = ("qweight", "scales", "zeros", "perm")
        mapped: dict[str, Any] = {k: None if (v := getattr(self, k)) is None else function(v) for k in names}
        return dataclasses.replace(self, **mapped)

    def to(self, device: torch.device | str) -> Int4Weight:
        """The same weight on another device (dtypes never change)."""
        return self._map(lambda tensor: tensor.to(device))

    # -- persistence --------------------------------------------------------------------------------------------------
    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors by name, plus ``meta`` (4,) int64 = N, K, group_size, first_k. Absent tensors have no entry."""
        meta = torch.tensor([self.out_features, self.in_features, self.group_size, self.first_k])
        tensors = {name: getattr(self, name) for name in ("qweight", "scales", "zeros", "perm")}
        return {f"{prefix}{k}": v for k, v in {**tensors, "meta": meta}.items() if v is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "") -> Int4Weight:
        """Inverse of state_dict. Raises ValueError naming the entry that is missing or malformed."""
        for name in ("meta", "qweight", "scales"):
            if not is_strided(state.get(prefix + name)):
                raise refuse("Int4Weight.from_state_dict", prefix + name, "a strided tensor", state.get(prefix + name))
        meta = state[prefix + "meta"]
        if not has_data(meta) or tuple(meta.shape) != (4,) or meta.dtype != torch.int64:
            raise refuse("Int4Weight.from_state_dict", prefix + "meta", "(4,) int64", meta)
        n, k, group_size, first_k = meta.tolist()
        optional = {name: state[prefix + name] for name in ("zeros", "perm") if prefix + name in state}
        weight = cls(
            qweight=in_huge_pages(state[prefix + "qweight"].contiguous()),
            scales=state[prefix + "scales"],
            out_features=n,
            in_features=k,
            group_size=group_size,
            first_k=first_k,
            **optional,
        )
        if weight.perm is not None:
            check_perm("Int4Weight.from_state_dict", weight.perm, tuple(weight.perm.shape))
        return weight


def check_group_size(op: str, group_size: object) -> None:
    good = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not good or not (group_size == -1 or (group_size > 0 and group_size % TILE_K == 0 and group_size < 2**31)):  # type: ignore[operator]
        raise refuse(op, "group_size", "-1 or a positive multiple of 16 (32, 64, 128)", group_size)


def check_range(op: str, start: object, stop: object, size: int) -> None:
    if not (type(start) is int and type(stop) is int and 0 <= start < stop <= size):
        raise refuse(op, "start, stop", f"0 <= start < stop <= {size}", (start, stop))


def check_perm(op: str, perm: object, shape: tuple[int, ...]) -> Tensor:
    """perm as int32, or ValueError unless each row is a permutation of 0..K-1."""
    if not has_data(perm) or tuple(perm.shape) != shape or perm.dtype not in (torch.int32, torch.int64):
        raise refuse(op, "perm", f"{shape} int32", perm)
    if not torch.equal(perm.sort(-1).values.long(), torch.arange(shape[-1], device=perm.device).expand(shape)):
        raise refuse(op, "perm", f"a permutation of 0..{shape[-1] - 1}", "repeated or out-of-range values")
    return perm.to(torch.int32).contiguous()
