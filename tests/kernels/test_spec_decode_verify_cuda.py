"""tree_verify of the CUDA room: on a GPU, or on the emulated device, token for token against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import reference
from m3kernels.spec_decode.reference import make_inputs
from m3kernels.testing import surrounded_by_nan, uninitialized_is_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
Verify = Callable[..., tuple[Tensor, ...]]

# Capability, blocks of a request (0: chosen), seed of the orders that a device leaves open.
DEVICES = {"one_block": (80, 0, 1), "chosen": (90, 0, 2), "cluster_of_4": (90, 4, 3), "cluster_of_16": (90, 16, 4)}
each_device = pytest.mark.parametrize("verify", DEVICES, indirect=True)
two_devices = pytest.mark.parametrize("verify", ("one_block", "cluster_of_4"), indirect=True)
MODES = ("greedy", "target_only", "chain", "coupled")


@pytest.fixture
def verify(request: pytest.FixtureRequest, cuda_module: None, monkeypatch: pytest.MonkeyPatch) -> Verify:
    """The room's function on tensors of any place; results come back to the CPU."""
    from m3kernels.spec_decode import _cuda

    capability, ranks, seed = DEVICES[request.param]
    if DEVICE == "cpu":
        import emulated_cuda

        emulated_cuda.configure(capability, 8, seed)
    monkeypatch.setattr(_cuda, "RANKS", ranks)

    def call(**arguments: Any) -> tuple[Tensor, ...]:
        given = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        with uninitialized_is_nan():
            return tuple(value.cpu() for value in _cuda.tree_verify(**given))

    return call


