"""Runs a Program natively: one call a pass. Hands over addresses and sizes; keeps the tensors alive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight, _cpu
from m3kernels.int4.ops import flat

if TYPE_CHECKING:
    from m3kernels.decoder.program import Batch, Cache, Columns, Program, Step

OP = "decoder_pass"
TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
EMPTY = (0, 0)


def span(name: str, tensor: Tensor | None, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """(address, elements) of a contiguous CPU tensor; (0, 0) for None."""
    if tensor is None:
        return EMPTY
    if not tensor.is_cpu or not tensor.is_contiguous() or (dtype is not None and tensor.dtype != dtype):
        raise refuse(OP, name, f"contiguous {str(dtype or 'elements').removeprefix('torch.')} in CPU memory", tensor)
    return tensor.data_ptr(), tensor.numel()


def packed(weight: Int4Weight) -> tuple[Any, ...]:
    return _cpu._weight(*flat(weight))


def aliases(program: Program) -> list[Tensor]:
    """Every tensor of a program under a name of its own: its memory stays, whatever becomes of the caller's tensor."""
    weights = [weight for step in program.steps for weight in (step.weight, step.weight2) if weight is not None]
    found = [tensor for step in program.steps for tensor in step.tensors]
    found += [part for w in weights for part in (w.qweight, w.scales, w.zeros, w.perm)]
    found += [part for cache in program.caches for part in (cache.keys, cache.values, cache.k_scale, cache.v_scale)]
    return [tensor.detach() for tensor in (*found, program.cos, program.sin) if tensor is not None]


def columns(part: Columns | None) -> tuple[int, int, int]:
    return (-1, 0, 0) if part is None else (part.buffer, part.first, part.width)


class NativePass:
    """A Program in its native form."""

    def __init__(self, program: Program) -> None:
        self.outputs = list(program.outputs)
        self.keep = aliases(program)  # their addresses are in the native program
        self.cos, self.sin = self.keep[-2:]
        self.native = _cpu_ext.DecoderProgram(program.widths, program.picked, program.rotated)
        for cache in program.caches:
            self._cache(cache)
        for step in program.steps:
            getattr(self, f"_{step.op}")(step)

    def _cache(self, cache: Cache) -> None:
        spans = (
            span("keys", cache.keys),
            span("values", cache.values),
            span("k_scale", cache.k_scale, torch.float32),
            span("v_scale", cache.v_scale, torch.float32),
        )
        self.native.add_cache((*spans, TYPE[cache.keys.dtype], *cache.keys.shape))

    def _embed(self, step: Step) -> None:
        (table,) = step.tensors
        assert table is not None
        self.native.embed(columns(step.to), span("table", table), TYPE[table.dtype], len(table))

    def _load(self, step: Step) -> None:
        self.native.load(columns(step.to), step.index)

    def _store(self, step: Step) -> None:
        self.native.store(step.index, columns(step.source))

    def _pick(self, step: Step) -> None:
        self.native.pick(columns(step.to), columns(step.source))

    def _copy(self, step: Step) -> None:
        self.native.copy(columns(step.to), columns(step.source))

    def _add(self, step: Step) -> None:
        self.native.add(columns(step.to), columns(step.source))

    def _norm(self, step: Step) -> None:
        self.native.norm(columns(step.to), columns(step.source), span("weight", step.tensors[0]), step.number)

    def _dense(self, step: Step) -> None:
        weight, bias = step.tensors
        assert weight is not None
        facts = (span("weight", weight), TYPE[weight.dtype], *weight.shape, span("bias", bias, torch.float32), 0)
        self.native.dense(columns(step.to), columns(step.source), facts)

    def _int4(self, step: Step) -> None:
        assert step.weight is not None
        bias = span("bias", step.tensors[0], torch.float32)
        places = columns(step.to), columns(step.source)
        self.native.int4(*places, packed(step.weight), bias, _cpu.MODE[step.activations])

    def _silu_mul(self, step: Step) -> None:
        self.native.silu_mul(columns(step.to), columns(step.source))

    def _rotate(self, step: Step) -> None:
        norms = [span(name, norm, torch.float32) for name, norm in zip(("q_norm", "k_norm"), step.tensors, strict=True)]
        self.native.rotate(columns(step.source), step.index, step.heads, *norms, step.number)

    def _attend(self, step: Step) -> None:
        places = columns(step.to), columns(step.source), columns(step.extra)
        self.native.attend(*places, step.index, step.heads, step.number)

    def _moe(self, step: Step) -> None:
        if step.weight is not None and step.weight2 is not None:
            weights = packed(step.weight), packed(step.weight2)
            experts = self.native.add_packed_experts(*weights, step.top_k, step.rescale)
        else:
            w13, w2 = step.tensors
            assert w13 is not None and w2 is not None
            count, hidden, inner = w2.shape
            spans = span("w13", w13), span("w2", w2, w13.dtype)
            experts = self.native.add_dense_experts(
                *spans, TYPE[w13.dtype], count, hidden, inner, step.top_k, step.rescale
            )
        places = columns(step.to), columns(step.source), columns(step.extra)
        self.native.moe(*places, experts, _cpu.MODE[step.activations])

    def run(self, batch: Batch, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        rows, picked = len(batch.tokens), len(batch.picked)
        outputs = [torch.empty(picked if part.picked else rows, part.width) for part in self.outputs]
        words = 0 if batch.mask_bits is None else batch.mask_bits.shape[1]
        self.native.run(
            (
                span("tokens", batch.tokens, torch.int64),
                span("positions", batch.positions, torch.int64),
                span("slots", batch.slots, torch.int64),
            ),
            (
                span("cu_seqlens", batch.cu_seqlens, torch.int32),
                span("cache_seqlens", batch.cache_seqlens, torch.int32),
                span("tree_lens", batch.tree_lens, torch.int32),
                span("block_table", batch.block_table, torch.int32),
                batch.block_table.shape[1],
                batch.causal,
            ),
            (span("mask_bits", batch.mask_bits, torch.int32), words),
            span("picked", batch.picked, torch.int64),
            (span("cos", self.cos), span("sin", self.sin), self.cos.shape[1]),
            [(span("inputs", tensor, torch.float32), *tensor.shape) for tensor in inputs],
            [(span("outputs", tensor), *tensor.shape) for tensor in outputs],
            torch.get_num_threads(),
        )
        return outputs

    def profile(self, on: bool) -> dict[str, float]:
        return dict(self.native.profile(on))

    def experts_touched(self) -> tuple[int, int]:
        distinct, layers = self.native.experts_touched()
        return distinct, layers
