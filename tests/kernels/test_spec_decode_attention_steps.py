"""tree_attention with tree_lens: some nodes of a tree as queries give, bit for bit, what all of them together give."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import tree_attention
from m3kernels.spec_decode.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan
from tests.kernels.spec_decode_attention_cases import Paged, Request, dense, make_request
from tests.kernels.spec_decode_batches import IN_TRITON, SLOWLY_IN_TRITON

each_room = pytest.mark.parametrize("backend", ("reference", "cpu", IN_TRITON), indirect=True)
each_kernel = pytest.mark.parametrize("backend", ("cpu", IN_TRITON), indirect=True)
slowly_each_kernel = pytest.mark.parametrize("backend", ("cpu", SLOWLY_IN_TRITON), indirect=True)
plain_rooms = pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)

# (prefix, nodes) of each tree, and what makes the case.
CASES: dict[str, dict[str, Any]] = {
    "one_node": dict(lengths=[(0, 1)], size=1, heads=(1, 1), page_size=1),
    "small": dict(lengths=[(5, 6), (0, 9)], size=16, page_size=4, gate="head"),
    "window": dict(lengths=[(20, 7), (3, 7)], size=16, page_size=5, window=6),
}
LARGE: dict[str, dict[str, Any]] = {
    "edges_of_chunks": dict(lengths=[(63, 9), (64, 40), (127, 4), (0, 70)], heads=(6, 2), size=64, page_size=16),
    "splits": dict(lengths=[(505, 30), (1030, 8)], heads=(9, 3), size=64, gate="element"),
    "many_nodes": dict(lengths=[(33, 300)], heads=(4, 2), size=20, page_size=7, window=90),
}
rooms_and_cases = pytest.mark.parametrize(
    ("backend", "case"),
    [(room, case) for room in ("reference", "cpu") for case in (*CASES, *LARGE)]
    + [pytest.param("spec_decode=triton", case, marks=IN_TRITON.marks) for case in CASES],
    indirect=["backend"],
)


def trees_of(case: str) -> tuple[list[Request], Paged, dict[str, Any]]:
    options = dict({**CASES, **LARGE}[case])
    lengths, window = options.pop("lengths"), options.pop("window", 0)
    page_size = options.pop("page_size", 16)
    trees = [make_request(*length, tree=True, **options, seed=i) for i, length in enumerate(lengths)]
    return trees, Paged.of(trees, page_size=page_size), {"window": window}


def some(paged: Paged, nodes: list[list[int]]) -> dict[str, Any]:
    """The call with only these nodes of each tree as queries, in this order."""
    rows = torch.tensor([start + node for start, own in zip(paged.offsets, nodes, strict=False) for node in own]).long()
    cu = torch.tensor([0, *map(len, nodes)]).cumsum(0).int()
    trees = torch.tensor(paged.offsets).diff().int()
    rest = {name: paged.call[name][rows] for name in ("q", "mask_bits", "gate") if name in paged.call}
    return {**paged.call, **rest, "cu_seqlens_q": cu, "tree_lens": trees}


def drawn_nodes(trees: list[Request], seed: int) -> list[list[int]]:
    """A few nodes of each tree, of one none."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, tree in enumerate(trees):
        count = int(torch.randint(1, len(tree.q) + 1, (1,), generator=generator))
        order = torch.randperm(len(tree.q), generator=generator)[: min(count, 12)].tolist()
        found.append([] if i and i == seed % len(trees) else order)
    return found


# -- values and bits --------------------------------------------------------------------------------------------------
@rooms_and_cases
def test_some_nodes_give_the_rows_of_all(backend: str, case: str) -> None:
    trees, paged, options = trees_of(case)
    together = paged.run(**options)
    for_all = some(paged, [list(range(len(tree.q))) for tree in trees])
    assert bitwise_equal(tree_attention(**for_all, **options), torch.cat(together))
    nodes = drawn_nodes(trees, 1)
    rows = tree_attention(**some(paged, nodes), **options)
    expected = torch.cat([own[picked] for own, picked in zip(together, nodes, strict=True)])
    assert bitwise_equal(rows, expected)
    exact = torch.cat([dense(tree, torch.float64, **options)[own] for tree, own in zip(trees, nodes, strict=True)])
    theirs = torch.cat([dense(tree, torch.float32, **options)[own] for tree, own in zip(trees, nodes, strict=True)])
    check_error(rows, exact, theirs, TOLERANCE)


@each_kernel
def test_more_queries_than_keys_of_the_tree(backend: str) -> None:
    _, paged, _ = trees_of("small")
    rows = torch.cat(paged.run())
    twice = tree_attention(**some(paged, [[0, 1, 1, 5, 4, 3, 2, 0, 5], [8, 0]]))
    assert bitwise_equal(twice, rows[[0, 1, 1, 5, 4, 3, 2, 0, 5, 14, 6]])


