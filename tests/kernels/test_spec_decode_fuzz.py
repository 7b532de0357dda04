"""Thousands of malformed calls of drafting, trees, attention, verification and commit: an error or a sane result.

A malformed call spoils one or two arguments of a valid one: type, dtype, rank, size, strides, device, values. The
public functions may raise ValueError and BackendError only; the registered ops, which check little, any of Python's.
Neither may crash or hang. What comes back keeps what the contract says of every result, whatever the values were. A
spoiling that changes nothing (strides, storage) must change no bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import BackendError, dispatch
from m3kernels.checks import describe
from m3kernels.spec_decode import draft_topk, tree_attention, tree_budget, tree_commit, tree_finalize, tree_verify
from m3kernels.spec_decode.reference import make_inputs
from m3kernels.testing import bitwise_equal

CASES = 250  # in a round
ROOMS = ("spec_decode=cpu", "spec_decode=reference")
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64),
)
# No number is the size of a tensor that would fit the machine's memory and fill it.
NUMBERS = (0, 1, -1, 2, 3, 7, 40, 64, 1023, 2**62, 2**63 - 1, 2**63, 10**30, 10**400, -(2**63), 0.5, 1e-320, 1e300)
OBJECTS = (
    *(None, True, False, "", "raw", "chain", "greedy", float("nan"), float("inf"), -0.5, (), [], {}, (3, 4), 1j),
    *(object(), torch.float16, [torch.zeros(2)], torch.ones(3), torch.zeros(0), torch.tensor(1)),
)
NAN, INF = float("nan"), float("inf")

# -- valid calls ------------------------------------------------------------------------------------------------------
V, N = 40, 6
TREES = make_inputs(2, N, V)
LINKS = {name: TREES[name] for name in ("candidates", "next_token", "next_sibling")}
PARAMETERS = dict(
    temperature=torch.tensor([0.7, 0.0]), top_k=torch.tensor([20, 0], dtype=torch.int32),
    top_p=torch.tensor([0.9, 1.0]), min_p=torch.tensor([0.01, 0.0]), seed=torch.tensor([5, -9]),
    position=torch.tensor([11, 2**40]), grammar_bits=torch.full((2, N, 2), -2, dtype=torch.int32),
)  # fmt: skip
COINS = dict(coins=torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9, 0.99]] * 2), final_coins=torch.tensor([0.2, 0.95]))
CACHE = torch.linspace(-1, 1, 6 * 4 * 2 * 8).view(6, 4, 2, 8)
TABLE = torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=torch.int32)
SEQLENS = torch.tensor([9, 7], dtype=torch.int32)
EAGER = dict(mask_bits=torch.tensor([[1], [3], [1], [3], [5]], dtype=torch.int32), gate=torch.linspace(-2, 2, 20))
CANDIDATES = dict(
    scores=torch.tensor([[-0.1, -2.0, -1.0, -0.3, -2.5, -2.5, -3.0, -4.0, -5.0, -6.0, -7.0, -0.7]] * 2),
    tokens=torch.arange(24).view(2, 12), parent_list=torch.tensor([[-1, 0, 1, 2]] * 2),
)  # fmt: skip

Arguments = dict[str, Any]
DRAFT: Arguments = dict(
    logits=TREES["logits"][:, :3], scores=-torch.rand(2, 3), k=3, step=2, d2t=torch.arange(V) * 3,
    seed=PARAMETERS["seed"], position=PARAMETERS["position"],
)  # fmt: skip
FINALIZE: Arguments = dict(
    **CANDIDATES, bonus=torch.tensor([3, 4]), seq_lens=torch.tensor([7, 0]), topk=3, num_nodes=N,
    budget=torch.tensor([6, 3]),
)  # fmt: skip
ATTENTION: Arguments = dict(
    q=torch.linspace(-1, 1, 5 * 4 * 8).view(5, 4, 8), k_cache=CACHE, v_cache=CACHE.neg(), block_table=TABLE,
    cache_seqlens=SEQLENS, cu_seqlens_q=torch.tensor([0, 2, 5]), mask_bits=EAGER["mask_bits"],
    gate=EAGER["gate"].view(5, 4), softmax_scale=0.3, window=6,
)  # fmt: skip
INT8 = CACHE.mul(127).round().to(torch.int8)
SCALE = torch.linspace(1e-3, 2e-2, 6 * 4 * 2).view(6, 4, 2)
ATTENTION_INT8: Arguments = {
    **ATTENTION, "k_cache": INT8, "v_cache": INT8.neg(), "k_scale": SCALE, "v_scale": SCALE.flip(0),
    "tree_lens": torch.tensor([4, 3], dtype=torch.int32),
}  # fmt: skip
COMMIT: Arguments = dict(
    accept_index=torch.tensor([[0, 2, 4], [0, 3, -1]], dtype=torch.int32),
    accept_length=torch.tensor([2, 1], dtype=torch.int32), k_caches=[CACHE, CACHE + 1], v_caches=[CACHE + 2, CACHE],
    block_table=TABLE, cache_seqlens=SEQLENS - 4, hidden=torch.linspace(0, 1, 2 * N * 3).view(2, N, 3),
)  # fmt: skip


COMMIT_INT8: Arguments = {
    **COMMIT, "k_caches": [INT8, INT8.flip(0)], "v_caches": [INT8.neg(), INT8],
    "k_scales": [SCALE, SCALE + 1], "v_scales": [SCALE + 2, SCALE],
}  # fmt: skip


def copied(value: Any) -> Any:
    """A copy of a list of caches, strides and all: a commit writes into them."""
    if not isinstance(value, list):
        return value
    return [x.clone() if isinstance(x, Tensor) and x.layout == torch.strided else x for x in value]


def committed(**arguments: Any) -> tuple[Tensor, ...]:
    """A commit to copies of the caches: what it returns, and the caches."""
    arguments = {key: copied(value) for key, value in arguments.items()}
    seqlens, hidden = tree_commit(**arguments)
    written = (arguments.get(name, ()) for name in ("k_caches", "v_caches", "k_scales", "v_scales"))
    return seqlens, *([] if hidden is None else [hidden]), *(tensor for tensors in written for tensor in tensors)


CALLS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    "draft": (draft_topk, DRAFT),
    "draft_first": (draft_topk, dict(logits=TREES["logits"][:, :1].bfloat16(), scores=torch.zeros(2, 1), k=5, step=0)),
    "finalize": (tree_finalize, FINALIZE),
    "attention": (lambda **a: (tree_attention(**a),), ATTENTION),
    "attention_int8": (lambda **a: (tree_attention(**a),), ATTENTION_INT8),
    "attention_batched": (
        lambda **a: (tree_attention(**a),),
        dict(q=ATTENTION["q"][:4].view(2, 2, 4, 8).half(), k_cache=CACHE.bfloat16(), v_cache=CACHE.bfloat16(),
             block_table=TABLE.long(), cache_seqlens=SEQLENS, mask_bits=None, window=0, softmax_scale=None,
             gate=EAGER["gate"][:16].view(2, 2, 4)),
    ),
    "coupled": (tree_verify, dict(logits=TREES["logits"], **LINKS, **PARAMETERS, width=4, logprobs="sampling")),
    "target_only": (
        tree_verify,
        dict(logits=TREES["logits"].half(), **LINKS, **PARAMETERS, **COINS, mode="target_only", logprobs="raw"),
    ),
    "chain": (
        tree_verify,
        dict(logits=TREES["logits"], **LINKS, **PARAMETERS, **COINS, mode="chain", logprobs="sampling",
             draft_probs=TREES["logits"].softmax(-1)),
    ),
    "greedy": (tree_verify, dict(logits=TREES["logits"].bfloat16(), **LINKS, mode="greedy", logprobs="raw")),
    "commit": (committed, COMMIT),
    "commit_int8": (committed, COMMIT_INT8),
    "budget": (
        lambda **a: (tree_budget(**a),),
        dict(scores=CANDIDATES["scores"], cost_table=torch.linspace(1, 2, 20), num_experts=8, topk_experts=2,
             expert_cost=0.1),
    ),
}  # fmt: skip


# -- what every result keeps ------------------------------------------------------------------------------------------
def along(values: Tensor, used: Tensor) -> bool:
    """Whether values (B, S) ascend where used, a prefix of each row."""
    return not bool(((values.diff(dim=1) <= 0) & used[:, 1:]).any())


def check_drafts(a: Arguments, found: Any) -> None:
    _, frontier, vocabulary = a["logits"].shape
    flat = found.parents - (a["k"] + (a["step"] - 1) * a["k"] ** 2 if a["step"] else 0)
    assert bool(((flat >= 0) & (flat < frontier * a["k"])).all())
    assert torch.equal(found.src_row, (flat // a["k"]).int())
    assert torch.equal(found.next_ids, found.tokens.flatten(1).gather(1, flat))
    assert torch.equal(found.next_scores, found.cum_scores.flatten(1).gather(1, flat))
    assert not bool((found.next_scores.diff(dim=1) > 0).any() or (found.cum_scores.diff(dim=2) > 0).any())
    ids = torch.arange(vocabulary) + (0 if a.get("d2t") is None else a["d2t"])
    assert bool(torch.isin(found.tokens, ids).all())


def check_tree(a: Arguments, found: Any) -> None:
    nodes = found.candidates.shape[1]
    index = torch.arange(nodes)
    assert nodes == a["num_nodes"] and torch.equal(found.candidates[:, 0], a["bonus"].long())
    real = found.parents >= 0
    assert bool((found.parents < index).all()) and not bool(real[:, :1].any())
    bits = (found.mask_bits[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    ancestors = bits.flatten(2)[..., :nodes].bool()
    parents = ancestors.gather(1, found.parents.clamp(min=0).long()[..., None].expand_as(ancestors))
    assert torch.equal(ancestors, (parents & real[..., None]) | torch.eye(nodes, dtype=torch.bool))
    assert torch.equal(found.positions, ancestors.sum(-1) - 1 + a["seq_lens"][:, None])
    assert bool(((found.selected >= -1) & (found.selected < max(1, a["scores"].shape[1]))).all())
    assert along(found.selected, found.selected >= 0)
    for links in (found.next_token, found.next_sibling):
        assert bool(((links == -1) | ((links > index) & (links < nodes))).all())
    children = torch.cat([found.next_token, found.next_sibling], 1)
    assert int((children >= 0).sum()) == int(real.sum())


def check_verified(a: Arguments, found: Any) -> None:
    requests, nodes, vocabulary = a["logits"].shape
    width, length = found.tokens.shape[1], found.accept_length[:, None]
    slots = torch.arange(width)
    assert width == (nodes if a.get("width") is None else a["width"])
    assert bool(((length >= 0) & (length < min(width, nodes))).all())
    assert bool(((found.tokens >= -1) & (found.tokens < vocabulary)).all())
    assert bool((found.tokens.where(slots > length, -1) == -1).all())
    path = slots <= length
    assert bool((found.accept_index[:, 0] == 0).all()) and along(found.accept_index, path)
    assert bool((found.accept_index.where(~path, -1) == -1).all()) and bool((found.accept_index < nodes).all())
    taken = a["candidates"].gather(1, found.accept_index.clamp(min=0).long())
    assert torch.equal(taken[:, 1:].where(path[:, 1:], 0), found.tokens[:, :-1].where(path[:, 1:], 0))
    assert found.logprobs.shape == (requests, 0 if a.get("logprobs", "none") == "none" else width)
    assert not bool(found.logprobs.isnan().any() or (found.logprobs > 1e-6).any())


def check_committed(a: Arguments, found: Any) -> None:
    assert torch.equal(found[0], (a["cache_seqlens"] + a["accept_length"] + 1).int())


def check_attended(a: Arguments, found: Any) -> None:
    assert found[0].shape == a["q"].shape and found[0].dtype == a["q"].dtype


def check_budget(a: Arguments, found: Any) -> None:
    assert bool((found[0] >= 1).all()) and int(found[0].sum()) < len(a["cost_table"])
    assert bool((found[0] <= 1 + a["scores"].shape[1]).all())


CHECKS = {
    "draft": check_drafts, "draft_first": check_drafts, "finalize": check_tree, "attention": check_attended,
    "attention_batched": check_attended, "attention_int8": check_attended, "commit": check_committed,
    "commit_int8": check_committed, "budget": check_budget,
}  # fmt: skip


# -- spoilings --------------------------------------------------------------------------------------------------------
def same_values(r: random.Random, value: Any) -> Any:
    """The same tensor in other storage or with other strides."""
    if isinstance(value, list):
        return [r.choice((torch.cat((x, x))[: len(x)], x.transpose(0, 2).contiguous().transpose(0, 2))) for x in value]
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    choice = r.randrange(4)
    if choice == 0:
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    if choice == 1:
        return value.mT.contiguous().mT if value.ndim > 1 else value.clone()
    if choice == 2:
        return torch.cat((value[..., :1], value, value[..., :1]), -1)[..., 1:-1]
    return torch.cat((value, value))[: len(value)]


def spoil_values(r: random.Random, value: Tensor) -> Tensor:
    """A few elements become extreme."""
    value = value.detach().clone()
    plain = value.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)
    if not value.numel() or not plain or value.is_meta or value.layout != torch.strided:
        return value
    if value.is_floating_point():
        tiny, most = torch.finfo(value.dtype).tiny, torch.finfo(value.dtype).max
        extreme: float = r.choice((NAN, INF, -INF, 0.0, -0.0, -1.0, 1.0, 3.0, tiny, most, -most))
    else:
        info = torch.iinfo(value.dtype)
        extreme = r.choice((info.min, info.max, info.max // 2, 0, -1, -2, 1, 2, 3, 4, 5, 6, 12, V - 1, V, 99, 1 << 20))
    if r.random() < 0.2:
        return value.fill_(extreme)
    flat = value.view(-1)
    for _ in range(r.randint(1, 3)):
        flat[r.randrange(len(flat))] = extreme
    return value


def spoil_tensor(r: random.Random, value: Tensor) -> Any:
    choice = r.randrange(14)
    dim = r.randrange(value.ndim) if value.ndim else 0
    if choice == 0:
        return value.detach().to(r.choice(DTYPES))
    if choice == 1 and value.ndim:
        return value.narrow(dim, 0, r.choice((0, 1, max(0, value.shape[dim] - 1))))
    if choice == 2 and value.ndim:
        return torch.cat((value, value), dim)
    if choice == 3:
        return value[None]
    if choice == 4 and value.ndim:
        return value.select(dim, 0) if value.shape[dim] else value
    if choice == 5:
        return value.mT if value.ndim > 1 else value.view(-1, 1)
    if choice == 6:
        return value.to("meta")
    if choice == 7 and value.layout == torch.strided and not value.is_meta:
        return value.detach().to_sparse()
    if choice == 8 and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    if choice == 9 and value.ndim:
        return value[..., :1].expand(value.shape)
    return spoil_values(r, value)


def spoil(r: random.Random, value: Any) -> Any:
    if r.random() < 0.08:
        return r.choice(OBJECTS)
    if r.random() < 0.05:
        return r.choice(NUMBERS)
    if isinstance(value, list) and value:
        choice = r.randrange(4)
        if choice == 0:
            return value[: r.randrange(len(value))]
        if choice == 1:
            return value + value
        at = r.randrange(len(value))
        return [*value[:at], spoil(r, value[at]), *value[at + 1 :]]
    if isinstance(value, Tensor):
        return spoil_tensor(r, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return r.choice((*NUMBERS, value + 1, value - 1, float(value), str(value), torch.tensor(value)))
    return r.choice((*OBJECTS, "coupled", "target_only", "sampling", "none"))


# -- malformed calls --------------------------------------------------------------------------------------------------
SERVED = [(name, room) for name in CALLS for room in ROOMS if name != "budget" or room != ROOMS[0]]
ROUNDS = [pytest.param(name, room, 0, id=f"{name}-{room}") for name, room in SERVED]
ROUNDS += [
    pytest.param(*call, n, id=f"{'-'.join(call)}-{n}", marks=pytest.mark.slow) for call in SERVED for n in range(1, 21)
]
every_call = pytest.mark.parametrize(("name", "backend"), SERVED, indirect=["backend"])


def check(name: str, arguments: Arguments, found: Any) -> None:
    CHECKS.get(name, check_verified)(arguments, found)


@every_call
def test_the_valid_call_is_valid(name: str, backend: str) -> None:
    function, arguments = CALLS[name]
    check(name, arguments, function(**arguments))


@pytest.mark.parametrize(("name", "backend", "seed"), ROUNDS, indirect=["backend"])
def test_malformed_calls(name: str, backend: str, seed: int) -> None:
    function, arguments = CALLS[name]
    r = random.Random(f"{name} {seed}")
    expected, refused = function(**arguments), 0
    for case in range(CASES):
        harmless = r.random() < 0.1
        changed = dict(arguments)
        for key in r.sample(list(arguments), r.choice((1, 1, 1, 2))):
            changed[key] = same_values(r, changed[key]) if harmless else spoil(r, changed[key])
        what = {key: describe(value) for key, value in changed.items() if value is not arguments[key]}
        where = f"seed {seed}, case {case}: {name} with {what}"
        try:
            found = function(**changed)
        except (ValueError, BackendError):
            refused += 1
            assert not harmless, where
            continue
        except Exception as error:
            raise AssertionError(f"{where} raised {type(error).__name__}: {error}") from error
        try:
            check(name, changed, found)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
        if harmless:
            assert all(bitwise_equal(x, y) for x, y in zip(found, expected, strict=True)), where
    assert CASES * 0.3 < refused < CASES * 0.9


# -- two rooms --------------------------------------------------------------------------------------------------------
def outcome(function: Callable[..., Any], arguments: Arguments) -> list[Tensor] | None:
    """Tensors of the result; None if the call is refused."""
    try:
        return [x for x in function(**arguments) if x is not None]
    except (ValueError, BackendError):
        return None


AGREE = [name for name in CALLS if name != "budget" and "attention" not in name]  # attention overflows in fp32


@pytest.mark.parametrize("name", AGREE)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 11))])
def test_rooms_agree_on_malformed_calls(monkeypatch: pytest.MonkeyPatch, name: str, seed: int) -> None:
    """Refused by both or by none; the same integers; scores and log-probabilities within fp32 rounding."""
    function, arguments = CALLS[name]
    r = random.Random(f"{name} agree {seed}")
    changes = []
    for _ in range(CASES):
        keys = r.sample(list(arguments), r.choice((1, 1, 1, 2)))
        changes.append({key: spoil(r, arguments[key]) for key in keys})
    found = {}
    for room in ROOMS:
        monkeypatch.setenv("M3KERNELS_BACKEND", room)
        dispatch.rooms.cache_clear()
        found[room] = [outcome(function, {**arguments, **change}) for change in changes]
    dispatch.rooms.cache_clear()
    compared = 2 if name == "draft" else None  # with noise, rounding decides which of two equal paths comes first
    for change, ours, expected in zip(changes, *found.values(), strict=True):
        where = f"seed {seed}: {name} with { ({key: describe(x) for key, x in change.items()}) }"
        assert (ours is None) == (expected is None), where
        torch.testing.assert_close(
            (ours or [])[:compared], (expected or [])[:compared], rtol=1e-5, atol=3e-6, equal_nan=True,
            msg=lambda text, where=where: f"{where}\n{text}",
        )  # fmt: skip


# -- registered ops ---------------------------------------------------------------------------------------------------
NO_EXTRAS = dict(top_k=None, top_p=None, min_p=None, draft_probs=None, grammar_bits=None)
FLAT: dict[str, Arguments] = {
    "draft_topk": DRAFT,
    "tree_finalize": {**FINALIZE, "budget": FINALIZE["budget"].int()},
    "tree_attention": {**ATTENTION, "cu_seqlens_q": ATTENTION["cu_seqlens_q"].int()},
    "tree_attention int8": {**ATTENTION_INT8, "cu_seqlens_q": ATTENTION["cu_seqlens_q"].int()},
    "tree_verify": dict(
        logits=TREES["logits"], **LINKS, **PARAMETERS, coins=COINS["coins"].double(), draft_probs=TREES["logits"],
        final_coins=COINS["final_coins"].double(), mode="target_only", width=4, logprobs="raw",
    ),
    "tree_commit": COMMIT,
}  # fmt: skip
# What torch, the schema of an op and the border raise; whatever else comes is no answer to a malformed call.
PYTHONIC = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, SyntaxError, AssertionError, ArithmeticError),
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on what the reference converts
@pytest.mark.parametrize("backend", ROOMS, indirect=True)
@pytest.mark.parametrize("name", FLAT)
def test_malformed_calls_of_registered_ops(backend: str, name: str) -> None:
    op, arguments = getattr(torch.ops.m3kernels, name.partition(" ")[0]).default, FLAT[name]
    r = random.Random(name)
    raised = 0
    for _ in range(CASES):
        changed = {key: copied(value) for key, value in arguments.items()}
        for key in r.sample(list(arguments), r.choice((1, 1, 2))):
            changed[key] = spoil(r, changed[key])
        try:
            op(**changed)
        except PYTHONIC:
            raised += 1
    assert CASES * 0.2 < raised < CASES * 0.95
