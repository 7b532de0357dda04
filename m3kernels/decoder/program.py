"""A pass through the layers of a decoder as a list of instructions, and the rows that go through it.

A Program is built once from a model's tensors and run for every step of a server. Its instructions read and write
buffers of rows in fp32; weights may be fp32, bf16, fp16 or INT4, caches are paged. On a CPU all instructions run in one
native call; elsewhere, and with M3KERNELS_BACKEND=decoder=reference, torch runs them one by one (run_torch.py), which
is also what the native pass is tested against.

    program = Program(rotated=64)
    x = program.buffer(576)
    program.embed(x, embedding)
    ...
    logits, = program.run(batch)

A row's results are bitwise the same whatever rows share the pass: linear, int4_gemm and tree_attention are
row-invariant on a CPU, and every other instruction looks at one row. The tensors of a program may be changed in place
between passes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from m3kernels.checks import has_data, refuse
from m3kernels.dispatch import BackendError, forced
from m3kernels.int4 import Int4Weight

OP = "Program"
PASS = "decoder_pass"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_NAMES = "float32, bfloat16 or float16"
ACTIVATIONS = ("auto", "exact", "int16", "int8")
MAX_WIDTH = 2**26 - 1
MAX_MASK_WORDS = 32


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns ``first`` .. ``first + width - 1`` of a buffer; ``picked``: it has a row for each picked row only."""

    buffer: int
    first: int
    width: int
    picked: bool

    def part(self, first: int, width: int) -> Columns:
        if first < 0 or width < 1 or first + width > self.width:
            raise refuse(OP, "columns", f"columns of 0..{self.width - 1}", f"{width} from {first}")
        return Columns(self.buffer, self.first + first, width, self.picked)


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """Paged keys and values of one layer: (P, page_size, G, D); int8 with scales (P, page_size, G) fp32."""

    keys: Tensor
    values: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One instruction: its name, operands, and what else it needs."""

    op: str
    to: Columns | None = None
    source: Columns | None = None
    extra: Columns | None = None  # attend: gate; moe: scores
    tensors: tuple[Tensor | None, ...] = ()
    weight: Int4Weight | None = None
    weight2: Int4Weight | None = None
    index: int = 0
    heads: int = 0
    number: float = 0.0  # eps, or softmax scale
    activations: str = "auto"
    top_k: int = 0
    rescale: bool = False


@dataclasses.dataclass(kw_only=True)
class Batch:
    """Rows of a pass, sorted by request; the first ``causal`` requests attend causally, the others by mask_bits.

    tokens, positions, slots: (T,) int64; a slot is page * page_size + offset in the page. cu_seqlens: (B + 1,) int32.
    cache_seqlens: (B,) int32, keys with those of this pass. block_table: (B, max_pages) int32. tree_lens: (B,) int32,
    keys that mask_bits speak of; mask_bits: (rows of the other requests, W) int32, W at most 32; None where
    causal = B. picked: (R,) int64, rows that instructions after ``pick`` see.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    cache_seqlens: Tensor
    block_table: Tensor
    picked: Tensor
    causal: int
    tree_lens: Tensor | None = None
    mask_bits: Tensor | None = None


