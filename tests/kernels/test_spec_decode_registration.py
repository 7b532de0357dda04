"""The ops of drafting, trees, attention, verification and commit as torch sees them: opcheck, fakes, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from m3kernels.spec_decode import draft_topk, tree_attention, tree_budget, tree_commit, tree_finalize, tree_verify
from m3kernels.spec_decode.reference import make_inputs
from m3kernels.testing import bitwise_equal
from tests.kernels.spec_decode_batches import each_room, each_room_and_triton

V, N, K = 24, 5, 2
X = make_inputs(2, N, V)
LINKS = (X["candidates"], X["next_token"], X["next_sibling"])
SEED, POSITION = torch.tensor([3, -4]), torch.tensor([9, 2**33])
TEMPERATURE, COINS = torch.tensor([0.8, 0.0]), torch.full((2, N), 0.4, dtype=torch.float64)
TOP_K, TOP_P, MIN_P = torch.tensor([9, 0], dtype=torch.int32), torch.tensor([0.9, 1.0]), torch.tensor([0.0, 0.01])
GRAMMAR = torch.full((2, N, 1), -1, dtype=torch.int32)
CACHE = torch.linspace(-1, 1, 6 * 4 * 2 * 8).view(6, 4, 2, 8)
TABLE = torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=torch.int32)
SEQLENS, CU = torch.tensor([9, 7], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
MASK = torch.tensor([[1], [3], [1], [3], [5]], dtype=torch.int32)
Q = torch.linspace(-1, 1, 5 * 4 * 8).view(5, 4, 8)
SPREAD = Q.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:3]
PATH = torch.tensor([[0, 2, 4], [0, -1, -1]], dtype=torch.int32)
LENGTHS = torch.tensor([2, 0], dtype=torch.int32)
SCORES = torch.tensor([[-0.1, -2.0, -1.0, -0.3, -2.5, -2.6]] * 2)
TOKENS, PARENT_LIST = torch.arange(12).view(2, 6), torch.tensor([[-1, 0, 1]] * 2)


def caches() -> list[Tensor]:
    return [CACHE.clone(), CACHE + 1]


# -- opcheck ----------------------------------------------------------------------------------------------------------
def op_calls() -> dict[str, tuple[Any, ...]]:
    """Flat arguments of the registered ops, by a name that begins with the op's."""
    verify = (X["logits"], *LINKS, TEMPERATURE)
    return {
        "draft_topk": (X["logits"][:, :K], SCORES[:, :K].contiguous(), torch.arange(V), SEED, POSITION, K, 1),
        "draft_topk first": (X["logits"][:, :1].half(), SCORES[:, :1].contiguous(), None, None, None, 3, 0),
        "tree_finalize": (SCORES, TOKENS, PARENT_LIST, SEED, POSITION, LENGTHS + 3, K, N),
        "tree_finalize one": (SCORES, TOKENS, PARENT_LIST, SEED, POSITION, None, K, 1),
        "tree_attention": (Q, CACHE, -CACHE, TABLE, SEQLENS, CU, MASK, Q[..., 0].contiguous(), 0.3, 6),
        "tree_attention causal": (Q.half(), CACHE, -CACHE, TABLE, SEQLENS, CU, None, Q, 0.3, 0),
        "tree_attention strided": (SPREAD, CACHE, -CACHE, TABLE, SEQLENS, CU, None, None, 0.3, 0),
        "tree_verify coupled": (
            *verify, TOP_K, TOP_P, MIN_P, SEED, POSITION, None, None, None, GRAMMAR, "coupled", N, "sampling",
        ),
        "tree_verify target": (
            *verify, None, None, None, None, None, COINS, COINS[:, 0].contiguous(), None, None, "target_only", 3, "raw",
        ),
        "tree_verify chain": (
            *verify, None, TOP_P, None, SEED, POSITION, None, None, X["logits"].softmax(-1), None, "chain", N, "none",
        ),
        "tree_verify greedy": (*verify, *[None] * 9, "greedy", 2, "raw"),
        "tree_commit": (PATH, LENGTHS, caches(), caches(), TABLE, SEQLENS - 4, Q[:4].view(2, 8, 8)),
        "tree_commit hidden": (PATH, LENGTHS, [], [], TABLE, SEQLENS, Q[:4].view(2, 8, 8).half()),
        "tree_commit caches": (PATH, LENGTHS, caches(), caches(), TABLE, SEQLENS - 4, None),
        "tree_budget": (SCORES, torch.linspace(1, 2, 12), 8, 2, 0.1),
    }  # fmt: skip


