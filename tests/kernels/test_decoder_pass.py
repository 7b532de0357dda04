"""The native pass over small decoders against the same program in fp64, and what a program keeps between passes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from decoder_pass_cases import (
    HISTORY,
    POSITIONS,
    TREE,
    VOCABULARY,
    Chunk,
    Paging,
    Shape,
    decoder,
    make_batch,
    play,
    run_pass,
    words,
)
from torch import Tensor

from m3kernels.decoder.program import Batch, Program
from m3kernels.decoder.run_cpu import NativePass
from m3kernels.decoder.run_torch import TorchPass
from m3kernels.testing import bitwise_equal, check_error, uninitialized_is_nan

# Against fp64, as m3kernels.testing has it: torch in fp32 adds in other orders.
TOLERANCE = {"c": 2.0, "eps": 1e-6}
# Relative error of rounded activations, of all products together: 5e-5 and 8e-3 each.
ROUNDED = {"int16": 2e-4, "int8": 3e-2}
# Of caches: a value between two numbers that the cache can hold may become either, one unit apart.
CACHED = {torch.float32: 0.0, torch.bfloat16: 5e-5, torch.float16: 1e-5, torch.int8: 1e-4}

SHAPES: dict[str, tuple[Shape, float]] = {
    "fp32": (Shape(), 0.0),
    "bf16": (Shape(weights="bf16", table=torch.bfloat16), 0.0),
    "fp16": (Shape(weights="fp16", table=torch.float16), 0.0),
    "one_layer": (Shape(layers=1), 0.0),
    "odd_sizes": (Shape(hidden=70, size=18, rotated=6, inner=37, heads=3, kv_heads=1), 0.0),
    "bias": (Shape(bias=True), 0.0),
    "every_head_its_own_keys": (Shape(kv_heads=4), 0.0),
    "one_head": (Shape(heads=1, kv_heads=1, size=64, rotated=64), 0.0),
    "head_norms": (Shape(norms=True), 0.0),
    "half_rotated": (Shape(norms=True, rotated=8), 0.0),
    "gate_of_heads": (Shape(gate="head"), 0.0),
    "gate_of_elements": (Shape(gate="element", norms=True), 0.0),
    "gate_in_int4": (Shape(gate="element", weights="int4", activations="exact", bias=True), 0.0),
    "int4_exact": (Shape(weights="int4", activations="exact"), 0.0),
    "int4_int16": (Shape(weights="int4", activations="int16"), ROUNDED["int16"]),
    "int4_int8": (Shape(weights="int4", activations="int8"), ROUNDED["int8"]),
    "int4_auto": (Shape(weights="int4"), ROUNDED["int16"]),
    "int4_bias": (Shape(weights="int4", bias=True), ROUNDED["int16"]),
    "int4_asymmetric": (Shape(weights="int4", symmetric=False, activations="exact"), 0.0),
    "int4_whole_rows": (Shape(weights="int4", group_size=-1), ROUNDED["int16"]),
    "int4_partial_groups": (Shape(weights="int4", group_size=48, symmetric=False), ROUNDED["int16"]),
    "int4_odd_sizes": (Shape(weights="int4", hidden=70, size=18, rotated=18, inner=37), ROUNDED["int16"]),
    "experts": (Shape(experts=6), 0.0),
    "experts_bf16": (Shape(experts=6, weights="bf16"), 0.0),
    "experts_fp16": (Shape(experts=5, top_k=5, weights="fp16"), 0.0),
    "experts_not_rescaled": (Shape(experts=6, top_k=3, rescale=False), 0.0),
    "experts_one_of_many": (Shape(experts=17, top_k=1, inner=33), 0.0),
    "experts_int4_exact": (Shape(experts=6, weights="int4", activations="exact"), 0.0),
    "experts_int4": (Shape(experts=6, weights="int4", rescale=False), ROUNDED["int16"]),
    "cache_bf16": (Shape(kv=torch.bfloat16), CACHED[torch.bfloat16]),
    "cache_fp16": (Shape(kv=torch.float16, norms=True), CACHED[torch.float16]),
    "cache_int8": (Shape(kv=torch.int8), CACHED[torch.int8]),
    "cache_int8_gate": (Shape(kv=torch.int8, gate="head", weights="int4", activations="exact"), CACHED[torch.int8]),
}


# -- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("output", (0, 1), ids=("logits", "hidden"))
@pytest.mark.parametrize("case", SHAPES)
def test_values(case: str, output: int) -> None:
    """Prefill, decode, trees whole and step by step, together and alone."""
    shape, extra = SHAPES[case]
    ours, exact, theirs = (decoder(shape) for _ in range(3))
    with uninitialized_is_nan():
        found = play(ours)[output]
    in_torch = play(theirs, TorchPass(theirs))[output]
    check_error(found, play(exact, TorchPass(exact, torch.float64))[output], in_torch, TOLERANCE, extra)


@pytest.mark.parametrize("kv", CACHED, ids=str)
def test_caches_hold_what_the_program_says(kv: torch.dtype) -> None:
    """Every written key and value within one unit of fp64's; every other slot as it was."""
    shape = Shape(kv=kv, norms=True, rotated=8, layers=1)
    ours, exact = decoder(shape), decoder(shape)
    play(ours)
    play(exact, TorchPass(exact, torch.float64))
    mine, theirs = ours.caches[0], exact.caches[0]
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.int8: 1.0}[kv]
    written = torch.zeros(160, dtype=torch.bool)
    written[torch.cat([make_batch(chunks, Paging()).slots for chunks in HISTORY])] = True
    for got, want in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
        got, want = got.flatten(0, 1), want.flatten(0, 1)
        least = unit if kv == torch.int8 else unit * want[written].double().abs() + 1e-6
        assert ((got[written].double() - want[written].double()).abs() <= least).all()
        assert bitwise_equal(got[~written], want[~written])
    for got, want in ((mine.k_scale, theirs.k_scale), (mine.v_scale, theirs.v_scale)):
        assert (got is None) == (kv != torch.int8)
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)