@each_kernel
def test_drafting_step_by_step_is_one_call(backend: str) -> None:
    """A step's nodes follow the earlier ones in the cache; what is not written yet is nan, and the tree grows."""
    trees, paged, _ = trees_of("small")
    together = paged.run()
    found = [[], []]
    for low, high in ((0, 1), (1, 3), (3, 6)):
        shorter = [Request(q=t.q[:high], keys=t.keys[: t.prefix + high], values=t.values[: t.prefix + high],
                           parents=t.parents[:high], gate=t.gate[:high]) for t in trees]  # fmt: skip
        step = tree_attention(**some(Paged.of(shorter, page_size=4, seed=high), [list(range(low, high))] * 2))
        for own, rows in zip(found, step.split(high - low), strict=True):
            own.append(rows)
    for own, rows in zip(found, together, strict=True):
        assert bitwise_equal(torch.cat(own), rows[:6])


@each_room
def test_a_tree_of_no_keys_leaves_the_prefix(backend: str) -> None:
    """tree_lens 0: rows attend to all keys of the cache, whatever their bits."""
    request = make_request(7, 0, size=16)
    paged = Paged.of([request], page_size=4, mask=False)
    q = torch.randn(3, 4, 16)
    call = {**paged.call, "q": q, "cu_seqlens_q": torch.tensor([0, 3]), "tree_lens": torch.tensor([0])}
    rows = tree_attention(**call, mask_bits=torch.full((3, 1), -1, dtype=torch.int32))
    last = make_request(6, 1, size=16)
    for i in range(3):
        alone = Request(q=q[i : i + 1], keys=request.keys, values=request.values)
        assert torch.allclose(rows[i : i + 1].double(), dense(alone, torch.float64), atol=1e-6)
    assert rows.shape == (3, *last.q.shape[1:])


@plain_rooms
def test_batched_queries_take_tree_lens(backend: str) -> None:
    trees = [make_request(11, 6, tree=True, gate="head", seed=seed) for seed in range(3)]
    paged = Paged.of(trees)
    flat = some(paged, [[5, 2]] * 3)
    shaped = {name: flat[name].unflatten(0, (3, 2)) for name in ("q", "mask_bits", "gate")}
    rows = tree_attention(**{**flat, **shaped, "cu_seqlens_q": None, "tree_lens": flat["tree_lens"].long()})
    assert bitwise_equal(rows.flatten(0, 1), tree_attention(**flat))


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_rows_do_not_depend_on_threads(backend: str, threads: int) -> None:
    trees, paged, options = trees_of("splits")
    call = some(paged, drawn_nodes(trees, 2))
    alone = tree_attention(**call, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    together = tree_attention(**call, **options)
    torch.set_num_threads(before)
    assert bitwise_equal(together, alone)


# -- hostile memory ---------------------------------------------------------------------------------------------------
@each_kernel
def test_bits_beyond_the_tree_do_not_matter(backend: str) -> None:
    _, paged, _ = trees_of("small")
    call = some(paged, [[3, 5], [1, 8]])
    expected = tree_attention(**call)
    sizes = torch.tensor([6, 6, 9, 9])[:, None]
    beyond = -(torch.ones(4, 1, dtype=torch.int32) << sizes).int()
    call["mask_bits"] = torch.cat((call["mask_bits"][:, :1] | beyond, torch.full((4, 1), -1, dtype=torch.int32)), 1)
    assert bitwise_equal(tree_attention(**call), expected)


@slowly_each_kernel
def test_results_are_written_whole_and_nothing_beside_them(backend: str) -> None:
    _, paged, _ = trees_of("small")
    call = some(paged, [[3, 5], []])
    expected = tree_attention(**call)
    inside = {name: surrounded_by_nan(call[name]) for name in ("q", "k_cache", "v_cache", "gate")}
    with uninitialized_is_nan():
        assert bitwise_equal(tree_attention(**{**call, **inside}), expected)


# -- gates ------------------------------------------------------------------------------------------------------------
@slowly_each_kernel
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("kind", ("head", "element"))
def test_a_gate_may_be_a_part_of_a_larger_product(backend: str, kind: str, dtype: torch.dtype) -> None:
    request = make_request(9, 5, size=20, gate=kind, tree=True).to(torch.float16, torch.float16)
    call = Paged.of([request], page_size=4).call
    gate = call["gate"].to(dtype)
    expected = tree_attention(**{**call, "gate": gate})
    wide = torch.full((5, gate[0].numel() + 7), torch.nan, dtype=dtype)
    part = wide[:, 3:-4].view(gate.shape) if kind == "head" else wide[:, 3:-4].unflatten(1, gate.shape[1:])
    part.copy_(gate)
    assert not part.is_contiguous()
    assert bitwise_equal(tree_attention(**{**call, "gate": part}), expected)
    spread = torch.full((*gate.shape, 2), torch.nan, dtype=dtype)[..., 0].copy_(gate)
    assert bitwise_equal(tree_attention(**{**call, "gate": spread}), expected)


# -- errors -----------------------------------------------------------------------------------------------------------
def call_of_errors() -> dict[str, Any]:
    _, paged, _ = trees_of("small")
    return some(paged, [[3, 5], [1]])


LENS = "tree_lens: want (2,) int32 or int64; got "
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "shape": (dict(tree_lens=torch.tensor([6])), LENS + "(1,) int64"),
    "dtype": (dict(tree_lens=torch.tensor([6.0, 9.0])), LENS + "(2,) float32"),
    "number": (dict(tree_lens=6), LENS + "6"),
    "no_mask": (dict(mask_bits=None), "tree_lens: want None without mask_bits; got (2,) int32"),
    "negative": (dict(tree_lens=torch.tensor([6, -1])), "tree_lens: want values of at least 0; got [6, -1]"),
    "longer_than_the_cache": (dict(tree_lens=torch.tensor([6, 10])), "cache_seqlens: want at least tree_lens; got "),
    "more_than_the_bits": (
        dict(cache_seqlens=torch.tensor([11, 90]), block_table=torch.zeros(2, 25, dtype=torch.int32),
             tree_lens=torch.tensor([6, 65])),
        "mask_bits: want at least 65 bits a row; got (3, 2) int32",
    ),
}  # fmt: skip