def check_batch(program: Program, batch: Batch, inputs: tuple[Tensor, ...]) -> None:
    """ValueError unless every tensor of a pass has its dtype and shape; what is in them is the runner's to check."""

    def want(name: str, tensor: object, dtype: torch.dtype, *shape: int | str) -> Tensor:
        if has_data(tensor) and tensor.dtype == dtype and tensor.ndim == len(shape) and tensor.is_contiguous():
            same = all(n == got for n, got in zip(shape, tensor.shape, strict=True) if isinstance(n, int))
            if same and tensor.device.type == program.device.type:
                return tensor
        sizes = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        text = f"contiguous {sizes} {str(dtype).removeprefix('torch.')} on {program.device.type}"
        raise refuse(PASS, name, text, tensor)

    rows = len(want("tokens", batch.tokens, torch.int64, "T"))
    requests = len(want("cache_seqlens", batch.cache_seqlens, torch.int32, "B"))
    want("positions", batch.positions, torch.int64, rows)
    want("slots", batch.slots, torch.int64, rows)
    want("cu_seqlens", batch.cu_seqlens, torch.int32, requests + 1)
    want("block_table", batch.block_table, torch.int32, requests, "max_pages")
    want("picked", batch.picked, torch.int64, "R")
    if type(batch.causal) is not int or not 0 <= batch.causal <= requests:
        raise refuse(PASS, "causal", f"an integer in 0..{requests}", batch.causal)
    if batch.causal < requests or batch.tree_lens is not None:
        want("tree_lens", batch.tree_lens, torch.int32, requests)
    if batch.causal < requests or batch.mask_bits is not None:
        words = want("mask_bits", batch.mask_bits, torch.int32, "rows", "W").shape[1]
        if words > MAX_MASK_WORDS:
            raise refuse(PASS, "mask_bits", f"at most {MAX_MASK_WORDS} words a row", batch.mask_bits)
    if not isinstance(inputs, (tuple, list)) or len(inputs) != len(program.inputs):
        raise refuse(PASS, "inputs", f"{len(program.inputs)} tensors", f"{inputs!r:.80}")
    for part, tensor in zip(program.inputs, inputs, strict=True):
        want("inputs", tensor, torch.float32, rows, part.width)