def op_of(call: str) -> Any:
    return getattr(torch.ops.m3kernels, call.partition(" ")[0]).default


@each_room_and_triton
@pytest.mark.parametrize("call", [call for call in op_calls() if call != "tree_budget"])
def test_opcheck(backend: str, call: str) -> None:
    torch.library.opcheck(op_of(call), op_calls()[call])


@pytest.mark.parametrize("backend", ("spec_decode=reference",), indirect=True)
def test_opcheck_of_the_budget(backend: str) -> None:
    torch.library.opcheck(torch.ops.m3kernels.tree_budget.default, op_calls()["tree_budget"])


# -- fakes ------------------------------------------------------------------------------------------------------------
IDS, STATES = torch.arange(V), Q[:4].view(2, 8, 8)
PUBLIC: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "draft": (draft_topk, dict(logits=X["logits"][:, :K], scores=SCORES[:, :K], k=K, step=3, seed=SEED, position=SEED)),
    "draft_first": (draft_topk, dict(logits=X["logits"][:, :1].bfloat16(), scores=SCORES[:, :1], k=7, step=0, d2t=IDS)),
    "finalize": (
        tree_finalize,
        dict(scores=SCORES, tokens=TOKENS, parent_list=PARENT_LIST, bonus=SEED, seq_lens=POSITION, topk=K, num_nodes=N,
             budget=SEED),
    ),
    "finalize_wide": (
        tree_finalize,
        dict(scores=SCORES, tokens=TOKENS, parent_list=PARENT_LIST, bonus=SEED.int(), seq_lens=SEQLENS, topk=K,
             num_nodes=65),
    ),
    "attention": (
        tree_attention,
        dict(q=Q, k_cache=CACHE, v_cache=CACHE, block_table=TABLE, cache_seqlens=SEQLENS, cu_seqlens_q=CU, gate=Q,
             mask_bits=MASK, window=3),
    ),
    "attention_batched": (
        tree_attention,
        dict(q=Q[:4].view(2, 4, 2, 8).transpose(1, 2).half(), k_cache=CACHE, v_cache=CACHE, block_table=TABLE.long(),
             cache_seqlens=SEQLENS.long()),
    ),
    "attention_empty": (
        tree_attention,
        dict(q=Q[:0], k_cache=CACHE, v_cache=CACHE, block_table=TABLE, cache_seqlens=SEQLENS, cu_seqlens_q=CU * 0),
    ),
    "verify": (
        tree_verify,
        dict(logits=X["logits"], candidates=LINKS[0], next_token=LINKS[1], next_sibling=LINKS[2], seed=SEED,
             position=POSITION, temperature=TEMPERATURE, logprobs="raw", top_k=TOP_K, top_p=TOP_P, min_p=MIN_P,
             grammar_bits=GRAMMAR),
    ),
    "verify_coins": (
        tree_verify,
        dict(logits=X["logits"].half(), candidates=LINKS[0], next_token=LINKS[1], next_sibling=LINKS[2], width=3,
             mode="target_only", coins=COINS.float(), final_coins=COINS[:, 0]),
    ),
    "commit": (
        tree_commit,
        dict(accept_index=PATH, accept_length=LENGTHS, k_caches=caches(), v_caches=caches(), block_table=TABLE,
             cache_seqlens=SEQLENS - 4, hidden=STATES),
    ),
    "commit_alone": (
        tree_commit,
        dict(accept_index=PATH, accept_length=LENGTHS, k_caches=[], v_caches=[], block_table=TABLE,
             cache_seqlens=SEQLENS),
    ),
    "budget": (tree_budget, dict(scores=SCORES, cost_table=torch.ones(9, dtype=torch.float64))),
}  # fmt: skip


def moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return [moved(x, move) for x in value]
    return move(value) if isinstance(value, Tensor) else value


def kinds(found: Any) -> list[Any]:
    """Shape, strides and dtype of each tensor."""
    tensors = (found,) if isinstance(found, Tensor) else found
    return [None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in tensors]