def inputs(
    mode: str,
    *,
    requests: int = 3,
    nodes: int = 8,
    vocabulary: int = 517,
    width: int = 4,
    filters: bool = False,
    coins: bool = False,
    grammar: bool = False,
    logprobs: str = "none",
    sharpness: float = 1.5,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The last request is greedy."""
    tree = make_inputs(requests, nodes, vocabulary, sharpness=sharpness, dtype=dtype)
    ks = torch.tensor([0, 7, vocabulary // 2, 3])[:requests].int()
    temperature = torch.full((requests,), 0.8)
    temperature[-1] = 0.0
    return {
        **{name: tree[name] for name in ("logits", "candidates", "next_token", "next_sibling")},
        "temperature": temperature,
        "top_k": ks if filters else None,
        "top_p": torch.tensor([0.9, 1.0, 0.6, 0.5])[:requests] if filters else None,
        "min_p": torch.tensor([0.05, 0.0, 0.2, 0.1])[:requests] if filters else None,
        "seed": torch.arange(requests) * 7919 - 1,
        "position": torch.arange(requests) * 2**33 + 5,
        "coins": torch.rand(requests, nodes).double() if coins else None,
        "final_coins": torch.rand(requests).double() if coins else None,
        "draft_probs": torch.randn(requests, nodes, vocabulary).softmax(-1) if mode == "chain" else None,
        "grammar_bits": torch.randint(-(2**31), 2**31, (requests, nodes, -(-vocabulary // 32))).int()
        if grammar
        else None,
        "mode": mode,
        "width": width,
        "logprobs": logprobs,
    }


def check(verify: Verify, call: dict[str, Any]) -> None:
    got, wanted = verify(**call), reference.tree_verify(**call)
    for ours, truth in zip(got[:3], wanted[:3], strict=True):
        assert torch.equal(ours, truth)
    torch.testing.assert_close(got[3], wanted[3], rtol=0, atol=2e-6)


CASES: dict[str, dict[str, Any]] = {
    "noise": dict(logprobs="sampling"),
    "coins": dict(coins=True, width=3, dtype=torch.bfloat16),
    "filters": dict(filters=True, logprobs="sampling"),
    "filters_fp16": dict(filters=True, coins=True, requests=2, vocabulary=776, dtype=torch.float16, logprobs="raw"),
    "grammar": dict(grammar=True, dtype=torch.float16, logprobs="raw", requests=2),
}


@two_devices
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_reference(verify: Verify, mode: str, case: str) -> None:
    check(verify, inputs(mode, **CASES[case]))


@two_devices
@pytest.mark.parametrize("mode", ("target_only", "chain", "coupled"))
def test_flat_rows_whose_kept_tokens_fill_no_list(verify: Verify, mode: str) -> None:
    call = inputs(
        mode, requests=2, nodes=2, vocabulary=2563, width=1, sharpness=0.1, filters=True, dtype=torch.bfloat16
    )
    call["temperature"].fill_(1.0)
    call["top_k"] = torch.tensor([2400, 0]).int()
    call["min_p"] = None
    check(verify, call)


@two_devices
@pytest.mark.parametrize("mode", ("target_only", "chain", "coupled"))
def test_ties_and_logits_of_every_kind(verify: Verify, mode: str) -> None:
    call = inputs(mode, vocabulary=300, filters=True, coins=True)
    call["logits"] = call["logits"].round()
    call["logits"][:, :, 3] = torch.nan
    call["logits"][:, :, 5] = -torch.inf
    call["logits"][0, :, 6] = torch.finfo(torch.float32).min
    call["logits"][1, :, 7] = torch.inf
    check(verify, call)


@two_devices
@pytest.mark.parametrize("mode", ("greedy", "target_only", "coupled"))
def test_rows_that_allow_nothing(verify: Verify, mode: str) -> None:
    call = inputs(mode, coins=True, logprobs="raw", vocabulary=40)
    call["logits"][0, 0] = -torch.inf
    call["logits"][1] = torch.nan
    check(verify, call)


@two_devices
def test_fewer_tokens_than_top_k(verify: Verify) -> None:
    call = inputs("coupled", filters=True, logprobs="sampling")
    call["logits"][..., 4:] = -torch.inf
    call["temperature"].fill_(1.0)
    check(verify, call)


@two_devices
@pytest.mark.parametrize("filters", (False, True))
def test_siblings_that_are_alike_and_tokens_of_nothing(verify: Verify, filters: bool) -> None:
    call = inputs("target_only", requests=4, coins=True, filters=filters)
    call["candidates"][:, 2:5] = call["candidates"][:, 1:2]
    call["candidates"][:, 6] = -1
    call["candidates"][:, 7] = 2**40
    check(verify, call)


@two_devices
@pytest.mark.parametrize("u", (0.0, 1 - 2.0**-53))
@pytest.mark.parametrize("mode", ("target_only", "chain"))
def test_ends_of_the_coins(verify: Verify, mode: str, u: float) -> None:
    call = inputs(mode, coins=True, requests=2, vocabulary=40)
    call["coins"].fill_(u)
    call["final_coins"].fill_(u)
    check(verify, call)


@two_devices
@pytest.mark.parametrize("filters", (False, True))
def test_children_that_have_all_the_mass(verify: Verify, filters: bool) -> None:
    call = inputs("target_only", requests=2, coins=True, filters=filters, logprobs="sampling")
    call["temperature"].fill_(1.0)
    call["logits"].fill_(-torch.inf)
    call["logits"].scatter_(2, call["candidates"].roll(-1, 1)[..., None], 0.0)
    call["coins"].fill_(1 - 2.0**-53)
    check(verify, call)


@two_devices
def test_a_root_with_more_children_than_a_warp_has_lanes(verify: Verify) -> None:
    call = inputs("target_only", requests=2, nodes=70, vocabulary=90, coins=True, width=2)
    call["temperature"].fill_(5.0)
    call["next_token"].fill_(-1)
    call["next_token"][:, 0] = 1
    call["next_sibling"] = torch.arange(1, 71).expand(2, 70).where(torch.arange(70) < 69, -1).contiguous()
    call["next_sibling"][:, 0] = -1
    call["candidates"][:, 1:] = torch.arange(69) + 3
    call["coins"][:, 0] = torch.tensor([0.6, 0.999])
    check(verify, call)


@two_devices
def test_children_leave_their_segment_before_it_is_searched(verify: Verify) -> None:
    call = inputs("target_only", requests=3, nodes=70, vocabulary=1100, coins=True, width=2)
    call["temperature"].fill_(5.0)
    call["next_token"].fill_(-1)
    call["next_token"][:, 0] = 1
    call["next_sibling"] = torch.arange(1, 71).expand(3, 70).where(torch.arange(70) < 69, -1).contiguous()
    call["candidates"][:, 1:] = torch.arange(69) + 3
    call["coins"].fill_(0.999)
    check(verify, call)


@two_devices
def test_a_list_that_overflows(verify: Verify) -> None:
    call = inputs("coupled", requests=2, nodes=2, vocabulary=7001, width=1, filters=True, dtype=torch.bfloat16)
    call["logits"].fill_(1.0)
    call["temperature"].fill_(1.0)
    check(verify, call)


@two_devices
@pytest.mark.parametrize("mode", ("greedy", "coupled"))
def test_the_first_of_the_largest(verify: Verify, mode: str) -> None:
    call = inputs(mode, requests=3)
    call["logits"].clamp_(max=0.5)
    call["temperature"].fill_(0.0)
    check(verify, call)


@each_device
def test_every_team(verify: Verify) -> None:
    check(verify, inputs("coupled", filters=True, requests=2, logprobs="sampling"))


@pytest.mark.parametrize("verify", ("one_block",), indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_a_vocabulary_of_one_token(verify: Verify, mode: str) -> None:
    check(verify, inputs(mode, vocabulary=1, nodes=1, width=1, logprobs="sampling"))


@two_devices
def test_no_link_leads_back(verify: Verify) -> None:
    call = inputs("greedy", requests=4, vocabulary=40)
    for b, node in enumerate((0, -5, 2**40, 99)):
        call["next_token"][b].fill_(node)
        call["next_sibling"][b].fill_(node)
    call["logits"][..., 7] = 50.0
    call["candidates"].fill_(7)
    _, accept_index, accept_length, _ = verify(**call)
    assert accept_length.tolist() == [0, 0, 0, 0]
    assert accept_index[:, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("verify", ("one_block",), indirect=True)
def test_no_link_leads_out_of_the_tree(verify: Verify) -> None:
    call = inputs("coupled", requests=4, vocabulary=4, filters=True)
    call["temperature"].fill_(1.0)
    call["logits"].fill_(0.0)
    call["top_k"] = None
    call["top_p"].fill_(0.9)
    call["candidates"].fill_(-1)
    for node in range(9, 100, 2):
        call["next_token"].fill_(node)
        assert not verify(**call)[2].any()


@two_devices
@pytest.mark.parametrize("mode", ("greedy", "target_only", "coupled"))
def test_tokens_beyond_the_vocabulary_are_no_others(verify: Verify, mode: str) -> None:
    call = inputs(mode, requests=2, vocabulary=40)
    call["logits"][..., 7] = 50.0
    call["candidates"].fill_(7 + 2**32)
    assert not verify(**call)[2].any()


@two_devices
@pytest.mark.parametrize("mode", MODES)
def test_parameters_of_nonsense_are_survived(verify: Verify, mode: str) -> None:
    call = inputs(mode, requests=4, vocabulary=300, filters=True, coins=True)
    call["temperature"] = torch.tensor([-1.0, torch.nan, 1e-30, torch.inf])
    call["top_k"] = torch.tensor([-5, 2**31 - 1, 1, 0]).int()
    call["top_p"] = torch.tensor([torch.nan, -1.0, 0.0, 1e-30])
    call["min_p"] = torch.tensor([7.0, torch.nan, -1.0, 1.0])
    call["coins"][:] = torch.tensor([torch.nan, -1.0, 5.0, torch.inf]).double()[:, None]
    call["final_coins"] = torch.tensor([torch.nan, -1.0, 5.0, torch.inf]).double()
    tokens, accept_index, accept_length, _ = verify(**call)
    assert bool(((tokens >= -1) & (tokens < 300)).all())
    assert bool(((accept_index >= -1) & (accept_index < 8)).all())
    assert bool(((accept_length >= 0) & (accept_length < 4)).all())


@two_devices
@pytest.mark.parametrize("mode", ("coupled", "target_only"))
def test_rows_of_the_path_are_all_that_is_read(verify: Verify, mode: str) -> None:
    call = inputs(mode, requests=2, vocabulary=300, filters=True)
    wanted = verify(**call)
    visited = torch.zeros(2, 8, dtype=torch.bool)
    for b in range(2):
        visited[b, wanted[1][b][wanted[1][b] >= 0].long()] = True
    call["logits"][~visited] = torch.nan
    strided = torch.full((8, 2, 331), torch.nan)
    strided[..., :300] = call["logits"].transpose(0, 1)
    call["logits"] = strided.transpose(0, 1)[..., :300]
    got = verify(**call)
    assert all(torch.equal(ours, truth) for ours, truth in zip(got[:3], wanted[:3], strict=True))


@two_devices
def test_nothing_beside_a_row_counts(verify: Verify) -> None:
    call = inputs("target_only", requests=2, vocabulary=261, dtype=torch.bfloat16)
    wanted = verify(**call)
    call["logits"] = surrounded_by_nan(call["logits"].nan_to_num())
    assert all(torch.equal(ours, truth) for ours, truth in zip(verify(**call)[:3], wanted[:3], strict=True))


@pytest.mark.parametrize("mode", ("coupled", "target_only", "chain"))
def test_results_do_not_depend_on_the_team(mode: str, cuda_module: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3kernels.spec_decode import _cuda

    call = inputs(mode, requests=2, vocabulary=1100, width=2, sharpness=0.4, filters=True, logprobs="sampling")
    given = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.items()}
    monkeypatch.setattr(_cuda, "RANKS", 1)
    wanted = _cuda.tree_verify(**given)
    for ranks in (2, 8):
        monkeypatch.setattr(_cuda, "RANKS", ranks)
        got = _cuda.tree_verify(**given)
        assert all(torch.equal(ours, truth) for ours, truth in zip(got, wanted, strict=True))


def test_no_requests(cuda_module: None) -> None:
    from m3kernels.spec_decode import _cuda

    call = inputs("greedy", requests=2, vocabulary=40)
    given = [value[:0].to(DEVICE) if isinstance(value, Tensor) else value for value in call.values()]
    assert [len(value) for value in _cuda.tree_verify(*given)] == [0, 0, 0, 0]


def test_what_the_border_refuses(cuda_module: None) -> None:
    from m3kernels.spec_decode import _cuda

    call = inputs("coupled", requests=2, vocabulary=40)
    given = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.items()}
    with pytest.raises(ValueError, match="tree_verify: candidates: want 16 elements; got 7"):
        _cuda.tree_verify(**(given | {"candidates": given["candidates"][0, :7].contiguous()}))
    with pytest.raises(ValueError, match="tree_verify: seed: want seed and position"):
        _cuda.tree_verify(**(given | {"position": None}))
    with pytest.raises(ValueError, match="tree_verify: grammar_bits: want"):
        _cuda.tree_verify(**(given | {"grammar_bits": torch.zeros(2, 8, 1, dtype=torch.int32, device=DEVICE)}))
    assert "at most 1048576" in _cuda.unsupported("tree_verify", torch.empty(1, 1, 2**20 + 1))
