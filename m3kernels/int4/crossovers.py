"""Which CUDA kernel serves a product, by architecture and rows: the whole choice, as data; nothing is tuned on the fly.

    decode   streams the packed weight once for up to 64 rows: bound by memory
    many     dequantises tiles in registers for mma.sync; the bits of decode, for every number of rows
    wgmma    the same for the matrix units of sm_90a; other bits
    dense    torch.matmul on the weight dequantised to x's dtype: pays where no kernel here reaches cuBLAS's rate

``source`` of a row is the id of the bench row that measured it, or "reasoned" where none has.
"""

from __future__ import annotations

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
MANY = (DECODE, Crossover(None, "many", "reasoned"))
WGMMA = (DECODE, Crossover(None, "wgmma", "reasoned"))
DENSE_FROM_1025 = (DECODE, Crossover(1024, "many", "reasoned"), Crossover(None, "dense", "reasoned"))
DENSE_FROM_257 = (DECODE, Crossover(256, "many", "reasoned"), Crossover(None, "dense", "reasoned"))

# Oldest compute capability -> regime -> its crossovers. "experts" has no dense kernel: it would need offsets on the
# host.
TABLE: dict[int, dict[str, tuple[Crossover, ...]]] = {
    80: {"row_invariant": MANY, "free": DENSE_FROM_1025, "free_experts": MANY},
    86: {"row_invariant": MANY, "free": DENSE_FROM_1025, "free_experts": MANY},
    89: {"row_invariant": MANY, "free": DENSE_FROM_1025, "free_experts": MANY},
    90: {"row_invariant": MANY, "free": WGMMA, "free_experts": WGMMA},
    100: {"row_invariant": MANY, "free": DENSE_FROM_257, "free_experts": MANY},
    120: {"row_invariant": MANY, "free": DENSE_FROM_257, "free_experts": MANY},
}


def crossover(capability: int, rows: int, experts: int | None, row_invariant: bool) -> Crossover:
    """The row of TABLE for a product of ``rows`` rows (of all experts) on a device of this capability (90 is 9.0)."""
    regimes = TABLE[max(least for least in TABLE if least <= max(capability, min(TABLE)))]
    regime = "row_invariant" if row_invariant else "free" if experts is None else "free_experts"
    each = rows if experts is None else ceil_div(rows, experts)
    return next(choice for choice in regimes[regime] if choice.up_to is None or each <= choice.up_to)


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
