"""tree_attention in every room: values, row-invariance bit for bit, hostile caches, gates, windows, registration.

Row-invariance: a node of a tree gives what plain decoding of its path gives, and what prefill of it gives, whatever
else is in the call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import tree_attention
from m3kernels.spec_decode.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan
from tests.kernels.spec_decode_attention_cases import IMPOSSIBLE, Paged, Request, attend, dense, make_request
from tests.kernels.spec_decode_batches import IN_TRITON, INTERPRETED

ROOMS = ("reference", "cpu")
TRITON = "spec_decode=triton"
each_room = pytest.mark.parametrize("backend", (*ROOMS, IN_TRITON), indirect=True)
each_kernel = pytest.mark.parametrize("backend", ("cpu", IN_TRITON), indirect=True)
on_cpu = pytest.mark.parametrize("backend", ("cpu",), indirect=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# (prefix, queries) of each request, and what makes the case.
CASES: dict[str, dict[str, Any]] = {
    "one_key": dict(lengths=[(0, 1)], size=1, heads=(1, 1), page_size=1),
    "decode": dict(lengths=[(70, 1), (63, 1), (0, 1)], size=20),
    "prefill": dict(lengths=[(0, 37)], size=16),
    "chunk": dict(lengths=[(41, 26)], heads=(3, 3), page_size=7),
    "empty_requests": dict(lengths=[(5, 0), (9, 3), (0, 0), (17, 2), (33, 0)], page_size=4),
    "tree": dict(lengths=[(50, 13)], tree=True),
    "trees": dict(lengths=[(63, 9), (64, 9), (0, 9), (127, 4)], tree=True, page_size=1, heads=(6, 2)),
    "tree_window": dict(lengths=[(50, 12), (3, 12)], tree=True, window=9),
    "chunk_window": dict(lengths=[(70, 40)], window=33, page_size=5),
    "window_of_one": dict(lengths=[(20, 5)], window=1),
    "gate_head": dict(lengths=[(20, 5)], tree=True, gate="head"),
    "gate_element": dict(lengths=[(20, 5)], gate="element", size=24),
    "long": dict(lengths=[(1200, 3)], heads=(9, 3), size=64, page_size=64),
    "long_tree": dict(lengths=[(500, 40)], tree=True, heads=(8, 2), size=128, gate="element"),
    "long_prefill": dict(lengths=[(0, 300), (450, 130)], heads=(9, 3), size=64),
    "long_window": dict(lengths=[(1300, 70)], heads=(2, 1), size=80, window=600, page_size=3),
    "most_nodes": dict(lengths=[(77, 1024)], tree=True, heads=(2, 1), size=16),
    "chunk_of_most_nodes": dict(lengths=[(30, 300)], heads=(2, 2), size=16),
    "many_heads": dict(lengths=[(30, 3)], heads=(150, 1), size=8),
    "large_head": dict(lengths=[(130, 4)], heads=(2, 1), size=256, tree=True),
}
SMALL = ("one_key", "decode", "empty_requests", "tree_window", "gate_head", "gate_element")
rooms_and_cases = pytest.mark.parametrize(
    ("backend", "case"),
    [(room, case) for room in ROOMS for case in CASES]
    + [pytest.param(TRITON, case, marks=INTERPRETED) for case in SMALL],
    indirect=["backend"],
)


def requests_of(case: str, seed: int = 0) -> tuple[list[Request], dict[str, Any], dict[str, Any]]:
    """Requests of a case, options of its paging, options of its call."""
    options = dict(CASES[case])
    lengths, window = options.pop("lengths"), options.pop("window", 0)
    paging = {"page_size": options.pop("page_size", 16)}
    made = [make_request(*length, **options, seed=seed + i) for i, length in enumerate(lengths)]
    return made, paging, {"window": window}


# -- values -----------------------------------------------------------------------------------------------------------
@rooms_and_cases
def test_attention_is_softmax_over_the_path(backend: str, case: str) -> None:
    requests, paging, options = requests_of(case)
    rows = Paged.of(requests, **paging).run(**options)
    exact = torch.cat([dense(request, torch.float64, **options) for request in requests])
    torch_rows = torch.cat([dense(request, torch.float32, **options) for request in requests])
    check_error(torch.cat(rows), exact, torch_rows, TOLERANCE)


@each_room
@pytest.mark.parametrize("cache_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_of_queries_and_caches(backend: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    if backend == TRITON and torch.bfloat16 in (dtype, cache_dtype) and not torch.cuda.is_available():
        pytest.skip("the interpreter computes in bf16 wrongly")
    request = make_request(67, 7, tree=True, size=33, gate="head").to(dtype, cache_dtype)
    (rows,) = attend(request)
    check_error(rows, dense(request, torch.float64), dense(request, torch.float32).to(dtype), TOLERANCE)


@each_room
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["head", "element"])
def test_gate_in_the_dtype_of_q_or_fp32(backend: str, kind: str, dtype: torch.dtype) -> None:
    if backend == TRITON and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter computes in bf16 wrongly")
    request = make_request(9, 3, gate=kind).to(dtype, torch.float32)
    assert request.gate is not None
    rounded = dataclasses.replace(request, gate=request.gate.to(dtype))
    assert bitwise_equal(attend(rounded)[0], attend(dataclasses.replace(rounded, gate=rounded.gate.float()))[0])
    (rows,) = attend(request)
    check_error(rows, dense(request, torch.float64), dense(request, torch.float32).to(dtype), TOLERANCE)


@each_kernel
def test_gate_of_a_head_is_that_gate_for_each_element(backend: str) -> None:
    request = make_request(9, 3, gate="head", size=20)
    assert request.gate is not None
    spread = dataclasses.replace(request, gate=request.gate[..., None].expand(-1, -1, 20).contiguous())
    assert bitwise_equal(attend(request)[0], attend(spread)[0])


@each_kernel
@pytest.mark.parametrize(("gate", "factor"), [(torch.inf, 1.0), (1e30, 1.0), (-torch.inf, 0.0), (-1e30, 0.0)])
def test_gates_that_are_open_or_shut(backend: str, gate: float, factor: float) -> None:
    request = make_request(9, 3, size=20)
    gated = dataclasses.replace(request, gate=torch.full((3, 4), gate))
    assert torch.equal(attend(gated)[0], attend(request)[0] * factor)


@each_room
def test_scale_is_of_the_scores(backend: str) -> None:
    request = make_request(20, 4)
    (rows,) = attend(request, softmax_scale=0.5)
    scaled = dataclasses.replace(request, q=request.q * 0.5 * 32**0.5)
    check_error(rows, dense(scaled, torch.float64), dense(scaled, torch.float32), TOLERANCE)


@each_room
@pytest.mark.parametrize("size", [30.0, 1e18])
def test_large_scores_do_not_overflow(backend: str, size: float) -> None:
    request = make_request(70, 5, tree=True)
    large = dataclasses.replace(request, q=request.q * size)
    check_error(attend(large)[0], dense(large, torch.float64), dense(large, torch.float32), TOLERANCE)


@each_room
@pytest.mark.parametrize("prefix", [0, 6])
def test_query_without_keys_is_zero(backend: str, prefix: int) -> None:
    """A row whose mask is empty attends to the prefix; without one, to nothing."""
    request = make_request(prefix, 3, gate="element")
    paged = Paged.of([request], mask=True)
    bits = torch.tensor([[1, 0], [0, 0], [0b101, 0]], dtype=torch.int32)
    (rows,) = paged.run(mask_bits=bits)
    shorter = dataclasses.replace(request, keys=request.keys[:prefix], values=request.values[:prefix])
    one = dataclasses.replace(shorter, q=request.q[1:2], gate=request.gate[1:2], parents=[-1])
    expected = _over_prefix(one) if prefix else torch.zeros(1, 4, 32)
    assert torch.allclose(rows[1:2].double(), expected.double(), atol=1e-6)
    assert rows[0].abs().min() > 0


def _over_prefix(request: Request) -> Tensor:
    """Attention of one query to all keys there are, its own not among them."""
    q, keys, values = request.q.double()[0], request.keys.double(), request.values.double()
    keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
    weights = (torch.einsum("hd,jhd->hj", q, keys) * 32**-0.5).softmax(-1)
    return (torch.einsum("hj,jhd->hd", weights, values) * request.gate.double().sigmoid()[0])[None]


@each_room
@pytest.mark.parametrize("shape", [(0, 4, 32), (3, 0, 32)], ids=["no_rows", "no_heads"])
def test_empty_calls(backend: str, shape: tuple[int, ...]) -> None:
    q, cache = torch.empty(shape), torch.zeros(2, 16, 2, 32)
    counts = torch.tensor([0, shape[0]], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    out = tree_attention(q, cache, cache, table, counts[1:], cu_seqlens_q=counts)
    assert out.shape == shape


@pytest.mark.parametrize("backend", ROOMS, indirect=True)
def test_batched_queries_are_the_flat_ones(backend: str) -> None:
    requests = [make_request(11, 4, tree=True, gate="head", seed=seed) for seed in range(3)]
    paged = Paged.of(requests)
    flat = torch.stack(paged.run())
    names = ("q", "mask_bits", "gate")
    shaped = {name: paged.call[name].unflatten(0, (3, 4)) for name in names}
    assert bitwise_equal(tree_attention(**{**paged.call, **shaped, "cu_seqlens_q": None}), flat)


# -- row-invariance ---------------------------------------------------------------------------------------------------
SPLIT = (0, 5, 63, 64, 65, 130, 447, 500, 511, 512, 513, 700)  # prefixes about the places where kernels cut


def drawn(seed: int) -> tuple[Request, list[Request], int]:
    """A tree that is deep, requests beside it, a window: all drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def choose(values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    heads, size = choose([(1, 1), (4, 2), (6, 2), (9, 3), (8, 1), (7, 7)]), choose([1, 16, 20, 64, 64, 80, 128])
    gate = choose([None, None, "head", "element"])
    dtype, cache_dtype = choose(list(DTYPES.values())), choose(list(DTYPES.values()))
    shared: dict[str, Any] = dict(heads=heads, size=size, gate=gate)
    tree = make_request(choose(SPLIT), choose([1, 2, 8, 33, 70]), tree=True, **shared, seed=seed)
    beside = [
        make_request(choose(SPLIT[:9]), choose([0, 1, 8, 20]), tree=choose([True, False]), **shared, seed=seed + i)
        for i in range(1, choose([1, 2, 4]))
    ]
    window = choose([0, 0, 0, 1, 30, 64, 100, 600])
    return tree.to(dtype, cache_dtype), [request.to(dtype, cache_dtype) for request in beside], window


@on_cpu
@pytest.mark.parametrize("seed", range(60))
def test_node_of_a_tree_is_its_path_decoded_alone(backend: str, seed: int) -> None:
    """The same bits from a tree in a mixed batch, from plain decoding and from a causal chunk, on pages of any size."""
    tree, beside, window = drawn(seed)
    sizes = [1, 3, 16, 64]
    rows = attend(*beside, tree, page_size=sizes[seed % 4], seed=seed, window=window)[-1]
    deepest = max(range(len(tree.q)), key=lambda node: len(tree.path(node)))
    last = len(tree.q) - 1
    alone = [tree.along(node, 1) for node in (deepest, last)]
    decoded = attend(*alone, page_size=sizes[(seed + 1) % 4], seed=seed + 1, window=window)
    assert bitwise_equal(torch.cat(decoded), rows[[deepest, last]])
    path = tree.path(deepest)
    chunk = tree.along(deepest, len(path))
    (prefilled,) = attend(chunk, page_size=sizes[(seed + 2) % 4], seed=seed + 2, window=window)
    assert bitwise_equal(prefilled, rows[path])


@pytest.mark.parametrize("backend", [IN_TRITON], indirect=True)
@pytest.mark.parametrize(("prefix", "window"), [(0, 0), (63, 7)])
def test_node_of_a_small_tree_is_its_path_decoded_alone(backend: str, prefix: int, window: int) -> None:
    tree = make_request(prefix, 6, tree=True, size=16, gate="element")
    rows = attend(make_request(3, 2, size=16, gate="element", seed=1), tree, page_size=4, window=window)[-1]
    deepest = max(range(6), key=lambda node: len(tree.path(node)))
    (decoded,) = attend(tree.along(deepest, 1), page_size=16, seed=1, window=window)
    path = tree.path(deepest)
    (prefilled,) = attend(tree.along(deepest, len(path)), page_size=1, window=window)
    assert bitwise_equal(decoded[0], rows[deepest])
    assert bitwise_equal(prefilled, rows[path])


@on_cpu
@pytest.mark.parametrize("seed", range(60, 84))
def test_rows_do_not_depend_on_their_batch(backend: str, seed: int) -> None:
    tree, beside, window = drawn(seed)
    together = attend(tree, *beside, page_size=16, seed=seed, window=window)
    apart = [attend(request, page_size=5, seed=seed + 1, window=window)[0] for request in (tree, *beside)]
    assert bitwise_equal(torch.cat(together), torch.cat(apart))


@on_cpu
@pytest.mark.parametrize("seed", range(84, 96))
def test_rows_do_not_depend_on_threads(backend: str, seed: int) -> None:
    tree, beside, window = drawn(seed)
    long = make_request(1500, 2, heads=(tree.q.shape[1], tree.keys.shape[1]), size=tree.q.shape[2], seed=seed)
    paged = Paged.of(
        [dataclasses.replace(request, gate=None) for request in (tree, *beside, long.to(tree.q.dtype, tree.keys.dtype))]
    )
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(torch.cat(paged.run(window=window)))
    torch.set_num_threads(before)
    assert all(bitwise_equal(found[0], other) for other in found[1:])


@on_cpu
@pytest.mark.parametrize("seed", range(96, 108))
def test_rows_do_not_depend_on_strides(backend: str, seed: int) -> None:
    """Caches that are every other head of larger ones, K and V beside each other; q a part of a larger product."""
    tree, beside, window = drawn(seed)
    paged = Paged.of([tree, *beside])
    k_cache, v_cache, q = (paged.call[name] for name in ("k_cache", "v_cache", "q"))
    both = torch.full((*k_cache.shape[:2], 2 * k_cache.shape[2], 2, k_cache.shape[3] + 3), torch.nan).to(k_cache)
    k_view, v_view = (both[:, :, 1::2, i, 2:-1] for i in (0, 1))
    k_view.copy_(k_cache)
    v_view.copy_(v_cache)
    wide = torch.full((len(q), q.shape[1] + 5, q.shape[2] + 1), torch.nan, dtype=q.dtype)
    q_view = wide[:, 2:-3, 1:].copy_(q)
    strided = paged.run(window=window, k_cache=k_view, v_cache=v_view, q=q_view)
    assert bitwise_equal(torch.cat(strided), torch.cat(paged.run(window=window)))


@each_kernel
def test_causal_chunk_is_the_tree_without_branches(backend: str) -> None:
    chunk = make_request(37, 9)
    assert bitwise_equal(Paged.of([chunk], mask=True).run()[0], Paged.of([chunk], mask=False).run()[0])


@on_cpu
def test_a_window_as_long_as_the_path_changes_nothing(backend: str) -> None:
    tree = make_request(37, 9, tree=True)
    assert bitwise_equal(attend(tree)[0], attend(tree, window=46)[0])


@on_cpu
def test_runs_repeat(backend: str) -> None:
    paged = Paged.of([make_request(37, 9, tree=True)])
    assert bitwise_equal(paged.run()[0], paged.run()[0])


# -- hostile memory ---------------------------------------------------------------------------------------------------
@each_room
@pytest.mark.parametrize("tree", [False, True], ids=["causal", "tree"])
def test_nothing_but_the_path_is_read(backend: str, tree: bool) -> None:
    """nan in every key and value that a row does not attend to leaves the row as it was."""
    request = make_request(21, 6, tree=tree)
    node = 3
    slots = request.attended(node)
    keys, values = torch.full_like(request.keys, torch.nan), torch.full_like(request.values, torch.nan)
    keys[slots], values[slots] = request.keys[slots], request.values[slots]
    poisoned = dataclasses.replace(request, keys=keys, values=values)
    assert bitwise_equal(attend(poisoned)[0][node], attend(request)[0][node])


@each_kernel
def test_a_nan_is_not_hidden(backend: str) -> None:
    request = make_request(21, 6, tree=True)
    keys = request.keys.clone()
    keys[21 + 2] = torch.nan
    (rows,) = attend(dataclasses.replace(request, keys=keys))
    touched = torch.tensor([2 in request.path(node) for node in range(6)])
    assert bool(touched.any()) and not bool(touched.all())
    assert bool(rows[touched].isnan().all()) and bool(rows[~touched].isfinite().all())


@on_cpu
@pytest.mark.parametrize("size", [20, 64])
def test_slots_before_the_window_are_not_read(backend: str, size: int) -> None:
    request = make_request(700, 5, tree=True, size=size)
    first = request.prefix + 1 - 40
    keys, values = request.keys.clone(), request.values.clone()
    keys[:first], values[:first] = torch.nan, torch.nan
    forgotten = dataclasses.replace(request, keys=keys, values=values)
    paged = Paged.of([forgotten], page_size=16)
    table = paged.call["block_table"].clone()
    table[0, : first // 16] = IMPOSSIBLE
    assert bitwise_equal(paged.run(window=40, block_table=table)[0], attend(request, window=40)[0])


@each_room
def test_results_are_written_whole_and_nothing_beside_them(backend: str) -> None:
    paged = Paged.of([make_request(21, 6, size=20, gate="head"), make_request(3, 0, size=20, gate="head")])
    expected = torch.cat(paged.run())
    inside = {name: surrounded_by_nan(paged.call[name]) for name in ("q", "k_cache", "v_cache", "gate")}
    kept = {name: value.clone() for name, value in inside.items()}
    with uninitialized_is_nan():
        rows = torch.cat(paged.run(**inside))
    assert bitwise_equal(rows, expected)
    assert all(bitwise_equal(inside[name], kept[name]) for name in inside)


@pytest.mark.parametrize("backend", ROOMS, indirect=True)
@pytest.mark.parametrize("block", [-1, 7, IMPOSSIBLE])
def test_a_block_id_that_is_needed_is_checked(backend: str, block: int) -> None:
    paged = Paged.of([make_request(21, 6), make_request(30, 2)], page_size=16)
    table = paged.call["block_table"].clone()
    table[1, 1] = block
    with pytest.raises(
        ValueError, match=r"tree_attention: block_table: want block ids in 0\.\.6 for the keys of request 1"
    ):
        paged.run(block_table=table)


# -- registration -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ROOMS, indirect=True)
@pytest.mark.parametrize("gate", [None, "head"])
def test_opcheck(backend: str, gate: str | None) -> None:
    call = Paged.of([make_request(5, 3, tree=True, gate=gate)], page_size=4).call
    names = ("q", "k_cache", "v_cache", "block_table", "cache_seqlens", "cu_seqlens_q", "mask_bits", "gate")
    op = torch.ops.m3kernels.tree_attention.default
    torch.library.opcheck(op, (*(call.get(name) for name in names), 0.25, 0))