@pytest.mark.parametrize("name", PUBLIC)
def test_fake_tensors_go_in_and_come_out(name: str) -> None:
    function, arguments = PUBLIC[name]
    mode = FakeTensorMode()
    fakes = {key: moved(value, mode.from_tensor) for key, value in arguments.items()}
    with mode:
        found = function(**fakes)
    assert kinds(found) == kinds(function(**arguments))


@pytest.mark.parametrize("call", op_calls())
def test_ops_on_the_meta_device_give_what_the_rooms_give(call: str) -> None:
    op, arguments = op_of(call), op_calls()[call]
    found, real = op(*moved(arguments, lambda x: x.to("meta"))), op(*arguments)
    assert kinds(found) == kinds(real)
    assert all(x.is_meta for x in ((found,) if isinstance(found, Tensor) else found))


# -- compiling --------------------------------------------------------------------------------------------------------
def speculate(logits: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, ...]:
    """One draft step, its tree, the attention of its nodes, a verification and a commit."""
    requests, nodes = len(logits), 1 + K
    first = draft_topk(logits[:, :1], logits.new_zeros(requests, 1), k=K, step=0, seed=SEED, position=POSITION)
    scores, tokens = first.cum_scores.flatten(1), first.tokens.flatten(1)
    parents = torch.full((requests, 1), -1)
    tree = tree_finalize(scores, tokens, parents, SEED, SEQLENS, topk=K, num_nodes=nodes)
    out = tree_attention(q, k_cache, v_cache, TABLE, SEQLENS, mask_bits=tree.mask_bits, gate=torch.ones_like(q[..., 0]))
    rows = logits[:, :nodes] + out.flatten(2)[..., :V]
    found = tree_verify(
        rows, tree.candidates, tree.next_token, tree.next_sibling, seed=SEED, position=POSITION, logprobs="sampling"
    )
    prefix = SEQLENS - nodes
    done = tree_commit(found.accept_index, found.accept_length, [k_cache], [v_cache], TABLE, prefix, rows)
    return *found, found.bonus_token, done.cache_seqlens, done.hidden, k_cache.clone(), v_cache.clone()


def arguments_of_speculate() -> tuple[Tensor, ...]:
    q = torch.linspace(-1, 1, 2 * 3 * 4 * 8).view(2, 3, 4, 8)
    return X["logits"], q, CACHE.clone(), CACHE + 1


GRAPHS = [("spec_decode=cpu", graph, dynamic) for graph in ("eager", "aot_eager") for dynamic in (False, True)]
GRAPHS += [("spec_decode=reference", "aot_eager", True)]


@pytest.mark.parametrize(("backend", "graph", "dynamic"), GRAPHS, indirect=["backend"])
def test_compiles_whole(backend: str, graph: str, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(speculate, fullgraph=True, backend=graph, dynamic=dynamic)
    found, expected = compiled(*arguments_of_speculate()), speculate(*arguments_of_speculate())
    assert all(bitwise_equal(x, y) for x, y in zip(found, expected, strict=True))


def test_errors_are_the_same_while_compiling() -> None:
    compiled = torch.compile(speculate, fullgraph=True, backend="eager")
    logits, *rest = arguments_of_speculate()
    with pytest.raises(Exception, match="draft_topk: logits: want"):
        compiled(logits.double(), *rest)


# -- modes ------------------------------------------------------------------------------------------------------------
MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@each_room
@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_the_gradient_mode(backend: str, mode: str) -> None:
    expected = speculate(*arguments_of_speculate())
    with MODES[mode]():
        found = speculate(*arguments_of_speculate())
    assert not any(x.requires_grad for x in found)
    assert all(bitwise_equal(x, y) for x, y in zip(found, expected, strict=True))


@each_room
def test_without_gradients_parameters_are_taken(backend: str) -> None:
    logits, q, k_cache, v_cache = (x.requires_grad_() for x in map(torch.clone, arguments_of_speculate()))
    with torch.no_grad():
        found = speculate(logits, q, k_cache, v_cache)
    expected = speculate(*arguments_of_speculate())
    assert all(bitwise_equal(x, y) for x, y in zip(found, expected, strict=True))


@each_room
def test_the_op_gives_what_the_function_gives(backend: str) -> None:
    op = torch.ops.m3kernels.tree_verify.default
    found = op(X["logits"], *LINKS, TEMPERATURE, *[None] * 9, "greedy", N, "raw")
    assert all(map(bitwise_equal, found, tree_verify(X["logits"], *LINKS, mode="greedy", logprobs="raw")))