def test_a_long_context() -> None:
    """Several chunks of keys, a tree of two words behind them, queries that are fewer than its nodes."""
    shape = Shape(weights="bf16", gate="head")
    paging = Paging(page_size=16, requests=1)
    parents = (-1, *(node // 2 for node in range(39)))
    history = [Chunk(0, 0, words(0, 400)), Chunk(0, 400, words(1, 40), parents)]
    history.append(Chunk(0, 400, words(1, 40), parents, (0, 7, 31, 32, 39)))
    ours, exact, theirs = (decoder(shape, page_size=16) for _ in range(3))
    runners: list[tuple[Program, Any]] = [(ours, None), (exact, TorchPass(exact, torch.float64))]
    runners.append((theirs, TorchPass(theirs)))
    found, in_fp64, in_fp32 = (
        torch.cat([run_pass(program, [chunk], paging, runner)[0] for chunk in history]) for program, runner in runners
    )
    check_error(found, in_fp64, in_fp32, TOLERANCE)


@pytest.mark.parametrize("backend", ["decoder=reference"], indirect=True)
@pytest.mark.parametrize("case", ("fp32", "experts_int4_exact", "cache_int8_gate"))
def test_reference_room(backend: str, case: str) -> None:
    shape, extra = SHAPES[case]
    ours, exact, theirs = (decoder(shape) for _ in range(3))
    found = play(ours)
    assert isinstance(ours.runner, TorchPass)
    in_torch = play(theirs, NativePass(theirs))
    check_error(found[0], play(exact, TorchPass(exact, torch.float64))[0], in_torch[0], TOLERANCE, extra)


# -- what a pass gives ------------------------------------------------------------------------------------------------
def chunks() -> list[Chunk]:
    return [Chunk(0, 0, words(0, 9)), Chunk(1, 0, words(1, 4)), Chunk(2, 0, words(2, 5), (-1, 0, 0, 1, 2))]


@pytest.mark.parametrize("picked", ((), (17,), (3, 0, 3, 12, 17), (5, 4)), ids=str)
def test_picked_rows_are_the_rows(picked: tuple[int, ...]) -> None:
    program = decoder(Shape(experts=5, weights="int4"))
    whole, hidden = run_pass(program, chunks())
    logits, again = program.run(make_batch(chunks(), Paging(), picked))
    assert bitwise_equal(logits, whole[list(picked)])
    assert bitwise_equal(again, hidden)


@pytest.mark.parametrize("kind", (NativePass, TorchPass))
def test_no_rows(kind: type[NativePass] | type[TorchPass]) -> None:
    program = decoder(Shape(experts=3))
    runner = kind(program)
    run_pass(program, chunks(), runner=runner)
    logits, hidden = run_pass(program, [], runner=runner)
    assert logits.shape == (0, VOCABULARY) and hidden.shape == (0, 64)
    assert runner.experts_touched()[0] == 0


def test_requests_without_rows_change_nothing() -> None:
    program = decoder(Shape())
    batch = make_batch(chunks()[:2], Paging())
    want = program.run(batch)
    batch.cu_seqlens = torch.tensor([0, 9, 9, 13], dtype=torch.int32)
    batch.cache_seqlens = torch.tensor([9, 0, 4], dtype=torch.int32)
    batch.block_table = batch.block_table[[0, 0, 1]].contiguous()
    batch.causal = 3
    assert all(map(bitwise_equal, program.run(batch), want))


def test_outputs_are_new_tensors() -> None:
    program = decoder(Shape())
    first = run_pass(program, chunks())
    kept = [output.clone() for output in first]
    run_pass(program, [Chunk(0, 9, words(3, 20))])
    assert all(map(bitwise_equal, first, kept))


def test_inference_mode() -> None:
    program = decoder(Shape(weights="int4"))
    want = run_pass(program, chunks())
    with torch.inference_mode():
        again = run_pass(program, chunks())
        fresh = run_pass(decoder(Shape(weights="int4")), chunks())
    assert all(map(bitwise_equal, again, want)) and all(map(bitwise_equal, fresh, want))


@pytest.mark.parametrize(("experts", "top_k"), ((4, 1), (4, 4)))
def test_experts_touched(experts: int, top_k: int) -> None:
    program, torch_pass = (decoder(Shape(experts=experts, top_k=top_k)) for _ in range(2))
    runner = TorchPass(torch_pass)
    run_pass(program, [Chunk(0, 0, words(0, 3))])
    run_pass(torch_pass, [Chunk(0, 0, words(0, 3))], runner=runner)
    distinct, layers = program.experts_touched()
    assert (distinct, layers) == runner.experts_touched()
    assert layers == 2 and top_k * 2 <= distinct <= experts * 2


def test_profile_names_every_instruction() -> None:
    program = decoder(Shape(experts=4))
    assert set(program.profile(True).values()) == {0.0}
    run_pass(program, chunks())
    seconds = program.profile(False)
    assert {name for name, spent in seconds.items() if spent > 0} >= {
        "embed",
        "norm",
        "dense",
        "rotate",
        "attend",
        "moe",
    }
    assert seconds["int4"] == 0.0
    run_pass(program, chunks())
    assert set(program.profile(False).values()) == {0.0}


# -- what a program keeps ---------------------------------------------------------------------------------------------
def product(weight: Tensor) -> tuple[Program, Batch]:
    """A program that multiplies its input with the weight, and a batch of three rows."""
    program = Program(rotated=2)
    program.angles(torch.ones(1, 1), torch.zeros(1, 1))
    to, source = program.buffer(len(weight)), program.buffer(weight.shape[1])
    program.load(source)
    program.linear(to, source, weight)
    program.store(to)
    zeros = torch.zeros(3, dtype=torch.int64)
    ends, table = torch.tensor([0, 3], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    return program, Batch(tokens=zeros, positions=zeros, slots=zeros, cu_seqlens=ends, cache_seqlens=ends[1:].clone(),
                          block_table=table, picked=zeros[:0], causal=1)  # fmt: skip


def test_weights_may_change_in_place() -> None:
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    program, batch = product(weight)
    before = program.run(batch, (x,))[0]
    weight.mul_(2.0)
    assert torch.equal(program.run(batch, (x,))[0], before * 2.0)


def test_memory_stays_though_the_tensor_goes_elsewhere() -> None:
    weight, x = torch.randn(50, 70), torch.randn(3, 70)
    program, batch = product(weight)
    before = program.run(batch, (x,))[0]
    weight.data = torch.zeros(0)
    torch.full((50, 70), torch.nan)  # takes the memory, had it been freed
    assert bitwise_equal(program.run(batch, (x,))[0], before)


def test_angles_may_be_set_again() -> None:
    program, twice = decoder(Shape()), decoder(Shape())
    run_pass(program, [Chunk(0, 0, words(0, 9))])
    for each in (program, twice):
        each.angles(torch.ones(POSITIONS, 8), torch.zeros(POSITIONS, 8))
    assert all(map(bitwise_equal, run_pass(program, chunks()), run_pass(twice, chunks())))


def test_instructions_may_be_added_after_a_pass() -> None:
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    program, batch = product(weight)
    y = program.run(batch, (x,))[0]
    to = program.buffer(5)
    program.copy(to, program.outputs[0])
    program.add(to, program.outputs[0])
    program.store(to)
    assert torch.equal(program.run(batch, (x,))[1], y + y)


def test_passes_of_two_threads_do_not_mix() -> None:
    program = decoder(Shape(weights="int4"))
    tree = [Chunk(2, 0, words(2, 7), TREE)]
    want = [run_pass(program, chunks()[:1]), run_pass(program, tree)]
    wrong: list[int] = []

    def repeat(which: int) -> None:
        for _ in range(50):
            found = run_pass(program, tree if which else chunks()[:1])
            wrong.extend(
                which for got, expected in zip(found, want[which], strict=True) if not bitwise_equal(got, expected)
            )

    workers = [threading.Thread(target=repeat, args=(which,)) for which in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
