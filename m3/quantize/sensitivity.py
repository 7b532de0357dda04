"""Which linears stay in bf16 under a budget of bytes: those whose rounding hurts their layer most, byte for byte.

    error of a unit = |layer(x; that unit rounded) - layer(x)|^2 / |layer(x)|^2,   over the tokens of a calibration set
    kept first      = the largest error / (its bytes in bf16 - its bytes in INT4) that still fits, and so on

A unit is what engines hold as one linear: q, k and v; o; gate and up; down; all experts of a layer. Errors are of a
layer's output, relative to it, so that units of different layers compare; what later layers make of an error is left
out (they all pass it on along the residual stream). bf16 is the only other choice: m3kernels has no linear of 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from m3.quantize.block import Block, batches
from m3.quantize.gptq import ATTENTION, DENSE_MLP
from m3.quantize.scheme import Rounded
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight, int4_dequantize

BF16_BYTES, INDEX_BYTES = 2, 4
SCALES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Linears of a layer (names without its prefix) that are kept or rounded together.

    error: relative squared error of the layer's output, rounded. int4_bytes, bf16_bytes: in a checkpoint.
    """

    layer: int
    linears: tuple[str, ...]
    error: float
    int4_bytes: int
    bf16_bytes: int

    @property
    def extra_bytes(self) -> int:
        """What keeping it costs."""
        return self.bf16_bytes - self.int4_bytes

    @property
    def error_per_byte(self) -> float:
        return self.error / max(1, self.extra_bytes)


class Dequantised(Mapping[str, Tensor]):
    """Weights of some linears, made when they are asked for: those of all experts never stand side by side."""

    def __init__(self, rounded: Mapping[str, Rounded | Int4Weight], names: Sequence[str]) -> None:
        self.rounded, self.names = rounded, tuple(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        one = self.rounded[name]
        return one.dequantized() if isinstance(one, Rounded) else int4_dequantize(one, torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def units_of(block: Block) -> list[tuple[str, ...]]:
    """The linears of a layer, unit by unit."""
    if not block.has_experts:
        return [*ATTENTION, *DENSE_MLP]
    return [*ATTENTION, tuple(name for name in block.linears if name.startswith("mlp.experts."))]


def int4_bytes(rounded: Rounded) -> int:
    """Of a weight in GPTQ form: codes, scales, zero points (stored in any case) and the index of groups."""
    n, k = rounded.codes.shape
    groups = rounded.scales.shape[1]
    return (
        n * -(-k // 8) * 4 + rounded.scales.numel() * rounded.scales.element_size() + groups * n // 2 + INDEX_BYTES * k
    )


@torch.no_grad()
def layer_units(
    block: Block, layer: int, inputs: Tensor | Sequence[Tensor], rounded: Mapping[str, Rounded], *, batch: int = 8
) -> list[Unit]:
    """The units of a layer, each rounded alone.

    Args:
        block: the layer as it is.
        inputs: S sequences (L, D) of hidden states.
        rounded: of all its linears, by whatever method.
    Raises:
        ValueError: a linear that is not in ``rounded``, or an error that is not finite.
    """
    if missing := sorted(set(block.linears) - set(rounded)):
        raise refuse("sensitivity", "rounded", f"every linear of layer {layer}", f"no {missing[0]}")
    units = units_of(block)
    errors, size = [0.0] * len(units), 0.0
    for hidden in batches(inputs, batch):
        wanted = block.forward(hidden)
        size += float(wanted.double().square().sum())
        for at, names in enumerate(units):
            got = block.forward(hidden, Dequantised(rounded, names))
            errors[at] += float((got - wanted).double().square().sum())
    found = [
        Unit(
            layer=layer,
            linears=names,
            error=error / size if size else 0.0,
            int4_bytes=sum(int4_bytes(rounded[name]) for name in names),
            bf16_bytes=sum(BF16_BYTES * rounded[name].codes.numel() for name in names),
        )
        for names, error in zip(units, errors, strict=True)
    ]
    if wrong := [unit for unit in found if not 0 <= unit.error < float("inf")]:
        raise refuse("sensitivity", f"layer {layer}: {wrong[0].linears[0]}", "a finite error", wrong[0].error)
    return found


def kept(units: Sequence[Unit], budget: int) -> list[Unit]:
    """Those that stay in bf16, for at most ``budget`` bytes more; by error per byte, largest first.

    One that does not fit is passed over for smaller ones; one without error is never kept.
    """
    found, left = [], budget
    for unit in sorted(units, key=lambda one: (-one.error_per_byte, one.layer, one.linears)):
        if unit.error > 0 and unit.extra_bytes <= left:
            found.append(unit)
            left -= unit.extra_bytes
    return found


def budget_of(text: str, units: Sequence[Unit]) -> int:
    """Bytes: "5%" of what all units take in INT4, or "200MB" (10^6; B, KB, MB, GB).

    Raises ValueError for anything else.
    """
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            size = share * sum(unit.int4_bytes for unit in units)
        else:
            unit = next(name for name in sorted(SCALES, key=len, reverse=True) if text.upper().endswith(name))
            size = float(text[: -len(unit)]) * SCALES[unit]
    except (ValueError, StopIteration):
        size = -1.0
    if not 0 <= size < float("inf"):
        raise refuse("sensitivity", "--keep-budget", "a share or a size, as 5% or 200MB", repr(text))
    return int(size)