@plain_rooms
@pytest.mark.parametrize("name", ERRORS)
def test_refusals(backend: str, name: str) -> None:
    change, message = ERRORS[name]
    call = call_of_errors()
    assert tree_attention(**call).isfinite().all()
    with pytest.raises(ValueError, match="^" + re.escape(f"tree_attention: {message}")):
        tree_attention(**{**call, **change})


FLAT = ("q", "k_cache", "v_cache", "block_table", "cache_seqlens", "cu_seqlens_q", "mask_bits", "gate")


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
@pytest.mark.parametrize(
    ("name", "lens"),
    [("tree_lens", [6, -1]), ("cache_seqlens", [6, 10]), ("mask_bits", [6, 65]), ("cache_seqlens", [2**31 - 1, 9])],
)
def test_the_border_checks_what_memory_rests_on(backend: str, name: str, lens: list[int]) -> None:
    """The registered op, which the public checks do not protect."""
    call = call_of_errors()
    if lens[1] == 65:
        call |= dict(cache_seqlens=torch.tensor([11, 90]).int(), block_table=torch.zeros(2, 25, dtype=torch.int32))
    flat = [call[key] for key in FLAT]
    with pytest.raises(ValueError, match=f"^tree_attention: {name}: want "):
        torch.ops.m3kernels.tree_attention.default(*flat, 0.25, 0, torch.tensor(lens, dtype=torch.int32))


def lengths_that_are_no_tensor(flat: list[Any]) -> list[Tensor]:
    """Of another size, dtype or layout."""
    lens = flat[-1]
    return [lens[:1], lens.long(), lens.repeat_interleave(2)[::2]]


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
@pytest.mark.parametrize("index", range(3), ids=("size", "dtype", "strides"))
def test_the_border_checks_the_lengths_themselves(backend: str, index: int) -> None:
    call = call_of_errors()
    flat = [*(call[key] for key in FLAT), 0.25, 0, call["tree_lens"]]
    with pytest.raises(ValueError, match=r"^tree_attention: tree_lens: want "):
        torch.ops.m3kernels.tree_attention.default(*flat[:-1], lengths_that_are_no_tensor(flat)[index])


# -- registration -----------------------------------------------------------------------------------------------------
@plain_rooms
def test_opcheck(backend: str) -> None:
    call = call_of_errors()
    flat = [*(call[key] for key in FLAT), 0.25, 0, call["tree_lens"]]
    torch.library.opcheck(torch.ops.m3kernels.tree_attention.default, tuple(flat))


@plain_rooms
def test_the_op_gives_what_the_function_gives(backend: str) -> None:
    call = call_of_errors()
    flat = [*(call[key] for key in FLAT), 0.25, 0, call["tree_lens"]]
    found = torch.ops.m3kernels.tree_attention.default(*flat)
    assert bitwise_equal(found, tree_attention(**call, softmax_scale=0.25))