class Program:
    """Instructions in the order in which they were added.

    Args:
        rotated: columns of a head that rotary positions turn, the first ones; even.
        device: where the model lies.
    """

    def __init__(self, *, rotated: int, device: torch.device | str = "cpu") -> None:
        if type(rotated) is not int or rotated < 2 or rotated % 2:
            raise refuse(OP, "rotated", "an even number of at least 2", rotated)
        self.rotated = rotated
        self.device = torch.device(device)
        self.widths: list[int] = []
        self.picked: list[bool] = []
        self.steps: list[Step] = []
        self.caches: list[Cache] = []
        self.cos = self.sin = torch.empty(0, rotated // 2)
        self.outputs: list[Columns] = []
        self.inputs: list[Columns] = []
        self._runner: Any = None

    # -- building -----------------------------------------------------------------------------------------------------
    def buffer(self, width: int, *, picked: bool = False) -> Columns:
        """A new buffer."""
        if type(width) is not int or not 1 <= width <= MAX_WIDTH:
            raise refuse(OP, "width", f"an integer in 1..{MAX_WIDTH}", width)
        self.widths.append(width)
        self.picked.append(picked)
        return Columns(len(self.widths) - 1, 0, width, picked)

    def cache(self, cache: Cache) -> int:
        """Add the cache of a layer; its index."""
        keys = cache.keys
        dtypes = (*DTYPES, torch.int8)
        if not self._holds(keys) or keys.dtype not in dtypes or keys.ndim != 4 or 0 in keys.shape:
            raise refuse(OP, "keys", f"contiguous (P, page_size, G, D) {DTYPE_NAMES} or int8, none of them 0", keys)
        if keys.shape[3] < self.rotated:
            raise refuse(OP, "keys", f"heads of at least {self.rotated}, the columns that are rotated", keys)
        dtype = str(keys.dtype).removeprefix("torch.")
        if not self._holds(cache.values, keys.shape) or cache.values.dtype != keys.dtype:
            raise refuse(OP, "values", f"contiguous {tuple(keys.shape)} {dtype}, as keys", cache.values)
        for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            if (scale is None) == (keys.dtype == torch.int8):
                raise refuse(OP, name, "a tensor for int8, None otherwise", scale)
            if scale is not None and (not self._holds(scale, keys.shape[:3]) or scale.dtype != torch.float32):
                raise refuse(OP, name, f"contiguous {tuple(keys.shape[:3])} float32", scale)
        self.caches.append(cache)
        self._runner = None
        return len(self.caches) - 1

    def angles(self, cos: Tensor, sin: Tensor) -> None:
        """Tables (positions, rotated / 2) fp32: x[i], x[i + half] -> a cos - b sin, b cos + a sin."""
        for name, table in (("cos", cos), ("sin", sin)):
            good = has_data(table) and table.ndim == 2 and table.dtype == torch.float32
            if not good or table.shape[1] * 2 != self.rotated or table.device.type != self.device.type:
                raise refuse(OP, name, f"(positions, {self.rotated // 2}) float32", table)
        if len(cos) != len(sin):
            raise refuse(OP, "sin", f"{len(cos)} positions, as cos", sin)
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self._runner = None

    def embed(self, to: Columns, table: Tensor) -> None:
        """to = table[token]; table (V, to.width)."""
        good = self._holds(table) and table.ndim == 2 and len(table) >= 1 and table.dtype in DTYPES
        if not good or table.shape[1] != to.width:
            raise refuse(OP, "table", f"contiguous (V, {to.width}) {DTYPE_NAMES}", table)
        self._check(to, picked=False)
        self._add(Step("embed", to=to, tensors=(table,)))

    def load(self, to: Columns) -> int:
        """to = an input of run(); its index."""
        self._check(to, picked=False)
        self.inputs.append(to)
        self._add(Step("load", to=to, index=len(self.inputs) - 1))
        return len(self.inputs) - 1

    def store(self, source: Columns) -> int:
        """An output of run(), (rows, source.width) fp32; its index."""
        self._check(source)
        self.outputs.append(source)
        self._add(Step("store", source=source, index=len(self.outputs) - 1))
        return len(self.outputs) - 1

    def pick(self, to: Columns, source: Columns) -> None:
        """to = the picked rows of source."""
        self._check(to, width=source.width, picked=True)
        self._check(source, picked=False)
        self._add(Step("pick", to=to, source=source))

    def copy(self, to: Columns, source: Columns) -> None:
        self._pair(to, source)
        self._add(Step("copy", to=to, source=source))

    def add(self, to: Columns, source: Columns) -> None:
        """to += source."""
        self._pair(to, source, in_place=True)
        self._add(Step("add", to=to, source=source))

    def norm(self, to: Columns, source: Columns, weight: Tensor, eps: float) -> None:
        """to = source / sqrt(mean(source^2) + eps) * weight; weight (width,) fp32. to may be source."""
        self._vector("weight", weight, source.width)
        self._positive("eps", eps)
        self._pair(to, source, in_place=True)
        self._add(Step("norm", to=to, source=source, tensors=(weight,), number=eps))

    def linear(
        self,
        to: Columns,
        source: Columns,
        weight: Tensor | Int4Weight,
        bias: Tensor | None = None,
        *,
        activations: str = "auto",
    ) -> None:
        """to = W source + bias; bias (N,) fp32."""
        if bias is not None:
            self._vector("bias", bias, to.width)
        self._activations(activations)
        self._pair(to, source, width=source.width)
        if isinstance(weight, Int4Weight):
            got, want = (weight.out_features, weight.in_features), (to.width, source.width)
            if got != want or weight.num_experts is not None:
                raise refuse(OP, "weight", f"an Int4Weight {want}", f"{weight!r}")
            self._int4("weight", weight)
            self._add(Step("int4", to=to, source=source, weight=weight, tensors=(bias,), activations=activations))
            return
        if not self._holds(weight, (to.width, source.width)) or weight.dtype not in DTYPES:
            raise refuse(OP, "weight", f"contiguous {(to.width, source.width)} {DTYPE_NAMES}", weight)
        self._add(Step("dense", to=to, source=source, tensors=(weight, bias)))

    def silu_mul(self, to: Columns, source: Columns) -> None:
        """to = silu(first half of source) * second half."""
        self._pair(to, source, width=2 * to.width)
        self._add(Step("silu_mul", to=to, source=source))

    def rotate(
        self,
        source: Columns,
        cache: int,
        heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Queries, keys, values of source: norms and rotary positions in place; keys and values go to the cache."""
        kv_heads, size = self._heads(cache, heads)
        self._check(source, width=(heads + 2 * kv_heads) * size, picked=False)
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                self._vector(name, norm, size)
                self._positive("eps", eps)
        self._add(Step("rotate", source=source, index=cache, heads=heads, tensors=(q_norm, k_norm), number=eps))

    def attend(
        self, to: Columns, queries: Columns, cache: int, heads: int, scale: float, gate: Columns | None = None
    ) -> None:
        """to = attention of queries over the cache, times sigmoid(gate), one a head or element; to: a whole buffer."""
        width = heads * self._heads(cache, heads)[1]
        self._check(queries, width=width, picked=False)
        self._pair(to, queries)
        self._whole(to)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise refuse(OP, "scale", "a finite number", scale)
        if gate is not None:
            self._pair(to, gate, width=heads if gate.width == heads else width)
        self._add(Step("attend", to=to, source=queries, extra=gate, index=cache, heads=heads, number=scale))

    def moe(
        self,
        to: Columns,
        source: Columns,
        scores: Columns,
        w13: Tensor | Int4Weight,
        w2: Tensor | Int4Weight,
        *,
        top_k: int,
        rescale: bool,
        activations: str = "auto",
    ) -> None:
        """to = weighted sum over the top_k experts with the largest softmax(scores); ties go to the lower expert.

        w13 (E, 2 I, D), gate rows, then up rows, and w2 (E, D, I), of one dtype; rescale: the weights to sum 1. to and
        source are whole buffers.
        """
        self._activations(activations)
        self._pair(to, source)
        self._pair(to, scores, width=scores.width)
        self._whole(to)
        self._whole(source)
        if type(top_k) is not int or not 1 <= top_k <= scores.width:
            raise refuse(OP, "top_k", f"an integer in 1..{scores.width}", top_k)
        facts: dict[str, Any] = {"top_k": top_k, "rescale": rescale, "activations": activations}
        if isinstance(w13, Int4Weight) and isinstance(w2, Int4Weight):
            got = [(w.num_experts, w.out_features, w.in_features) for w in (w13, w2)]
            if got[0] != (scores.width, 2 * w2.in_features, source.width):
                raise refuse(OP, "w13", f"{scores.width} experts (2 * {w2.in_features}, {source.width})", f"{w13!r}")
            if got[1] != (scores.width, source.width, w2.in_features) or w2.group_size != w13.group_size:
                want = f"{scores.width} experts ({source.width}, {w2.in_features}) of group {w13.group_size}"
                raise refuse(OP, "w2", want, f"{w2!r}")
            self._int4("w13", w13)
            self._int4("w2", w2)
            step = Step("moe", to=to, source=source, extra=scores, weight=w13, weight2=w2, **facts)
        elif isinstance(w13, Tensor) and isinstance(w2, Tensor):
            good = self._holds(w13) and w13.dtype in DTYPES and w13.ndim == 3 and w13.shape[1] % 2 == 0
            if not good or (len(w13), w13.shape[2]) != (scores.width, source.width) or not w13.shape[1]:
                want = f"contiguous ({scores.width}, 2 I, {source.width}) {DTYPE_NAMES}"
                raise refuse(OP, "w13", want, w13)
            if not self._holds(w2, (scores.width, source.width, w13.shape[1] // 2)) or w2.dtype != w13.dtype:
                want = f"contiguous {(scores.width, source.width, w13.shape[1] // 2)} {w13.dtype}, as w13"
                raise refuse(OP, "w2", want.replace("torch.", ""), w2)
            step = Step("moe", to=to, source=source, extra=scores, tensors=(w13, w2), **facts)
        else:
            raise refuse(OP, "w2", "of w13's kind: both INT4 or both dense", type(w2).__name__)
        self._add(step)

    def _holds(self, tensor: object, shape: tuple[int, ...] | None = None) -> TypeGuard[Tensor]:
        """Whether a contiguous tensor of this shape lies where the model lies."""
        if not has_data(tensor) or not tensor.is_contiguous() or tensor.device.type != self.device.type:
            return False
        return shape is None or tensor.shape == shape

    def _vector(self, name: str, tensor: object, width: int) -> None:
        if not self._holds(tensor, (width,)) or tensor.dtype != torch.float32:
            raise refuse(OP, name, f"contiguous ({width},) float32", tensor)

    def _int4(self, name: str, weight: Int4Weight) -> None:
        if weight.device.type != self.device.type:
            raise refuse(OP, name, f"a weight on {self.device.type}", f"{weight!r}")

    def _positive(self, name: str, number: object) -> None:
        if not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise refuse(OP, name, "a finite number above 0", number)

    def _activations(self, activations: object) -> None:
        if activations not in ACTIVATIONS:
            raise refuse(OP, "activations", f"one of {', '.join(ACTIVATIONS)}", activations)

    def _check(self, part: Columns, *, width: int | None = None, picked: bool | None = None) -> None:
        """Refuses columns that are not of this program, or not so many, or of other rows."""
        good = isinstance(part, Columns) and 0 <= part.buffer < len(self.widths)
        if not good or part.picked != self.picked[part.buffer] or part.first + part.width > self.widths[part.buffer]:
            raise refuse(OP, "columns", "columns of a buffer of this program", f"{part}")
        if width is not None and part.width != width:
            raise refuse(OP, "columns", f"{width} of them", f"{part}")
        if picked is not None and part.picked != picked:
            raise refuse(OP, "columns", f"a buffer of {'picked' if picked else 'all'} rows", f"{part}")

    def _pair(self, to: Columns, source: Columns, *, width: int | None = None, in_place: bool = False) -> None:
        """Refuses a source of other rows, of another width (default: to's), or one that the result would overwrite."""
        self._check(to)
        self._check(source, width=to.width if width is None else width, picked=to.picked)
        apart = to.first + to.width <= source.first or source.first + source.width <= to.first
        if to.buffer == source.buffer and not apart and not (in_place and to == source):
            raise refuse(OP, "columns", "a result apart from what is read", f"{to} and {source}")

    def _whole(self, part: Columns) -> None:
        if part.width != self.widths[part.buffer]:
            raise refuse(OP, "columns", "a whole buffer", f"{part}")

    def _heads(self, cache: int, heads: int) -> tuple[int, int]:
        """(key and value heads, head size) of a cache that heads query heads share."""
        if type(cache) is not int or not 0 <= cache < len(self.caches):
            raise refuse(OP, "cache", f"one of {len(self.caches)} that were added", cache)
        kv_heads, size = self.caches[cache].keys.shape[2:]
        if type(heads) is not int or heads < 1 or heads % kv_heads:
            raise refuse(OP, "heads", f"a multiple of {kv_heads}", heads)
        return kv_heads, size

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self._runner = None

    # -- running ------------------------------------------------------------------------------------------------------
    @property
    def runner(self) -> Any:
        """What runs the instructions here; made at the first pass."""
        if self._runner is None:
            room = forced("decoder") or ("cpu" if self.device.type == "cpu" else "triton")
            if room == "cpu":
                if self.device.type != "cpu":
                    raise BackendError(f"decoder_pass: cpu: needs CPU tensors, not {self.device.type}")
                from m3kernels.decoder.run_cpu import NativePass

                self._runner = NativePass(self)
            else:
                from m3kernels.decoder.run_torch import TorchPass

                self._runner = TorchPass(self)
        return self._runner

    def run(self, batch: Batch, inputs: tuple[Tensor, ...] = ()) -> list[Tensor]:
        """One pass; the stored outputs, (rows, width) fp32 each.

        Args:
            batch: the rows. inputs: (T, width) fp32 contiguous, one for each load().
        Raises:
            ValueError: a token, position, slot or page outside its range, or sizes that do not fit.
        """
        check_batch(self, batch, inputs)
        return self.runner.run(batch, inputs)

    def profile(self, on: bool) -> dict[str, float]:
        """Seconds in each instruction since the last call, where the native pass runs; then switches it on or off."""
        return self.runner.profile(on)

    def experts_touched(self) -> tuple[int, int]:
        """(distinct experts that the last pass read, summed over its layers; such layers)."""
        return self.runner.experts_touched()
