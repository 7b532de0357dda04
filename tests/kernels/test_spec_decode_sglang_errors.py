"""The drop-in set: every documented error with its message, opcheck, compilation, empty batches, threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_tiles import set_threads
from torch import Tensor

from m3kernels import spec_decode
from m3kernels.testing import bitwise_equal

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
DTYPES = "float32, bfloat16 or float16"
B, N, V, TOPK, DEPTH = 2, 5, 7, 2, 3
Arguments = dict[str, Any]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield from set_threads()


# -- calls that are good ----------------------------------------------------------------------------------------------
def links() -> Arguments:
    """Node 0 has children 1 and 2, node 1 has 3 and 4, in both requests."""
    return {
        "retrive_index": torch.arange(B * N).view(B, N),
        "retrive_next_token": torch.tensor([[1, 3, -1, -1, -1]]).repeat(B, 1),
        "retrive_next_sibling": torch.tensor([[-1, 2, -1, 4, -1]]).repeat(B, 1),
    }


def build_call() -> Arguments:
    return {
        "parent_list": torch.tensor([[-1, 0, 1, 2, 3]]).repeat(B, 1),
        "selected_index": torch.tensor([[0, 1, 2, 3], [0, 1, 4, 6]]),
        "verified_seq_len": torch.tensor([3, 0]),
        "tree_mask": torch.zeros(N * (3 + 0) + B * N * N, dtype=torch.bool),
        "positions": torch.zeros(B * N, dtype=torch.int64),
        **{name: torch.full((B, N), -1) for name in links()},
        "topk": TOPK,
        "depth": DEPTH,
        "draft_token_num": N,
        "tree_mask_mode": 0,
    }


def reconstruct_call() -> Arguments:
    return {
        "tree_mask": torch.ones(B * N * N, dtype=torch.bool),
        "verified_seq_len": torch.tensor([3, 0]),
        "positions": torch.zeros(B * N, dtype=torch.int64),
        **{name: torch.full((B, N), -1) for name in links()},
        "batch_size": B,
        "draft_token_num": N,
    }


def walk() -> Arguments:
    return {
        "predicts": torch.zeros(B * N, dtype=torch.int32),
        "accept_index": torch.full((B, 3), -1, dtype=torch.int32),
        "accept_token_num": torch.zeros(B, dtype=torch.int32),
        "candidates": torch.tensor([[0, 1, 2, 3, 4], [6, 5, 4, 3, 2]]),
        **links(),
    }


def greedy_call() -> Arguments:
    return {**walk(), "target_predict": torch.tensor([[1, 4, 0, 0, 2], [4, 1, 1, 1, 1]])}


def laws(rows: int) -> Tensor:
    return torch.randn(B, rows, V, generator=torch.Generator().manual_seed(rows)).softmax(-1)


def sample_call() -> Arguments:
    return {
        **walk(),
        "uniform_samples": torch.full((B, N), 0.25),
        "uniform_samples_for_final_sampling": torch.tensor([0.5, 0.75]),
        "target_probs": laws(N),
        "draft_probs": torch.zeros(B, N, V),
        "threshold_single": 1.0,
        "threshold_acc": 1.0,
    }


def chain_call() -> Arguments:
    return {**sample_call(), "accept_index": torch.full((B, N), -1, dtype=torch.int32), "draft_probs": laws(N - 1)}


CALLS: dict[str, Callable[[], Arguments]] = {
    "build_tree_kernel_efficient": build_call,
    "reconstruct_indices_from_tree_mask": reconstruct_call,
    "verify_tree_greedy": greedy_call,
    "tree_speculative_sampling_target_only": sample_call,
    "chain_speculative_sampling": chain_call,
}
every_op = pytest.mark.parametrize("op", CALLS)
WRITTEN = (
    *("tree_mask", "positions", "retrive_index", "retrive_next_token", "retrive_next_sibling"),
    *("predicts", "accept_index", "accept_token_num"),
)


def run(op: str, arguments: Arguments) -> list[Tensor]:
    """The buffers after a call."""
    assert getattr(spec_decode, op)(**arguments) is None
    return [value for name, value in arguments.items() if name in WRITTEN]


# -- errors of shape, dtype, range ------------------------------------------------------------------------------------
BOTH = ("build_tree_kernel_efficient", "reconstruct_indices_from_tree_mask")
WALKS = ("verify_tree_greedy", "tree_speculative_sampling_target_only", "chain_speculative_sampling")
SAMPLERS = WALKS[1:]
INT = torch.zeros(B, N, dtype=torch.int32)
LONG = INT.long()
WRONG: dict[str, tuple[tuple[str, ...], str, Any, str]] = {  # name -> ops, argument, value, what is said
    "topk": (BOTH[:1], "topk", 0, "an integer of at least 1; got 0"),
    "depth": (BOTH[:1], "depth", 1.5, "an integer of at least 1; got 1.5"),
    "no_nodes": (BOTH, "draft_token_num", 0, "an integer in 1..1024; got 0"),
    "nodes": (BOTH, "draft_token_num", 1025, "an integer in 1..1024; got 1025"),
    "mode": (BOTH[:1], "tree_mask_mode", 3, "0, 1 or 2; got 3"),
    "list_width": (BOTH[:1], "parent_list", LONG[:, :4], "(B, 5) int64; got (2, 4) int64"),
    "list_dtype": (BOTH[:1], "parent_list", INT, "(B, 5) int64; got (2, 5) int32"),
    "selected": (BOTH[:1], "selected_index", LONG, "(2, 4) int64; got (2, 5) int64"),
    "lengths": (BOTH, "verified_seq_len", LONG[0], "(2,) int64; got (5,) int64"),
    "lengths_dtype": (BOTH, "verified_seq_len", INT[:, 0], "(2,) int64; got (2,) int32"),
    "mask_stride": (BOTH, "tree_mask", torch.ones(65, 2).bool()[:, 0], "at least 50 contiguous bytes; got (65,) bool"),
    "mask_size": (BOTH, "tree_mask", torch.ones(49).bool(), "at least 50 contiguous bytes; got (49,) bool"),
    "mask_dtype": (BOTH[1:], "tree_mask", torch.ones(50).int(), "one byte an element; got (50,) int32"),
    "positions": (BOTH, "positions", LONG[0], "(10,) int64, contiguous; got (5,) int64"),
    "positions_dtype": (BOTH, "positions", INT, "(10,) int64, contiguous; got (2, 5) int32"),
    "index": (BOTH, "retrive_index", INT, "(2, 5) int64, contiguous; got (2, 5) int32"),
    "next_token": (BOTH, "retrive_next_token", LONG.T, "(2, 5) int64, contiguous; got (5, 2) int64"),
    "next_sibling": (
        BOTH,
        "retrive_next_sibling",
        LONG.T.contiguous().T,
        "(2, 5) int64, contiguous; got (2, 5) int64",
    ),
    "batch": (BOTH[1:], "batch_size", -1, "an integer of at least 0; got -1"),
    "predicts_none": (WALKS, "predicts", None, "a tensor; got None"),
    "predicts": (WALKS, "predicts", INT[0], "(10,) int32, contiguous; got (5,) int32"),
    "predicts_dtype": (WALKS, "predicts", LONG.view(-1), "(10,) int32, contiguous; got (10,) int64"),
    "path_rows": (WALKS, "accept_index", INT[:1], "(2, S) int32, contiguous, S at least 1; got (1, 5) int32"),
    "path_empty": (WALKS, "accept_index", INT[:, :0], "(2, S) int32, contiguous, S at least 1; got (2, 0) int32"),
    "path_of_chain": (WALKS[2:], "accept_index", INT[:, :3].clone(), "(2, 5) int32; got (2, 3) int32"),
    "accepted": (WALKS, "accept_token_num", INT[0], "(2,) int32, contiguous; got (5,) int32"),
    "candidates": (WALKS, "candidates", INT, "(B, N) int64 with N in 1..1024; got (2, 5) int32"),
    "no_candidates": (WALKS, "candidates", LONG[:, :0], "(B, N) int64 with N in 1..1024; got (2, 0) int64"),
    "walk_index": (WALKS, "retrive_index", LONG[:1], "(2, 5) int64; got (1, 5) int64"),
    "walk_next_token": (WALKS[:2], "retrive_next_token", INT, "(2, 5) int64; got (2, 5) int32"),
    "walk_sibling": (WALKS[:2], "retrive_next_sibling", LONG[0], "(2, 5) int64; got (5,) int64"),
    "target": (WALKS[:1], "target_predict", INT, "(2, 5) int64; got (2, 5) int32"),
    "coins": (WALKS[1:2], "uniform_samples", torch.ones(2, 4), "(2, 5) float32; got (2, 4) float32"),
    "coins_of_chain": (WALKS[2:], "uniform_samples", torch.ones(2, 3), "(2, at least 4) float32; got (2, 3) float32"),
    "coins_dtype": (WALKS[1:2], "uniform_samples", LONG.double(), "(2, 5) float32; got (2, 5) float64"),
    "final_coins": (
        SAMPLERS,
        "uniform_samples_for_final_sampling",
        torch.ones(2, 1),
        "(2,) float32; got (2, 1) float32",
    ),
    "laws": (SAMPLERS, "target_probs", laws(N)[:, 1:], f"(2, 5, V) {DTYPES} with V at least 1; got (2, 4, 7) float32"),
    "no_vocabulary": (
        SAMPLERS,
        "target_probs",
        laws(N)[..., :0],
        f"(2, 5, V) {DTYPES} with V at least 1; got (2, 5, 0) float32",
    ),
    "laws_dtype": (
        SAMPLERS,
        "target_probs",
        laws(N).double(),
        f"(2, 5, V) {DTYPES} with V at least 1; got (2, 5, 7) float64",
    ),
    "laws_gradient": (
        SAMPLERS,
        "target_probs",
        laws(N).requires_grad_(),
        "no gradient (call under torch.no_grad()); got requires_grad",
    ),
    "scratch": (WALKS[1:2], "draft_probs", laws(4), "(2, 5, 7) float32, rows contiguous; got (2, 4, 7) float32"),
    "scratch_dtype": (
        WALKS[1:2],
        "draft_probs",
        laws(N).half(),
        "(2, 5, 7) float32, rows contiguous; got (2, 5, 7) float16",
    ),
    "scratch_stride": (
        WALKS[1:2],
        "draft_probs",
        laws(N).transpose(1, 2).contiguous().transpose(1, 2),
        "(2, 5, 7) float32, rows contiguous; got (2, 5, 7) float32",
    ),
    "draft": (WALKS[2:], "draft_probs", laws(3), f"(2, at least 4, 7) {DTYPES}; got (2, 3, 7) float32"),
    "no_draft": (WALKS[2:], "draft_probs", None, f"(2, at least 4, 7) {DTYPES}; got None"),
    "single": (WALKS[1:2], "threshold_single", 1.5, "a number in [0, 1]; got 1.5"),
    "acc": (WALKS[1:2], "threshold_acc", -0.5, "a number in [0, 1]; got -0.5"),
}
WRONG_CALLS = [
    pytest.param(op, name, value, said, id=f"{case}-{op}")
    for case, (ops, name, value, said) in WRONG.items()
    for op in ops
]


@pytest.mark.parametrize(("op", "name", "value", "said"), WRONG_CALLS)
def test_wrong_argument(op: str, name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"{op}: {name}: want {said}") + "$"):
        run(op, {**CALLS[op](), name: value})


# -- errors of values: links that are no tree, tokens that are none ---------------------------------------------------
def changed(name: str, b: int, place: int, value: int) -> Callable[[Arguments], Arguments]:
    def change(call: Arguments) -> Arguments:
        call[name].view(B, -1)[b, place] = value
        return call

    return change


TREE = "a tree: -1 or a node of 1..4, each once"
TREES = WALKS[:2]
BAD_VALUES: dict[str, tuple[tuple[str, ...], str, tuple[int, int, int], str]] = {
    "child_too_large": (TREES, "retrive_next_token", (1, 0, 5), f"{TREE}; got 5 in request 1"),
    "child_negative": (TREES, "retrive_next_token", (0, 1, -2), f"{TREE}; got -2 in request 0"),
    "child_is_the_root": (TREES, "retrive_next_token", (0, 1, 0), f"{TREE}; got 0 in request 0"),
    "child_is_itself": (TREES, "retrive_next_token", (0, 1, 1), f"{TREE}; got 1 in request 0"),
    "child_of_two": (TREES, "retrive_next_token", (1, 2, 3), f"{TREE}; got 3 in request 1"),
    "sibling_too_large": (TREES, "retrive_next_sibling", (0, 2, 2**62), f"{TREE}; got {2**62} in request 0"),
    "sibling_is_itself": (TREES, "retrive_next_sibling", (0, 2, 2), f"{TREE}; got 2 in request 0"),
    "siblings_in_a_circle": (TREES, "retrive_next_sibling", (1, 4, 3), f"{TREE}; got 3 in request 1"),
    "index_too_large": (WALKS, "retrive_index", (1, 4, 10), "values in 0..9; got 10"),
    "index_negative": (WALKS, "retrive_index", (0, 0, -1), "values in 0..9; got -1"),
    "token_too_large": (SAMPLERS, "candidates", (0, 3, 7), "tokens in 0..6; got 7"),
    "token_negative": (SAMPLERS, "candidates", (1, 1, -1), "tokens in 0..6; got -1"),
    "candidate_too_large": (BOTH[:1], "selected_index", (1, 3, 10), "values in 0..9; got 10"),
    "candidate_negative": (BOTH[:1], "selected_index", (0, 0, -1), "values in 0..9; got -1"),
    "own_ancestor": (BOTH[:1], "parent_list", (0, 1, 3), "a tree; got node 3 among its own ancestors"),
    "length_negative": (BOTH[:1], "verified_seq_len", (1, 0, -1), "values of at least 0; got -1"),
    "length_beyond_the_mask": (BOTH[:1], "verified_seq_len", (1, 0, 1), "at least 70 bytes; got "),
}
BAD_CALLS = [
    pytest.param(op, name, change, said, id=f"{case}-{op}")
    for case, (ops, name, change, said) in BAD_VALUES.items()
    for op in ops
]


@every_room
@pytest.mark.parametrize(("op", "name", "change", "said"), BAD_CALLS)
def test_value_that_would_leave_the_buffers(
    backend: str, op: str, name: str, change: tuple[int, int, int], said: str
) -> None:
    arguments = changed(name, *change)(CALLS[op]())
    named = "tree_mask" if "bytes" in said else name
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match="^" + re.escape(f"{op}: {named}: want {said}")):
        run(op, arguments)
    assert all(torch.equal(arguments[key], value) for key, value in before.items()), "nothing is written"


@every_room
def test_nodes_that_no_link_reaches_are_not_looked_at(backend: str) -> None:
    arguments = sample_call()
    arguments["retrive_next_token"][:, 1] = -1
    for name in ("retrive_next_token", "retrive_next_sibling", "candidates", "retrive_index"):
        arguments[name][:, 3:] = 10**9
    run("tree_speculative_sampling_target_only", arguments)
    assert arguments["accept_token_num"].max() <= 1


# -- the registered ops -----------------------------------------------------------------------------------------------
@every_room
@every_op
def test_opcheck(backend: str, op: str) -> None:
    arguments = list(CALLS[op]().values())
    extra = {"tree_speculative_sampling_target_only": [True], "chain_speculative_sampling": [True, True]}
    torch.library.opcheck(getattr(torch.ops.m3kernels, op).default, (*arguments, *extra.get(op, [])))


@every_room
def test_opcheck_without_draft_probs(backend: str) -> None:
    arguments = {**sample_call(), "draft_probs": None}
    target_only = torch.ops.m3kernels.tree_speculative_sampling_target_only.default
    torch.library.opcheck(target_only, (*arguments.values(), True))


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
@every_op
def test_compiles_without_a_graph_break(backend: str, op: str) -> None:
    eager, compiled = CALLS[op](), CALLS[op]()
    wanted = run(op, eager)
    torch.compile(getattr(spec_decode, op), backend="aot_eager", fullgraph=True)(**compiled)
    got = [value for name, value in compiled.items() if name in WRITTEN]
    assert [bitwise_equal(a, b) for a, b in zip(got, wanted, strict=True)] == [True] * len(wanted)


# -- sizes and threads ------------------------------------------------------------------------------------------------
@every_room
@every_op
def test_no_requests(backend: str, op: str) -> None:
    good = CALLS[op]()
    arguments = {name: value[:0] if isinstance(value, Tensor) else value for name, value in good.items()}
    if "batch_size" in arguments:
        arguments["batch_size"] = 0
    assert [value.numel() for value in run(op, arguments)] == [0] * len(run(op, good))


@pytest.mark.parametrize("op", SAMPLERS)
def test_samplers_do_not_depend_on_threads(op: str, threads: Callable[[int], None]) -> None:
    """Large enough for threads to be used: more than 2^15 probabilities."""
    call, many = CALLS[op](), 64
    wide = torch.randn(B * many, N, 1000, generator=torch.Generator().manual_seed(1)).mul(3).softmax(-1)
    for name, value in call.items():
        if isinstance(value, Tensor) and name != "predicts":
            call[name] = value.repeat(many, *[1] * (value.ndim - 1))
    call["predicts"] = torch.zeros(B * many * N, dtype=torch.int32)
    call["retrive_index"] = torch.arange(B * many * N).view(B * many, N)
    call["uniform_samples"] = torch.rand(B * many, N, generator=torch.Generator().manual_seed(2))
    call["target_probs"] = wide
    call["draft_probs"] = wide.roll(1, -1)[:, : N - 1] if op == "chain_speculative_sampling" else None
    results = []
    for count in (1, 3):
        threads(count)
        results.append([value.clone() for value in run(op, call)])
    assert [bitwise_equal(a, b) for a, b in zip(*results, strict=True)] == [True] * len(results[0])
