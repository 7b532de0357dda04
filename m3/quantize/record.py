"""What a run of quantisation says of itself: a record for every finished shard, and a report at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from m3.quantize.errors import LinearError
from m3.quantize.evaluate import Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A finished shard. layer: -1 for what is in no layer. hidden_error: of the hidden states after the layer, all
    layers up to it quantised, squared error over squared size. routed, forced: of a layer with experts, the tokens of
    the calibration set that its router gave each expert, and those that it got beyond."""

    layer: int
    file: str
    sha256: str
    nbytes: int  # of tensors
    linears: int  # bytes of the quantised linears, packed
    linears_bf16: int  # bytes that they take in bf16
    errors: dict[str, LinearError]
    hidden_error: float | None
    routed: list[int] | None
    forced: list[int] | None
    seconds: float
    peak_memory: int  # bytes of this process so far

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ShardRecord:
        """The record of a line."""
        errors = {name: LinearError(**error) for name, error in fields["errors"].items()}
        return cls(**{**fields, "errors": errors})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did."""

    settings: dict[str, Any]
    calibration: tuple[int, int]  # sequences and tokens of each
    shards: tuple[ShardRecord, ...]
    nbytes: int  # of the checkpoint's tensors
    nbytes_before: int
    comparison: Comparison | None
    seconds: float  # of the layers, in all runs that it took
    peak_memory: int

    @property
    def blind(self) -> int:
        """Experts that learnt from no token at all."""
        return sum(
            not routed + forced
            for one in self.shards
            for routed, forced in zip(one.routed or (), one.forced or (), strict=True)
        )

    @property
    def linears(self) -> tuple[int, int]:
        """Bytes of the quantised linears: packed, and in bf16."""
        return sum(one.linears for one in self.shards), sum(one.linears_bf16 for one in self.shards)
