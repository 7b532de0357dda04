"""int8 caches: tree_attention and tree_commit over integers with a scale of each row, in every room.

A room gives what the formula says of the keys and values integers * scale, and is as row-invariant over int8 caches as
over others: rows that are read where they lie, copied or tiled give the same bits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.spec_decode import tree_attention, tree_commit
from m3kernels.spec_decode.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan
from tests.kernels.spec_decode_attention_cases import IMPOSSIBLE, Paged, Request, dense, make_request
from tests.kernels.spec_decode_batches import IN_TRITON, SLOWLY_IN_TRITON

each_room = pytest.mark.parametrize("backend", ("reference", "cpu", IN_TRITON), indirect=True)
each_kernel = pytest.mark.parametrize("backend", ("cpu", IN_TRITON), indirect=True)
slowly_each_kernel = pytest.mark.parametrize("backend", ("cpu", SLOWLY_IN_TRITON), indirect=True)
plain_rooms = pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
on_cpu = pytest.mark.parametrize("backend", ("cpu",), indirect=True)

CASES: dict[str, dict[str, Any]] = {
    "one_key": dict(prefix=0, queries=1, size=1, heads=(1, 1), page_size=1),
    "decode": dict(prefix=70, queries=1, size=32, page_size=7),
    "tree": dict(prefix=20, queries=6, size=24, tree=True, gate="head", page_size=5),
    "window": dict(prefix=33, queries=4, size=16, tree=True, window=9),
}
LARGE: dict[str, dict[str, Any]] = {
    "few_rows": dict(prefix=600, queries=1, size=64, heads=(9, 3)),
    "some_rows": dict(prefix=130, queries=5, size=128, heads=(4, 1), tree=True),
    "many_rows": dict(prefix=129, queries=40, size=64, heads=(9, 3), tree=True, gate="element"),
    "odd_size": dict(prefix=70, queries=30, size=37, heads=(6, 2), page_size=3),
    "long_head": dict(prefix=90, queries=20, size=200, heads=(4, 1), tree=True),
}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A request, and the int8 caches of a call of it."""

    exact: Request  # keys and values that the caches stand for, in fp32
    call: dict[str, Any]

    def run(self, **options: Any) -> Tensor:
        return tree_attention(**{**self.call, **options})


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and the scale of each row (last dimension)."""
    scale = rows.abs().amax(-1).clamp(min=1e-30) / 127
    return (rows / scale[..., None]).round().to(torch.int8), scale


def quantized(request: Request, *, page_size: int = 16, seed: int = 0) -> Quantized:
    """Slots that no key needs hold integers with a scale of nan, and integers that are large."""
    (keys, k_scale), (values, v_scale) = quantize(request.keys), quantize(request.values)
    exact = dataclasses.replace(
        request, keys=keys.float() * k_scale[..., None], values=values.float() * v_scale[..., None]
    )
    made = Paged.of([dataclasses.replace(exact, keys=exact.keys, values=exact.values)], page_size=page_size, seed=seed)
    call = dict(made.call)
    slots = torch.arange(len(keys))
    at = (call["block_table"][0, slots // page_size].long(), slots % page_size)
    for name, integers, scale in (("k", keys, k_scale), ("v", values, v_scale)):
        shape = call[f"{name}_cache"].shape
        call[f"{name}_cache"] = torch.full(shape, 127, dtype=torch.int8)
        call[f"{name}_cache"][at] = integers
        call[f"{name}_scale"] = torch.full(shape[:3], torch.nan)
        call[f"{name}_scale"][at] = scale
    return Quantized(exact, call)


def case_of(case: str) -> tuple[Request, dict[str, Any], dict[str, Any]]:
    options = dict({**CASES, **LARGE}[case])
    window, page_size = options.pop("window", 0), options.pop("page_size", 16)
    return make_request(**options), {"page_size": page_size}, {"window": window}


# -- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "case"),
    [(room, case) for room in ("reference", "cpu") for case in (*CASES, *LARGE)]
    + [pytest.param("spec_decode=triton", case, marks=IN_TRITON.marks) for case in CASES],
    indirect=["backend"],
)
def test_attention_over_integers_and_scales(backend: str, case: str) -> None:
    request, paging, options = case_of(case)
    call = quantized(request, **paging)
    exact = dense(call.exact, torch.float64, **options)
    check_error(call.run(**options), exact, dense(call.exact, torch.float32, **options), TOLERANCE)


@each_room
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_dtypes_of_queries(backend: str, dtype: torch.dtype) -> None:
    if backend == "spec_decode=triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes in bf16 wrongly")
    request = make_request(35, 5, tree=True, size=32, gate="head").to(dtype, torch.float32)
    call = quantized(request)
    theirs = call.exact.to(dtype, dtype)
    check_error(call.run(), dense(call.exact, torch.float64), dense(theirs, dtype), TOLERANCE)


@pytest.fixture(params=_cpu_ext.build_info()["isas"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, in use for the test."""
    if request.param not in _cpu_ext.isas():
        pytest.skip(f"this CPU does not run {request.param}")
    before = _cpu_ext.get_isa()
    _cpu_ext.set_isa(request.param)
    yield request.param
    _cpu_ext.set_isa(before)


