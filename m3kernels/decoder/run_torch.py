"""Runs a Program instruction by instruction in torch: on a GPU, and as what the native pass is tested against.

Products, experts and attention are the ops of m3kernels (whichever room serves them), the rest is torch in fp32; with
``dtype=torch.float64`` everything is plain torch in fp64, dequantised weights and attention included: only what the
caches hold is rounded to their dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.checks import refuse
from m3kernels.decoder.ops import linear
from m3kernels.int4 import int4_dequantize, int4_gemm, int4_moe
from m3kernels.spec_decode import tree_attention
from m3kernels.spec_decode.reference import tree_attention as tree_attention64

if TYPE_CHECKING:
    from m3kernels.decoder.program import Batch, Columns, Program, Step

OP = "decoder_pass"
INT8_MOST = 127.0
MASK_BITS = 32  # in a word


def check_values(program: Program, batch: Batch) -> None:
    """What the native pass checks of the numbers in a batch, on a CPU only: reading them on a GPU would synchronise."""

    def within(name: str, values: Tensor, most: int, least: int = 0) -> None:
        wrong = values[(values < least) | (values > most)]
        if len(wrong):
            raise refuse(OP, name, f"{least}..{most}", str(int(wrong[0])))

    rows, requests, causal = len(batch.tokens), len(batch.cache_seqlens), batch.causal
    tables = [step.tensors[0] for step in program.steps if step.op == "embed"]
    if tables:
        within("tokens", batch.tokens, min(len(table) for table in tables if table is not None) - 1)
    within("positions", batch.positions, len(program.cos) - 1)
    if program.caches:
        within("slots", batch.slots, min(cache.keys.shape[:2].numel() for cache in program.caches) - 1)
    within("picked", batch.picked, rows - 1)
    starts = batch.cu_seqlens
    if int(starts[0]) != 0 or int(starts[-1]) != rows or bool((starts.diff() < 0).any()):
        raise refuse(OP, "cu_seqlens", f"ascending values, 0 first and {rows} last", f"{starts.tolist()[:8]}")
    words = 0 if batch.mask_bits is None else batch.mask_bits.shape[1]
    lens = starts.diff()
    if causal < requests:
        assert batch.tree_lens is not None and batch.mask_bits is not None
        others = rows - int(starts[causal])
        if len(batch.mask_bits) != others or not words:
            raise refuse(OP, "mask_bits", f"bits of {others} rows", batch.mask_bits)
        within("tree_lens", batch.tree_lens[causal:], words * MASK_BITS)
        lens = torch.cat((lens[:causal], batch.tree_lens[causal:]))
    if bool((batch.cache_seqlens < lens).any()):
        raise refuse(OP, "cache_seqlens", f"at least {lens.tolist()[:8]}", f"{batch.cache_seqlens.tolist()[:8]}")
    most = int(batch.cache_seqlens.max()) if requests else 0
    if any(most > batch.block_table.shape[1] * cache.keys.shape[1] for cache in program.caches):
        raise refuse(OP, "block_table", f"pages for {most} keys", batch.block_table)


class TorchPass:
    """A Program run by torch."""

    def __init__(self, program: Program, dtype: torch.dtype = torch.float32) -> None:
        self.program, self.dtype = program, dtype
        self.buffers: list[Tensor] = []
        self.touched = (0, 0)

    def at(self, part: Columns | None) -> Tensor:
        assert part is not None
        return self.buffers[part.buffer][:, part.first : part.first + part.width]

    def run(self, batch: Batch, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        program, device = self.program, self.program.device
        if device.type == "cpu":
            check_values(program, batch)
        rows = (len(batch.tokens), len(batch.picked))
        self.buffers = [
            torch.empty(rows[picked], width, dtype=self.dtype, device=device)
            for width, picked in zip(program.widths, program.picked, strict=True)
        ]
        self.batch, self.inputs, self.outputs = batch, inputs, [torch.empty(0)] * len(program.outputs)
        self.touched = (0, 0)
        for step in program.steps:
            getattr(self, f"_{step.op}")(step)
        return self.outputs

    def profile(self, on: bool) -> dict[str, float]:
        return {}

    def experts_touched(self) -> tuple[int, int]:
        return self.touched

    # -- instructions -------------------------------------------------------------------------------------------------
    def _embed(self, step: Step) -> None:
        (table,) = step.tensors
        assert table is not None
        self.at(step.to).copy_(table[self.batch.tokens])

    def _load(self, step: Step) -> None:
        self.at(step.to).copy_(self.inputs[step.index])

    def _store(self, step: Step) -> None:
        self.outputs[step.index] = self.at(step.source).clone()

    def _pick(self, step: Step) -> None:
        self.at(step.to).copy_(self.at(step.source)[self.batch.picked])

    def _copy(self, step: Step) -> None:
        self.at(step.to).copy_(self.at(step.source))

    def _add(self, step: Step) -> None:
        self.at(step.to).add_(self.at(step.source))

    def _normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(self.dtype)

    def _norm(self, step: Step) -> None:
        (weight,) = step.tensors
        assert weight is not None
        self.at(step.to).copy_(self._normed(self.at(step.source), weight, step.number))

    def _dense(self, step: Step) -> None:
        weight, bias = step.tensors
        assert weight is not None
        x = self.at(step.source)
        if self.dtype == torch.float64:
            y = F.linear(x, weight.double(), None if bias is None else bias.double())
        else:
            y = linear(x.contiguous(), weight, bias)
        self.at(step.to).copy_(y)

    def _int4(self, step: Step) -> None:
        weight, (bias,) = step.weight, step.tensors
        assert weight is not None
        x = self.at(step.source)
        if self.dtype == torch.float64:
            y = F.linear(x, int4_dequantize(weight, torch.float32).double(), None if bias is None else bias.double())
        else:
            y = int4_gemm(x.contiguous(), weight, bias, activations=step.activations)
        self.at(step.to).copy_(y)

    def _silu_mul(self, step: Step) -> None:
        gate, up = self.at(step.source).chunk(2, dim=-1)
        self.at(step.to).copy_(F.silu(gate) * up)

    def _rotate(self, step: Step) -> None:
        cache, batch, program = self.program.caches[step.index], self.batch, self.program
        kv_heads, size = cache.keys.shape[2:]
        rows = self.at(step.source).unflatten(1, (-1, size))
        queries, keys, values = rows.split((step.heads, kv_heads, kv_heads), dim=1)
        q_norm, k_norm = step.tensors
        half = program.rotated // 2
        cos, sin = (table.to(self.dtype)[batch.positions][:, None] for table in (program.cos, program.sin))
        for x, norm in ((queries, q_norm), (keys, k_norm)):
            if norm is not None:
                x.copy_(self._normed(x, norm, step.number))
            a, b = x[..., :half].clone(), x[..., half : 2 * half].clone()
            x[..., :half] = a * cos - b * sin
            x[..., half : 2 * half] = b * cos + a * sin
        pairs = ((keys, cache.keys, cache.k_scale), (values, cache.values, cache.v_scale))
        for x, pages, scales in pairs:
            slots = pages.view(-1, kv_heads, size)
            if scales is None:
                slots[batch.slots] = x.to(pages.dtype)
                continue
            most = x.abs().amax(-1)
            inverse = torch.where(most > 0, INT8_MOST / most, 0.0)[..., None]
            slots[batch.slots] = (x * inverse).clamp(-INT8_MOST, INT8_MOST).round().to(torch.int8)
            scales.view(-1, kv_heads)[batch.slots] = (most / INT8_MOST).float()

    def _attend(self, step: Step) -> None:
        batch, cache = self.batch, self.program.caches[step.index]
        size = cache.keys.shape[3]
        queries = self.at(step.source).unflatten(1, (step.heads, size))
        gate = None if step.extra is None else self.at(step.extra)
        if gate is not None and gate.shape[1] != step.heads:
            gate = gate.unflatten(1, (step.heads, size))
        out = self.at(step.to).unflatten(1, (step.heads, size))
        for causal, (first, last) in ((True, (0, batch.causal)), (False, (batch.causal, len(batch.cache_seqlens)))):
            if first == last:
                continue
            start, stop = int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last])
            given: dict[str, Any] = {"cu_seqlens_q": batch.cu_seqlens[first : last + 1] - start}
            if cache.k_scale is not None:
                given |= {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
            if not causal:
                assert batch.tree_lens is not None
                given |= {"mask_bits": batch.mask_bits, "tree_lens": batch.tree_lens[first:last]}
            if self.dtype == torch.float64:
                given = {"mask_bits": None, "window": 0} | given
            found = (tree_attention64 if self.dtype == torch.float64 else tree_attention)(
                queries[start:stop].contiguous(),
                cache.keys,
                cache.values,
                batch.block_table[first:last],
                batch.cache_seqlens[first:last],
                gate=None if gate is None else gate[start:stop].contiguous(),
                softmax_scale=step.number,
                **given,
            )
            out[start:stop] = found

    def _moe(self, step: Step) -> None:
        x, scores = self.at(step.source), self.at(step.extra)
        order = scores.sort(dim=-1, descending=True, stable=True)  # ties go to the lower expert
        ids = order.indices[:, : step.top_k].contiguous()
        weights = scores.softmax(-1).gather(1, ids)
        if step.rescale:
            weights = weights / weights.sum(-1, keepdim=True)
        distinct, layers = self.touched
        self.touched = distinct + len(ids.unique()), layers + 1
        if step.weight is not None and step.weight2 is not None and self.dtype != torch.float64:
            y = int4_moe(x.contiguous(), step.weight, step.weight2, ids, weights.float(), activations=step.activations)
        else:
            y = self._dense_moe(step, x, ids, weights)
        self.at(step.to).copy_(y)

    def _dense_moe(self, step: Step, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if step.weight is not None and step.weight2 is not None:
            pair = int4_dequantize(step.weight, torch.float32), int4_dequantize(step.weight2, torch.float32)
        else:
            w13, w2 = step.tensors
            assert w13 is not None and w2 is not None
            pair = w13, w2
        terms = torch.empty(*ids.shape, x.shape[1], dtype=self.dtype, device=x.device)
        for expert in ids.unique().tolist():
            rows, places = (ids == expert).nonzero(as_tuple=True)
            gate, up = self._product(x[rows], pair[0][expert]).chunk(2, dim=-1)
            terms[rows, places] = self._product(F.silu(gate) * up, pair[1][expert])
        y = torch.zeros_like(x)
        for place in range(ids.shape[1]):  # in the order of the choice, as the native pass adds them
            y += weights[:, place, None].to(self.dtype) * terms[:, place]
        return y

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.double()) if self.dtype == torch.float64 else linear(x.contiguous(), weight)
