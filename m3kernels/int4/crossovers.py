"""Which CUDA kernel serves a product, by architecture and rows: the whole choice, as data; nothing is tuned on the fly.

    decode   streams the packed weight once for up to 64 rows: bound by memory
    many     dequantises tiles in registers for mma.sync; the bits of decode, for every number of rows
    wgmma    the same for the matrix units of sm_90a; other bits
    dense    torch.matmul on the weight dequantised to x's dtype: pays where no kernel here reaches cuBLAS's rate

``source`` of a row is the id of the bench row that measured it, or "reasoned" where none has.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from m3kernels.checks import refuse
from m3kernels.int4.types import Int4Weight, ceil_div


class Crossover(NamedTuple):
    """``kernel`` serves products of at most ``up_to`` rows that no Crossover before it serves; None: of any number."""

    up_to: int | None  # of experts: rows of one on average
    kernel: str
    source: str


DECODE = Crossover(64, "decode", "reasoned")
# With 32 rows on average, an expert of more than 64, which decode would stream twice, is rare.
DECODE_EXPERTS = Crossover(32, "decode", "reasoned")
MANY = Crossover(None, "many", "reasoned")
WGMMA = Crossover(None, "wgmma", "reasoned")
DENSE = Crossover(None, "dense", "reasoned")  # not for experts: torch would need their offsets on the host

AMPERE = {
    "row_invariant": (DECODE, MANY),
    "row_invariant_experts": (DECODE_EXPERTS, MANY),
    "free": (DECODE, Crossover(1024, "many", "reasoned"), DENSE),  # mma.sync on packed tiles: 0.9 of cuBLAS at best
    "free_experts": (DECODE_EXPERTS, MANY),
}
HOPPER = AMPERE | {"free": (DECODE, WGMMA), "free_experts": (DECODE_EXPERTS, WGMMA)}
BLACKWELL = AMPERE | {"free": (DECODE, Crossover(256, "many", "reasoned"), DENSE)}  # cuBLAS has tcgen05, we have not

TABLE: dict[int, dict[str, tuple[Crossover, ...]]] = {  # from this compute capability on
    80: AMPERE,
    86: AMPERE,
    89: AMPERE,
    90: HOPPER,
    100: BLACKWELL,
    120: BLACKWELL,
}


@functools.cache
def crossovers(capability: int, experts: bool, row_invariant: bool) -> tuple[Crossover, ...]:
    """The rows of TABLE for a device of this capability (90 is 9.0)."""
    regimes = TABLE[max(least for least in TABLE if least <= max(capability, min(TABLE)))]
    return regimes[("row_invariant" if row_invariant else "free") + ("_experts" if experts else "")]


def crossover(capability: int, rows: int, experts: int | None, row_invariant: bool) -> Crossover:
    """The row of TABLE that serves ``rows`` rows (of all experts)."""
    each = rows if experts is None else ceil_div(rows, experts)
    choices = crossovers(capability, experts is not None, row_invariant)
    return next(choice for choice in choices if choice.up_to is None or each <= choice.up_to)


def kernel_for(
    weight: Int4Weight, rows: int, *, row_invariant: bool = True, capability: tuple[int, int] | None = None
) -> str:
    """Name of the CUDA kernel that serves a product of ``rows`` rows with this weight: decode, many, wgmma or dense.

    Args:
        weight: any Int4Weight; of experts: ``rows`` counts the rows of all of them (of int4_moe: tokens times top-k).
        rows: of x.
        row_invariant: as given to the product.
        capability: of the device, (9, 0) for an H100; default: that of weight's device.
    """
    if type(rows) is not int or rows < 0:
        raise refuse("kernel_for", "rows", "an integer >= 0", rows)
    if capability is None:
        if weight.device.type != "cuda":
            raise refuse(
                "kernel_for", "capability", f"a compute capability for a weight on {weight.device}", capability
            )
        capability = torch.cuda.get_device_capability(weight.device)
    major, minor = capability
    return crossover(10 * major + minor, rows, weight.num_experts, row_invariant).kernel