@pytest.mark.parametrize("case", LARGE)
def test_every_instruction_set(isa: str, case: str) -> None:
    request, paging, options = case_of(case)
    call = quantized(request, **paging)
    rows, exact = call.run(**options), dense(call.exact, torch.float64, **options)
    check_error(rows, exact, dense(call.exact, torch.float32, **options), TOLERANCE)
    nodes = sorted({0, len(rows) // 2, len(rows) - 1})
    for node in nodes:
        alone = quantized(request.along(node, 1), page_size=3, seed=node)
        assert bitwise_equal(alone.run()[0], rows[node])


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("size", [16, 37])
def test_integers_are_read_exactly(isa: str, size: int, queries: int) -> None:
    """With scales of 1, int8 caches of every integer give the bits of the same values in fp32 caches."""
    request = make_request(80, queries, size=size)
    integers = (torch.arange(request.values.numel()) % 256 - 128).view(request.values.shape).float()
    whole = dataclasses.replace(request, keys=integers.flip(0) / 128, values=integers)
    plain = Paged.of([dataclasses.replace(whole, keys=integers.flip(0))]).call
    small = {name: plain[name].nan_to_num(0).to(torch.int8) for name in ("k_cache", "v_cache")}
    ones = torch.ones(plain["k_cache"].shape[:3])
    expected = tree_attention(**plain, softmax_scale=1e-4)
    assert bitwise_equal(tree_attention(**{**plain, **small}, k_scale=ones, v_scale=ones, softmax_scale=1e-4), expected)


# -- row-invariance ---------------------------------------------------------------------------------------------------
SPLIT = (0, 5, 63, 64, 65, 130, 447, 511, 512, 513, 700)  # prefixes about the places where kernels cut


@on_cpu
@pytest.mark.parametrize("seed", range(24))
def test_node_of_a_tree_is_its_path_decoded_alone(backend: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def choose(values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    heads, size = choose([(1, 1), (4, 2), (6, 2), (9, 3), (8, 1)]), choose([1, 16, 20, 64, 64, 80, 128])
    shape = dict(heads=heads, size=size, gate=choose([None, "head", "element"]))
    tree = make_request(choose(SPLIT), choose([1, 2, 8, 33, 70]), tree=True, **shape, seed=seed)
    window = choose([0, 0, 0, 1, 30, 100, 600])
    rows = quantized(tree, page_size=choose([1, 3, 16, 64]), seed=seed).run(window=window)
    deepest = max(range(len(tree.q)), key=lambda node: len(tree.path(node)))
    for node in (deepest, len(tree.q) - 1):
        alone = quantized(tree.along(node, 1), page_size=choose([1, 3, 16, 64]), seed=seed + 1)
        assert bitwise_equal(alone.run(window=window)[0], rows[node])
    path = tree.path(deepest)
    chunk = quantized(tree.along(deepest, len(path)), page_size=5, seed=seed + 2)
    assert bitwise_equal(chunk.run(window=window), rows[path])


@pytest.mark.parametrize("backend", [IN_TRITON], indirect=True)
def test_node_of_a_small_tree_is_its_path_decoded_alone(backend: str) -> None:
    tree = make_request(13, 5, tree=True, size=16, gate="element")
    rows = quantized(tree, page_size=4).run()
    deepest = max(range(5), key=lambda node: len(tree.path(node)))
    assert bitwise_equal(quantized(tree.along(deepest, 1), page_size=16, seed=1).run()[0], rows[deepest])


@on_cpu
@pytest.mark.parametrize("threads", [2, 7])
def test_rows_do_not_depend_on_threads(backend: str, threads: int) -> None:
    call = quantized(make_request(1500, 9, heads=(9, 3), size=64, tree=True))
    alone = call.run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    together = call.run()
    torch.set_num_threads(before)
    assert bitwise_equal(together, alone)


@each_kernel
def test_some_nodes_give_the_rows_of_all(backend: str) -> None:
    call = quantized(make_request(20, 6, size=16, tree=True), page_size=4)
    nodes = [4, 1, 1]
    some = {name: call.call[name][nodes] for name in ("q", "mask_bits")}
    cu, lens = torch.tensor([0, 3]), torch.tensor([6])
    assert bitwise_equal(call.run(**some, cu_seqlens_q=cu, tree_lens=lens), call.run()[nodes])


@slowly_each_kernel
def test_rows_do_not_depend_on_strides(backend: str) -> None:
    """Caches that are parts of a larger one, K and V beside each other; scales heads first."""
    call = quantized(make_request(35, 6, size=16, tree=True), page_size=4)
    changed: dict[str, Tensor] = {}
    for i, name in enumerate(("k", "v")):
        cache, scale = call.call[f"{name}_cache"], call.call[f"{name}_scale"]
        both = torch.full((*cache.shape[:2], 2 * cache.shape[2], 2, cache.shape[3] + 3), 99, dtype=torch.int8)
        changed[f"{name}_cache"] = both[:, :, 1::2, i, 2:-1].copy_(cache)
        changed[f"{name}_scale"] = torch.empty(scale.shape[::-1]).permute(2, 1, 0).copy_(scale)
    assert not changed["k_scale"].is_contiguous()
    assert bitwise_equal(call.run(**changed), call.run())


# -- hostile memory ---------------------------------------------------------------------------------------------------
@each_room
@pytest.mark.parametrize(("dtype", "poison"), [(torch.float32, torch.inf), (torch.float16, 1e4)], ids=("fp32", "fp16"))
def test_nothing_but_the_path_is_read(backend: str, dtype: torch.dtype, poison: float) -> None:
    """nan in the scales that a row does not attend to, infinity or what fp16 cannot hold, leave the row as it was."""
    request = make_request(21, 6, tree=True, size=16).to(dtype, torch.float32)
    call, node = quantized(request), 3
    slots = torch.tensor(sorted(set(range(27)) - set(request.attended(node))))
    at = (call.call["block_table"][0, slots // 16].long(), slots % 16)
    k_scale, v_scale = call.call["k_scale"].clone(), call.call["v_scale"].clone()
    k_scale[at], v_scale[at] = torch.nan, poison
    assert bitwise_equal(call.run(k_scale=k_scale, v_scale=v_scale)[node], call.run()[node])


@each_kernel
@pytest.mark.parametrize("name", ("k_scale", "v_scale"))
def test_a_nan_is_not_hidden(backend: str, name: str) -> None:
    request = make_request(21, 6, tree=True, size=16)
    call = quantized(request)
    scale = call.call[name].clone()
    scale[call.call["block_table"][0, 23 // 16].long(), 23 % 16] = torch.nan
    rows = call.run(**{name: scale})
    touched = torch.tensor([2 in request.path(node) for node in range(6)])
    assert bool(touched.any()) and not bool(touched.all())
    assert bool(rows[touched].isnan().all()) and bool(rows[~touched].isfinite().all())


@on_cpu
def test_slots_before_the_window_are_not_read(backend: str) -> None:
    request = make_request(700, 5, tree=True, size=64)
    call = quantized(request)
    expected = call.run(window=40)
    table = call.call["block_table"].clone()
    table[0, : (request.prefix + 1 - 40) // 16] = IMPOSSIBLE
    assert bitwise_equal(call.run(window=40, block_table=table), expected)


@slowly_each_kernel
def test_results_are_written_whole_and_nothing_beside_them(backend: str) -> None:
    call = quantized(make_request(21, 6, size=20, gate="head", tree=True))
    expected = call.run()
    inside = {name: surrounded_by_nan(call.call[name]) for name in ("q", "k_scale", "v_scale", "gate")}
    with uninitialized_is_nan():
        assert bitwise_equal(call.run(**inside), expected)


# -- commit -----------------------------------------------------------------------------------------------------------
PATH = torch.tensor([[0, 2, 4], [0, -1, -1], [0, 1, 5]], dtype=torch.int32)
LENGTHS = torch.tensor([2, 0, 2], dtype=torch.int32)
PREFIXES = torch.tensor([3, 7, 9], dtype=torch.int32)
TABLE = torch.randperm(14, generator=torch.Generator().manual_seed(0))[:12].view(3, 4).int()


def layers(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """int8 caches of three layers and their scales, of which one is stored heads first."""
    generator = torch.Generator().manual_seed(seed)
    caches = [torch.randint(-128, 128, (14, 4, 2, 5), generator=generator).to(torch.int8) for _ in range(3)]
    scales = [torch.rand(14, 4, 2, generator=generator) for _ in range(3)]
    scales[1] = torch.empty(2, 4, 14).permute(2, 1, 0).copy_(scales[1])
    return caches, scales


def moved(cache: Tensor) -> Tensor:
    """What plain decoding would have left."""
    after = cache.clone()
    for b, (path, length) in enumerate(zip(PATH.tolist(), LENGTHS.tolist(), strict=True)):
        for j in range(length + 1):
            source, target = int(PREFIXES[b]) + path[j], int(PREFIXES[b]) + j
            after[TABLE[b, target // 4], target % 4] = cache[TABLE[b, source // 4], source % 4]
    return after


@each_room
def test_commit_moves_rows_and_their_scales(backend: str) -> None:
    (k_caches, k_scales), (v_caches, v_scales) = layers(1), layers(2)
    tensors = [*k_caches, *v_caches, *k_scales, *v_scales]
    wanted = [moved(tensor) for tensor in tensors]
    assert not any(bitwise_equal(a, b) for a, b in zip(tensors, wanted, strict=True))
    hidden = torch.randn(3, 6, 4)
    done = tree_commit(
        PATH, LENGTHS, k_caches, v_caches, TABLE, PREFIXES, hidden, k_scales=k_scales, v_scales=tuple(v_scales)
    )
    assert [bitwise_equal(a, b) for a, b in zip(tensors, wanted, strict=True)] == [True] * 12
    assert done.cache_seqlens.tolist() == [6, 8, 12]
    assert done.hidden is not None and bitwise_equal(done.hidden[0], hidden[0, [0, 2, 4]])


# -- errors -----------------------------------------------------------------------------------------------------------
SHAPE = "want (4, 16, 2) float32 with int8 caches; got "
FLOATS = torch.zeros(4, 16, 2, 16)
ATTENTION_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no_k_scale": (dict(k_scale=None), f"k_scale: {SHAPE}None"),
    "no_v_scale": (dict(v_scale=None), f"v_scale: {SHAPE}None"),
    "shape": (dict(k_scale=torch.ones(4, 16)), f"k_scale: {SHAPE}(4, 16) float32"),
    "dtype": (dict(v_scale=torch.ones(4, 16, 2).half()), f"v_scale: {SHAPE}(4, 16, 2) float16"),
    "number": (dict(k_scale=0.5), f"k_scale: {SHAPE}0.5"),
    "device": (dict(k_scale=torch.ones(4, 16, 2, device="meta")), f"k_scale: {SHAPE}(4, 16, 2) float32 on meta"),
    "gradient": (dict(k_scale=torch.ones(4, 16, 2).requires_grad_()), "k_scale: want no gradient"),
    "float_caches": (
        dict(k_cache=FLOATS, v_cache=FLOATS), "k_scale: want None with float32 caches; got (4, 16, 2) float32",
    ),
    "one_float_cache": (
        dict(v_cache=FLOATS), "v_cache: want (4, 16, 2, 16) torch.int8, page_size at least 1, like the first; got ",
    ),
    "other_integers": (
        dict(k_cache=FLOATS.to(torch.uint8)), "k_cache: want (P, page_size, G, D) float32, bfloat16, float16 or int8; ",
    ),
}  # fmt: skip


@plain_rooms
@pytest.mark.parametrize("name", ATTENTION_ERRORS)
def test_refusals_of_attention(backend: str, name: str) -> None:
    change, message = ATTENTION_ERRORS[name]
    call = quantized(make_request(12, 3, size=16))
    assert call.call["k_cache"].shape == FLOATS.shape and call.run().isfinite().all()
    with pytest.raises(ValueError, match="^" + re.escape(f"tree_attention: {message}")):
        call.run(**change)


K, K_SCALES = layers(1)
COMMIT_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "none": (dict(k_scales=()), "k_scales: want 3 tensors, one of each int8 cache; got 0"),
    "fewer": (dict(v_scales=K_SCALES[:2]), "v_scales: want 3 tensors, one of each int8 cache; got 2"),
    "tensor": (dict(k_scales=K_SCALES[0]), "k_scales: want a list or tuple of tensors; got (14, 4, 2) float32"),
    "no_list": (dict(v_scales=None), "v_scales: want a list or tuple of tensors; got None"),
    "shape": (
        dict(k_scales=[*K_SCALES[:2], torch.ones(14, 4)]),
        "k_scales: want (14, 4, 2) float32 with int8 caches; got (14, 4) float32",
    ),
    "expanded": (
        dict(v_scales=[*K_SCALES[:2], torch.ones(14, 4, 1).expand(14, 4, 2)]),
        "v_scales: want elements that do not share memory; got an expanded tensor",
    ),
    "gradient": (
        dict(v_scales=[*K_SCALES[:2], torch.ones(14, 4, 2).requires_grad_()]), "v_scales: want no gradient",
    ),
    "float_caches": (
        dict(k_caches=[cache.half() for cache in K], v_caches=[cache.half() for cache in K]),
        "k_scales: want 0 tensors, one of each int8 cache; got 3",
    ),
}  # fmt: skip


@plain_rooms
@pytest.mark.parametrize("name", COMMIT_ERRORS)
def test_refusals_of_commit(backend: str, name: str) -> None:
    change, message = COMMIT_ERRORS[name]
    call = dict(accept_index=PATH, accept_length=LENGTHS, block_table=TABLE, cache_seqlens=PREFIXES, k_caches=K)
    call |= dict(v_caches=K, k_scales=K_SCALES, v_scales=K_SCALES)
    with pytest.raises(ValueError, match="^" + re.escape(f"tree_commit: {message}")):
        tree_commit(**{**call, **change})


FLAT = ("q", "k_cache", "v_cache", "block_table", "cache_seqlens", "cu_seqlens_q", "mask_bits", "gate")


@on_cpu
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k_scale", dict(k_scale=None)),
        ("v_scale", dict(v_scale=torch.ones(4, 16, 1))),
        ("k_scale", dict(k_scale=torch.ones(4, 16, 2).double())),
        ("v_scale", dict(v_scale=torch.ones(3, 16, 2))),
        ("k_scale", dict(k_cache=FLOATS, v_cache=FLOATS)),
        ("v_scale", dict(k_cache=FLOATS, v_cache=FLOATS, k_scale=None)),
        ("v_cache", dict(v_cache=FLOATS)),
    ],
)
def test_the_border_checks_what_memory_rests_on(backend: str, name: str, change: dict[str, Any]) -> None:
    """The registered op, which the public checks do not protect."""
    call = {**quantized(make_request(12, 3, size=16)).call, **change}
    flat = [*(call.get(key) for key in FLAT), 0.25, 0, None, call["k_scale"], call["v_scale"]]
    with pytest.raises(ValueError, match=f"^tree_attention: {name}: want "):
        torch.ops.m3kernels.tree_attention.default(*flat)


# -- registration -----------------------------------------------------------------------------------------------------
@plain_rooms
def test_opcheck_of_attention(backend: str) -> None:
    call = quantized(make_request(12, 3, size=16, tree=True)).call
    flat = [*(call.get(key) for key in FLAT), 0.25, 0, torch.tensor([3]).int(), call["k_scale"], call["v_scale"]]
    torch.library.opcheck(torch.ops.m3kernels.tree_attention.default, tuple(flat))


@plain_rooms
def test_commit_compiles_whole(backend: str) -> None:
    """Scales are written through views, also in a graph."""

    def commit(cache: Tensor, k_scale: Tensor, v_scale: Tensor) -> tuple[Tensor, ...]:
        other = cache + 1
        tree_commit(PATH, LENGTHS, [cache], [other], TABLE, PREFIXES, k_scales=[k_scale], v_scales=[v_scale])
        return cache * 1, other, k_scale + 0, v_scale + 0

    torch.compiler.reset()
    given = (K[0], K_SCALES[0], K_SCALES[2])
    found = torch.compile(commit, fullgraph=True, backend="aot_eager")(*(tensor.clone() for tensor in given))
    wanted = (moved(K[0]), moved(K[0] + 1), moved(K_SCALES[0]), moved(K_SCALES[2]))
    assert [bitwise_equal(a, b) for a, b in zip(found, wanted, strict=True)] == [True] * 4
