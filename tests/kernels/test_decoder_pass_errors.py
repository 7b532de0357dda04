"""What a program and a pass refuse: while it is built, at a batch in both rooms, at the native border."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_pass_cases import Chunk, Paging, Shape, decoder, make_batch, new_cache, tables, words
from torch import Tensor

from m3kernels import BackendError, _cpu_ext
from m3kernels.decoder.program import Batch, Cache, Columns, Program
from m3kernels.decoder.run_cpu import NativePass, span
from m3kernels.decoder.run_torch import TorchPass
from m3kernels.int4.quantize import quantize_weight

HALF = torch.float16
SCALES = torch.ones(6, 4, 2)


class Parts:
    """A program under construction, and columns of it."""

    def __init__(self) -> None:
        self.program = Program(rotated=4)
        self.x, self.y, self.qkv = (self.program.buffer(width) for width in (16, 16, 32))
        self.wide = self.program.buffer(48)
        self.scores, self.few = self.program.buffer(3), self.program.buffer(16, picked=True)
        self.cache = self.program.cache(Cache(torch.zeros(6, 4, 2, 4), torch.zeros(6, 4, 2, 4)))


def keys(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (6, 4, 2, 4), dtype=dtype)


def expert(*shape: int) -> Tensor:
    return torch.zeros(shape)


def int4(*shape: int, group_size: int = 16) -> Any:
    return quantize_weight(torch.ones(shape), group_size=group_size)


def moe(p: Parts, **given: Any) -> None:
    facts = {"w13": expert(3, 10, 16), "w2": expert(3, 16, 5), "top_k": 2, "rescale": True} | given
    p.program.moe(given.get("to", p.y), given.get("source", p.x), p.scores, facts["w13"], facts["w2"],
                  top_k=facts["top_k"], rescale=True, activations=given.get("activations", "auto"))  # fmt: skip


def attend(p: Parts, **given: Any) -> None:
    facts = {"to": p.y, "queries": p.x, "cache": p.cache, "heads": 4, "scale": 0.5, "gate": None} | given
    p.program.attend(**facts)


def rotate(p: Parts, **given: Any) -> None:
    facts = {"source": p.qkv, "cache": p.cache, "heads": 4, "eps": 1e-5} | given
    p.program.rotate(**facts)


BUILDING: dict[str, tuple[Callable[[Parts], object], str]] = {
    "rotated_odd": (lambda p: Program(rotated=3), "Program: rotated: want an even number of at least 2; got 3"),
    "rotated_none": (lambda p: Program(rotated=0), "rotated: want an even number"),
    "buffer_none": (lambda p: p.program.buffer(0), r"width: want an integer in 1\.\.67108863; got 0"),
    "buffer_huge": (lambda p: p.program.buffer(2**26), "width: want an integer in"),
    "part_outside": (lambda p: p.x.part(10, 7), r"columns: want columns of 0\.\.15; got 7 from 10"),
    "part_negative": (lambda p: p.x.part(-1, 2), "columns: want columns"),
    "part_empty": (lambda p: p.x.part(3, 0), "columns: want columns"),
    "cache_rank": (lambda p: p.program.cache(Cache(keys(6, 4, 8), keys(6, 4, 8))), "keys: want contiguous"),
    "cache_dtype": (lambda p: p.program.cache(Cache(keys(dtype=torch.float64), keys())), "keys: want contiguous"),
    "cache_empty": (lambda p: p.program.cache(Cache(keys(0, 4, 2, 4), keys(0, 4, 2, 4))), "none of them 0"),
    "cache_strided": (lambda p: p.program.cache(Cache(keys(6, 2, 4, 4).transpose(1, 2), keys())), "keys: want contig"),
    "cache_small_heads": (lambda p: p.program.cache(Cache(keys(6, 4, 2, 2), keys(6, 4, 2, 2))), "heads of at least 4"),
    "cache_values": (lambda p: p.program.cache(Cache(keys(), keys(6, 4, 2, 8))), r"values: want .*\(6, 4, 2, 4\)"),
    "cache_values_dtype": (lambda p: p.program.cache(Cache(keys(), keys(dtype=HALF))), "values: want .*as keys"),
    "cache_elsewhere": (lambda p: p.program.cache(Cache(keys().to("meta"), keys())), "keys: want contiguous"),
    "cache_scales_lacking": (
        lambda p: p.program.cache(Cache(*[keys(dtype=torch.int8)] * 2)), "k_scale: want a tensor for int8"
    ),
    "cache_scales_for_none": (lambda p: p.program.cache(Cache(keys(), keys(), SCALES, SCALES)), "k_scale: want .*None"),
    "cache_scales_short": (
        lambda p: p.program.cache(Cache(*[keys(dtype=torch.int8)] * 2, SCALES, SCALES[:5])),
        r"v_scale: want contiguous \(6, 4, 2\) float32; got \(5, 4, 2\)",
    ),
    "angles_width": (lambda p: p.program.angles(*tables(8)), r"cos: want \(positions, 2\) float32; got"),
    "angles_dtype": (lambda p: p.program.angles(*(t.double() for t in tables(4))), "cos: want .* float32"),
    "angles_lengths": (lambda p: p.program.angles(tables(4)[0], tables(4)[1][:9]), "sin: want 512 positions"),
    "embed_width": (lambda p: p.program.embed(p.x, expert(9, 15)), r"table: want contiguous \(V, 16\)"),
    "embed_empty": (lambda p: p.program.embed(p.x, expert(0, 16)), "table: want contiguous"),
    "embed_strided": (lambda p: p.program.embed(p.x, expert(16, 9).T), "table: want contiguous"),
    "embed_picked": (lambda p: p.program.embed(p.few, expert(9, 16)), "columns: want a buffer of all rows"),
    "load_picked": (lambda p: p.program.load(p.few), "columns: want a buffer of all rows"),
    "store_foreign": (lambda p: p.program.store(Columns(9, 0, 1, False)), "columns of a buffer of this program"),
    "store_too_wide": (lambda p: p.program.store(Columns(0, 0, 17, False)), "columns of a buffer of this program"),
    "pick_from_picked": (lambda p: p.program.pick(p.few, p.few), "columns: want a buffer of all rows"),
    "pick_to_all": (lambda p: p.program.pick(p.x, p.y), "columns: want a buffer of picked rows"),
    "pick_width": (lambda p: p.program.pick(p.few, p.qkv), "columns: want 32 of them"),
    "copy_width": (lambda p: p.program.copy(p.x, p.qkv), "columns: want 16 of them"),
    "copy_rows": (lambda p: p.program.copy(p.few, p.x), "columns: want a buffer of picked rows"),
    "copy_itself": (lambda p: p.program.copy(p.x, p.x), "a result apart from what is read"),
    "add_overlap": (lambda p: p.program.add(p.x.part(0, 9), p.x.part(1, 9)), "a result apart"),
    "norm_weight": (lambda p: p.program.norm(p.x, p.y, torch.ones(15), 1e-5), r"weight: want contiguous \(16,\)"),
    "norm_dtype": (lambda p: p.program.norm(p.x, p.y, torch.ones(16, dtype=HALF), 1e-5), "weight: want"),
    "norm_eps": (lambda p: p.program.norm(p.x, p.y, torch.ones(16), 0.0), "eps: want a finite number above 0"),
    "norm_nan": (lambda p: p.program.norm(p.x, p.y, torch.ones(16), float("nan")), "eps: want a finite number"),
    "norm_overlap": (lambda p: p.program.norm(p.x.part(0, 8), p.x.part(4, 8), torch.ones(8), 1.0), "a result apart"),
    "linear_shape": (lambda p: p.program.linear(p.x, p.qkv, expert(16, 31)), r"weight: want contiguous \(16, 32\)"),
    "linear_dtype": (lambda p: p.program.linear(p.x, p.y, expert(16, 16).double()), "weight: want contiguous"),
    "linear_strided": (lambda p: p.program.linear(p.x, p.qkv, expert(32, 16).T), "weight: want contiguous"),
    "linear_bias": (lambda p: p.program.linear(p.x, p.y, expert(16, 16), torch.ones(15)), r"bias: want .*\(16,\)"),
    "linear_rows": (lambda p: p.program.linear(p.few, p.x, expert(16, 16)), "a buffer of picked rows"),
    "linear_in_place": (lambda p: p.program.linear(p.x, p.x, expert(16, 16)), "a result apart"),
    "int4_shape": (lambda p: p.program.linear(p.x, p.qkv, int4(16, 16)), r"weight: want an Int4Weight \(16, 32\)"),
    "int4_experts": (lambda p: p.program.linear(p.x, p.y, int4(2, 16, 16)), "weight: want an Int4Weight"),
    "int4_activations": (
        lambda p: p.program.linear(p.x, p.y, int4(16, 16), activations="int4"), "activations: want one of auto, exact"
    ),
    "silu_width": (lambda p: p.program.silu_mul(p.x, p.y), "columns: want 32 of them"),
    "silu_in_place": (lambda p: p.program.silu_mul(p.qkv.part(0, 16), p.qkv), "a result apart"),
    "rotate_cache": (lambda p: rotate(p, cache=1), "cache: want one of 1 that were added; got 1"),
    "rotate_heads": (lambda p: rotate(p, heads=3), "heads: want a multiple of 2; got 3"),
    "rotate_heads_huge": (lambda p: rotate(p, heads=2**62 + 4), "columns: want .* of them"),
    "rotate_width": (lambda p: rotate(p, source=p.x), "columns: want 32 of them"),
    "rotate_picked": (lambda p: rotate(p, source=p.few, heads=0), "heads: want a multiple of 2; got 0"),
    "rotate_norm": (lambda p: rotate(p, q_norm=torch.ones(3)), r"q_norm: want contiguous \(4,\) float32"),
    "rotate_eps": (lambda p: rotate(p, k_norm=torch.ones(4), eps=0.0), "eps: want a finite number above 0"),
    "attend_width": (lambda p: attend(p, queries=p.qkv), "columns: want 16 of them"),
    "attend_cache": (lambda p: attend(p, cache=-1), "cache: want one of 1"),
    "attend_in_place": (lambda p: attend(p, queries=p.y), "a result apart"),
    "attend_part": (lambda p: attend(p, to=p.wide.part(0, 16)), "columns: want a whole buffer"),
    "attend_scale": (lambda p: attend(p, scale=float("inf")), "scale: want a finite number; got inf"),
    "attend_gate": (lambda p: attend(p, gate=p.wide.part(0, 5)), "columns: want 16 of them"),
    "attend_gate_picked": (lambda p: attend(p, gate=p.few), "columns: want a buffer of all rows"),
    "moe_top_k": (lambda p: moe(p, top_k=4), r"top_k: want an integer in 1\.\.3; got 4"),
    "moe_none": (lambda p: moe(p, top_k=0), "top_k: want an integer"),
    "moe_kinds": (lambda p: moe(p, w2=int4(3, 16, 5)), "w2: want of w13's kind"),
    "moe_experts": (lambda p: moe(p, w13=expert(4, 10, 16)), r"w13: want contiguous \(3, 2 I, 16\)"),
    "moe_odd": (lambda p: moe(p, w13=expert(3, 9, 16)), "w13: want contiguous"),
    "moe_w2": (lambda p: moe(p, w2=expert(3, 16, 6)), r"w2: want contiguous \(3, 16, 5\) float32, as w13"),
    "moe_dtypes": (lambda p: moe(p, w2=expert(3, 16, 5).half()), "w2: want .* as w13; got .* float16"),
    "moe_int4_w13": (lambda p: moe(p, w13=int4(3, 10, 15), w2=int4(3, 16, 5)), "w13: want 3 experts"),
    "moe_int4_w2": (lambda p: moe(p, w13=int4(3, 10, 16), w2=int4(3, 15, 5)), "w2: want 3 experts"),
    "moe_int4_groups": (lambda p: moe(p, w13=int4(3, 10, 16), w2=int4(3, 16, 5, group_size=32)), "w2: want .*group 16"),
    "moe_part": (lambda p: moe(p, to=p.wide.part(0, 16)), "columns: want a whole buffer"),
    "moe_activations": (lambda p: moe(p, activations=None), "activations: want one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILDING)
def test_building_refuses(case: str) -> None:
    build, message = BUILDING[case]
    with pytest.raises(ValueError, match=message):
        build(Parts())


# -- batches ----------------------------------------------------------------------------------------------------------
CHUNKS = [Chunk(0, 0, words(0, 9)), Chunk(1, 0, words(1, 5), (-1, 0, 0, 1, 2))]  # 14 rows


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def changed(name: str, at: int, value: int) -> Callable[[Batch], dict[str, Any]]:
    """One element of a tensor of the batch becomes the value."""

    def change(batch: Batch) -> dict[str, Any]:
        tensor = getattr(batch, name).clone()
        tensor.view(-1)[at] = value
        return {name: tensor}

    return change


FAR = 2**62
BATCHES: dict[str, tuple[Callable[[Batch], dict[str, Any]], str]] = {
    "token_negative": (changed("tokens", 3, -1), r"tokens: want 0\.\.96; got -1"),
    "token_beyond": (changed("tokens", 13, 97), r"tokens: want 0\.\.96; got 97"),
    "position_negative": (changed("positions", 0, -1), r"positions: want 0\.\.511; got -1"),
    "position_beyond": (changed("positions", 5, FAR), r"positions: want 0\.\.511"),
    "slot_negative": (changed("slots", 0, -1), r"slots: want 0\.\.159; got -1"),
    "slot_beyond": (changed("slots", 13, 160), r"slots: want 0\.\.159; got 160"),
    "picked_negative": (changed("picked", 0, -1), r"picked: want 0\.\.13; got -1"),
    "picked_beyond": (changed("picked", 2, 14), r"picked: want 0\.\.13; got 14"),
    "starts_late": (changed("cu_seqlens", 0, 1), "cu_seqlens: want"),
    "ends_early": (changed("cu_seqlens", 2, 13), "cu_seqlens: want"),
    "starts_descend": (
        lambda b: {"cu_seqlens": ints(0, 9, 3, 14), "cache_seqlens": ints(9, 9, 9), "causal": 3,
                   "block_table": b.block_table[[0, 0, 0]], "tree_lens": None, "mask_bits": None},
        "cu_seqlens: want ascending",
    ),
    "starts_beyond": (changed("cu_seqlens", 1, 2**31 - 1), "cu_seqlens: want"),
    "keys_fewer_than_queries": (changed("cache_seqlens", 0, 8), "cache_seqlens: want at least"),
    "keys_fewer_than_nodes": (changed("cache_seqlens", 1, 4), "cache_seqlens: want at least"),
    "keys_negative": (changed("cache_seqlens", 0, -(2**31)), "cache_seqlens: want at least"),
    "keys_beyond_the_table": (changed("cache_seqlens", 0, 2**31 - 1), "block_table: want pages for 2147483647 keys"),
    "tree_negative": (changed("tree_lens", 1, -1), "tree_lens: want"),
    "tree_beyond_its_bits": (changed("tree_lens", 1, 33), "tree_lens: want"),
    "block_negative": (changed("block_table", 0, -1), r"block_table: want block ids in 0\.\.39"),
    "block_beyond": (changed("block_table", 4, 40), r"block_table: want block ids in 0\.\.39"),
    "masks_short": (lambda b: {"mask_bits": b.mask_bits[:4]}, "mask_bits: want"),
    "masks_of_no_words": (lambda b: {"mask_bits": b.mask_bits[:, :0].contiguous()}, "mask_bits: want"),
    "masks_too_wide": (lambda b: {"mask_bits": b.mask_bits.repeat(1, 33)}, "mask_bits: want at most 32 words"),
    "masks_lacking": (lambda b: {"mask_bits": None}, r"mask_bits: want contiguous \(rows, W\) int32"),
    "masks_flat": (lambda b: {"mask_bits": b.mask_bits[:, 0].contiguous()}, "mask_bits: want contiguous"),
    "trees_lacking": (lambda b: {"tree_lens": None}, r"tree_lens: want contiguous \(2,\) int32 on cpu; got None"),
    "causal_negative": (lambda b: {"causal": -1}, r"causal: want an integer in 0\.\.2; got -1"),
    "causal_beyond": (lambda b: {"causal": 3}, r"causal: want an integer in 0\.\.2; got 3"),
    "causal_float": (lambda b: {"causal": 1.0}, "causal: want an integer"),
    "tokens_int32": (lambda b: {"tokens": b.tokens.int()}, r"tokens: want contiguous \(T,\) int64"),
    "tokens_strided": (lambda b: {"tokens": b.tokens.repeat_interleave(2)[::2]}, "tokens: want contiguous"),
    "tokens_list": (lambda b: {"tokens": [0] * 14}, "tokens: want contiguous .*; got list"),
    "tokens_square": (lambda b: {"tokens": b.tokens.view(2, 7)}, "tokens: want contiguous"),
    "tokens_more": (lambda b: {"tokens": b.tokens.repeat(2)}, r"positions: want contiguous \(28,\) int64"),
    "positions_fewer": (lambda b: {"positions": b.positions[:13]}, r"positions: want contiguous \(14,\) int64"),
    "slots_elsewhere": (lambda b: {"slots": b.slots.to("meta")}, "slots: want contiguous"),
    "starts_int64": (lambda b: {"cu_seqlens": b.cu_seqlens.long()}, r"cu_seqlens: want contiguous \(3,\) int32"),
    "starts_short": (lambda b: {"cu_seqlens": b.cu_seqlens[:2]}, r"cu_seqlens: want contiguous \(3,\) int32"),
    "table_short": (lambda b: {"block_table": b.block_table[:1]}, r"block_table: want contiguous \(2, max_pages\)"),
    "table_narrow": (lambda b: {"block_table": b.block_table[:, :2].contiguous()}, "block_table: want pages for 9"),
    "table_flat": (lambda b: {"block_table": b.block_table[0]}, "block_table: want contiguous"),
    "table_int64": (lambda b: {"block_table": b.block_table.long()}, "block_table: want contiguous"),
    "picked_int32": (lambda b: {"picked": b.picked.int()}, r"picked: want contiguous \(R,\) int64"),
}  # fmt: skip


@pytest.mark.parametrize("kind", (NativePass, TorchPass))
@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_is_refused(case: str, kind: type[NativePass] | type[TorchPass]) -> None:
    change, message = BATCHES[case]
    program, batch = decoder(Shape(layers=1)), make_batch(CHUNKS, Paging())
    program._runner = kind(program)
    for name, value in change(batch).items():
        setattr(batch, name, value)
    with pytest.raises(ValueError, match=f"(decoder_pass|tree_attention): {message}"):
        program.run(batch)


INPUTS: dict[str, tuple[Any, str]] = {
    "none": ((), r"inputs: want 1 tensors; got \(\)"),
    "two": ((torch.ones(14, 8), torch.ones(14, 8)), "inputs: want 1 tensors"),
    "a_tensor": (torch.ones(14, 8), "inputs: want 1 tensors"),
    "rows": ((torch.ones(13, 8),), r"inputs: want contiguous \(14, 8\) float32 on cpu; got \(13, 8\)"),
    "width": ((torch.ones(14, 9),), r"inputs: want contiguous \(14, 8\)"),
    "dtype": ((torch.ones(14, 8).half(),), r"inputs: want contiguous \(14, 8\) float32"),
    "strided": ((torch.ones(8, 14).T,), "inputs: want contiguous"),
    "flat": ((torch.ones(112),), "inputs: want contiguous"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_are_refused(case: str) -> None:
    inputs, message = INPUTS[case]
    program = Program(rotated=2)
    program.angles(torch.ones(64, 1), torch.zeros(64, 1))
    program.load(program.buffer(8))
    with pytest.raises(ValueError, match=f"decoder_pass: {message}"):
        program.run(make_batch(CHUNKS, Paging()), inputs)


def test_a_refused_pass_leaves_the_caches_alone() -> None:
    program, batch = decoder(Shape()), make_batch(CHUNKS, Paging())
    batch.tokens[13] = 97
    with pytest.raises(ValueError, match="tokens"):
        program.run(batch)
    assert all(cache.keys.isnan().all() for cache in program.caches)


def test_without_angles_no_position_is_good() -> None:
    program = Program(rotated=2)
    program.store(program.buffer(3))
    with pytest.raises(ValueError, match="decoder_pass: positions: want"):
        program.run(make_batch(CHUNKS, Paging()))


# -- rooms ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", ("decoder=nowhere", "nowhere", "decoder=torch"))
def test_an_unknown_room(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3KERNELS_BACKEND", room)
    with pytest.raises(BackendError, match=r"M3KERNELS_BACKEND: want one of .*; got '.*'"):
        decoder(Shape(layers=1)).run(make_batch(CHUNKS, Paging()))


def test_the_native_pass_needs_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3KERNELS_BACKEND", "decoder=cpu")
    with pytest.raises(BackendError, match="decoder_pass: cpu: needs CPU tensors, not meta"):
        Program(rotated=2, device="meta").runner  # noqa: B018


def test_a_tensor_that_lost_its_strides_is_refused_when_the_native_pass_is_made() -> None:
    cache = new_cache(Shape(), 6, 4)
    program = Program(rotated=16)
    program.cache(cache)
    cache.keys.transpose_(1, 2)
    with pytest.raises(ValueError, match="decoder_pass: keys: want contiguous"):
        NativePass(program)


# -- the native border ------------------------------------------------------------------------------------------------
TABLE = torch.zeros(64)
WHOLE = (TABLE.data_ptr(), 64)
NONE = (0, 0)


def native() -> Any:
    """Buffers of 8 and 4 columns and of 8 for picked rows; a cache of 2 pages of 4 slots, one head of 4."""
    program = _cpu_ext.DecoderProgram([8, 4, 8, 12], [False, False, True, False], 2)
    program.add_cache(((TABLE.data_ptr(), 32), (TABLE.data_ptr(), 32), NONE, NONE, 0, 2, 4, 1, 4))
    return program


X, Y, PICKED, QKV = (0, 0, 8), (1, 0, 4), (2, 0, 8), (3, 0, 12)
TILES, SHORT = (TABLE.data_ptr(), 128), (TABLE.data_ptr(), 32)  # nobody reads a tile: every call is refused
BORDER: dict[str, tuple[Callable[[Any], object], str]] = {
    "widths": (lambda p: _cpu_ext.DecoderProgram([8], [], 2), "picked: want one value a buffer"),
    "width_huge": (lambda p: _cpu_ext.DecoderProgram([2**26], [False], 2), "widths: want"),
    "width_none": (lambda p: _cpu_ext.DecoderProgram([0], [False], 2), "widths: want"),
    "rotated_odd": (lambda p: _cpu_ext.DecoderProgram([8], [False], 3), "rotated: want"),
    "rotated_negative": (lambda p: _cpu_ext.DecoderProgram([8], [False], -2), "rotated: want"),
    "buffer": (lambda p: p.copy((9, 0, 4), Y), "to: want columns of one of 4 buffers"),
    "buffer_negative": (lambda p: p.copy((-1, 0, 4), Y), "to: want columns"),
    "columns_wrap": (lambda p: p.copy((0, 2**62, 2**62), (1, 2**62, 2**62)), "columns: want numbers in"),
    "columns_far": (lambda p: p.copy((0, 2**30, 2**30), (1, 2**30, 2**30)), "to: want columns"),
    "columns_negative": (lambda p: p.copy((0, -4, 4), Y), "columns: want"),
    "columns_outside": (lambda p: p.copy((0, 5, 4), Y), "to: want columns"),
    "embed_wraps": (lambda p: p.embed((0, 0, 2**40), WHOLE, 0, 2**30), "columns: want"),
    "embed_null": (lambda p: p.embed(X, (0, 64), 0, 8), "embed: want 64 elements"),
    "embed_short": (lambda p: p.embed(X, WHOLE, 0, 9), "embed: want 72 elements; got 64"),
    "embed_type": (lambda p: p.embed(X, WHOLE, 3, 8), "embed: want dtype"),
    "norm_short": (lambda p: p.norm(X, X, (TABLE.data_ptr(), 7), 1e-5), "norm: want 8 elements"),
    "norm_eps": (lambda p: p.norm(X, X, (TABLE.data_ptr(), 8), float("nan")), "norm: want a weight and eps"),
    "dense_short": (lambda p: p.dense(Y, X, ((TABLE.data_ptr(), 31), 0, 4, 8, NONE, 0)), "weight: want 32 elements"),
    "dense_sizes": (lambda p: p.dense(Y, X, (WHOLE, 0, 8, 8, NONE, 0)), "instruction: want widths 8 -> 8"),
    "dense_huge": (lambda p: p.dense(Y, X, (NONE, 0, 2**30, 2**30, NONE, 0)), r"weight: want at most 2\*\*46 elements"),
    "dense_bias": (lambda p: p.dense(Y, X, (SHORT, 0, 4, 8, (TABLE.data_ptr(), 3), 0)), "bias: want 4 elements"),
    "dense_in_place": (lambda p: p.dense(X, X, (WHOLE, 0, 8, 8, NONE, 0)), "a result apart from what is read"),
    "int4_wraps": (
        lambda p: p.int4(Y, X, (NONE, NONE, NONE, NONE, 0, 2**30, 2**30, 2**30, 16, 0), NONE, 0),
        r"scales: want at most 2\*\*46 elements",
    ),
    "int4_group": (lambda p: p.int4(Y, X, (TILES, WHOLE, NONE, NONE, 0, 1, 4, 8, 8, 0), NONE, 0), "group_size: want"),
    "int4_first": (lambda p: p.int4(Y, X, (TILES, WHOLE, NONE, NONE, 0, 1, 4, 8, 16, -16), NONE, 0), "first_k: want"),
    "int4_short": (lambda p: p.int4(Y, X, (TILES, WHOLE, NONE, NONE, 0, 2, 4, 8, 16, 0), NONE, 0), "qweight: want 256"),
    "int4_mode": (lambda p: p.int4(Y, X, (TILES, WHOLE, NONE, NONE, 0, 1, 4, 8, 16, 0), NONE, 9), "activations: want"),
    "cache_wraps": (
        lambda p: p.add_cache(((1, 0), (1, 0), NONE, NONE, 0, 2**30, 2**30, 16, 4)), r"cache: want at most 2\*\*46"
    ),
    "cache_null": (lambda p: p.add_cache(((0, 32), (0, 32), NONE, NONE, 0, 2, 4, 1, 4)), "keys: want 32 elements"),
    "cache_scales": (lambda p: p.add_cache((WHOLE, WHOLE, NONE, NONE, 3, 2, 4, 2, 4)), "k_scale: want 16 elements"),
    "cache_small": (lambda p: p.add_cache(((1, 8), (1, 8), NONE, NONE, 0, 2, 4, 1, 1)), "cache: want positive sizes"),
    "rotate_cache": (lambda p: p.rotate(QKV, 1, 1, NONE, NONE, 1e-5), "cache: want one that was added; got 1"),
    "rotate_norm": (lambda p: p.rotate(QKV, 0, 1, (TABLE.data_ptr(), 3), NONE, 1e-5), "q_norm: want 4 elements; got 3"),
    "rotate_heads_wrap": (lambda p: p.rotate(QKV, 0, 2**62 + 1, NONE, NONE, 1e-5), "heads: want a multiple"),
    "rotate_columns": (lambda p: p.rotate((3, 0, 8), 0, 1, NONE, NONE, 1e-5), "rotate: want 12 columns; got 8"),
    "attend_heads_wrap": (lambda p: p.attend(Y, (3, 0, 4), (-1, 0, 0), 0, 2**62 + 1, 1.0), "heads: want a multiple"),
    "attend_picked": (lambda p: p.attend(Y, (2, 0, 4), (-1, 0, 0), 0, 1, 1.0), "attention: want buffers of all rows"),
    "attend_part": (lambda p: p.attend((0, 0, 4), (3, 0, 4), (-1, 0, 0), 0, 1, 1.0), "attention: want a whole buffer"),
    "attend_gate": (lambda p: p.attend(Y, (3, 0, 4), (0, 0, 3), 0, 1, 1.0), "gate: want a column a head or element"),
    "attend_scale": (lambda p: p.attend(Y, (3, 0, 4), (-1, 0, 0), 0, 1, float("nan")), "scale: want a finite number"),
    "experts_wrap": (
        lambda p: p.add_dense_experts(NONE, NONE, 0, 2**30, 2**30, 2**30, 1, True), r"w13: want at most 2\*\*46"
    ),
    "experts_top_k": (
        lambda p: p.add_dense_experts(WHOLE, (TABLE.data_ptr(), 32), 0, 2, 8, 2, 3, True), "experts: want .*top_k"
    ),
    "moe_experts": (lambda p: p.moe(X, X, Y, 0, 0), "experts: want some that were added"),
    "load_index": (lambda p: p.load(X, 64), r"load: want an input in 0\.\.63"),
    "store_index": (lambda p: p.store(-1, X), r"store: want an output in 0\.\.63"),
    "store_twice": (lambda p: (p.store(0, X), p.store(0, X)), "store: want one instruction an output"),
    "pick": (lambda p: p.pick(X, PICKED), "pick: want from all rows to picked ones"),
    "copy_rows": (lambda p: p.copy(PICKED, X), "instruction: want buffers of the same rows"),
    "silu": (lambda p: p.silu_mul(Y, Y), "instruction: want widths 8 -> 4"),
    "silu_in_place": (lambda p: p.silu_mul((0, 2, 4), X), "a result apart"),
}  # fmt: skip


@pytest.mark.parametrize("case", BORDER)
def test_the_border_refuses(case: str) -> None:
    call, message = BORDER[case]
    with pytest.raises(ValueError, match=f"decoder_pass: .*{message}"):
        call(native())


COS = torch.ones(16, 1)
ROWS3, ENDS, SEQLENS, PAGES = torch.arange(3), ints(0, 3), ints(3), ints(0, 1)
OUT, IN = torch.zeros(3, 8), torch.zeros(3, 8)


def arguments(**changes: Any) -> list[Any]:
    """Arguments of run() for three rows of one causal request."""
    facts = {
        "rows": (span("", ROWS3), span("", ROWS3), span("", ROWS3)),
        "sequences": (span("", ENDS), span("", SEQLENS), NONE, span("", PAGES), 2, 1),
        "mask": (NONE, 0),
        "picked": span("", ROWS3),
        "angles": (span("", COS), span("", COS), 1),
        "inputs": [(span("", IN), 3, 8)],
        "outputs": [(span("", OUT), 3, 8)],
        "threads": 1,
    }
    return list((facts | changes).values())


A, S = span("", ROWS3), (span("", ENDS), span("", SEQLENS), NONE, span("", PAGES), 2, 1)
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "tokens_null": ({"rows": ((0, 3), A, A)}, "tokens: want 3 elements"),
    "tokens_negative": ({"rows": ((A[0], -3), (A[0], -3), (A[0], -3))}, r"tokens: want sizes in 0 \.\. 2"),
    "positions_short": ({"rows": (A, (A[0], 2), A)}, "positions: want 3 elements; got 2"),
    "slots_null": ({"rows": (A, A, NONE)}, "slots: want 3 elements; got 0"),
    "starts_short": ({"sequences": ((S[0][0], 1), *S[1:])}, "cu_seqlens: want 2 elements; got 1"),
    "seqlens_null": ({"sequences": (S[0], (0, 1), *S[2:])}, "cache_seqlens: want 1 elements"),
    "seqlens_negative": ({"sequences": ((S[0][0], 0), (S[1][0], -1), *S[2:])}, "cache_seqlens: want sizes"),
    "table_null": ({"sequences": (*S[:3], NONE, 2, 1)}, "block_table: want 2 elements; got 0"),
    "table_wraps": ({"sequences": (*S[:3], NONE, 2**62, 1)}, "block_table: want sizes below"),
    "causal": ({"sequences": (*S[:5], 2)}, r"causal: want 0\.\.1; got 2"),
    "trees_without_lens": ({"sequences": (*S[:5], 0)}, "tree_lens: want 1 elements; got 0"),
    "trees_without_bits": ({"sequences": (*S[:2], span("", ints(0)), *S[3:5], 0)}, "mask_bits: want bits for requests"),
    "bits_short": (
        {"sequences": (*S[:2], span("", SEQLENS), *S[3:5], 0), "mask": (span("", ENDS), 1)},
        "mask_bits: want 3 elements; got 2",
    ),
    "bits_wide": ({"mask": (NONE, 33)}, "mask_bits: want at most 32 words"),
    "picked_null": ({"picked": (0, 3)}, "picked: want 3 elements"),
    "picked_negative": ({"picked": (A[0], -1)}, "picked: want sizes"),
    "cos_null": ({"angles": ((0, 16), span("", COS), 1)}, "cos: want 16 elements"),
    "cos_negative": ({"angles": ((A[0], -1), (A[0], -1), 1)}, "cos: want sizes"),
    "cos_width": ({"angles": (span("", COS), span("", COS), 2)}, "cos: want 1 columns; got 2"),
    "cos_no_width": ({"angles": (NONE, NONE, 0)}, "cos: want a width"),
    "sin_short": ({"angles": (span("", COS), (A[0], 15), 1)}, "sin: want 16 elements; got 15"),
    "no_inputs": ({"inputs": []}, "inputs: want one of 8 columns at 0; got -1"),
    "input_width": ({"inputs": [((A[0], 21), 3, 7)]}, "inputs: want one of 8 columns at 0; got 7"),
    "input_rows": ({"inputs": [((A[0], 16), 2, 8)]}, "inputs: want 3 rows; got 2"),
    "input_null": ({"inputs": [((0, 24), 3, 8)]}, "inputs: want 24 elements"),
    "no_outputs": ({"outputs": []}, "outputs: want one of 8 columns at 0; got -1"),
    "output_short": ({"outputs": [((A[0], 16), 2, 8)]}, "outputs: want 3 rows; got 2"),
    "output_wraps": ({"outputs": [(NONE, 3, 2**62)]}, "outputs: want sizes below"),
    "threads_none": ({"threads": 0}, r"threads: want 1\.\.4096; got 0"),
    "threads_many": ({"threads": 2**30}, r"threads: want 1\.\.4096"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_at_the_border_is_refused(case: str) -> None:
    changes, message = RUNS[case]
    program = native()
    program.load(X, 0)
    program.store(0, X)
    program.run(*arguments())
    with pytest.raises(ValueError, match=f"decoder_pass: {message}"):
        program.run(*arguments(**changes))


def test_instructions_added_while_another_thread_runs() -> None:
    """The list of instructions may grow between passes only; a pass that is under way keeps what it began with."""
    program = native()
    program.load(X, 0)
    program.store(0, X)
    worker = threading.Thread(target=lambda: [program.run(*arguments()) for _ in range(300)])
    worker.start()
    for _ in range(300):
        program.add(X, X)
    worker.join()
    IN.fill_(1.0)
    program.run(*arguments())
    assert torch.equal(OUT, IN)
