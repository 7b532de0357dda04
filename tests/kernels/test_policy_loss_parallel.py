"""linear_logprobs over the vocabulary of several processes: values and gradients equal those of the whole head.

Processes are spawned once, with gloo; each runs every case that has a shard for it and writes what it found to a file.
The yardstick is plain torch on the whole head, in fp64 and in the dtype of the case.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m3kernels.policy_loss import LossSpec, linear_logprobs, policy_loss_from_logprobs
from m3kernels.policy_loss.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error

ROWS, SIZE = 11, 6
OUTPUTS = ("logprobs", "lse", "entropy", "sum_sq")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")


# -- cases ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A head split into shards, one a process, and what is asked of it."""

    shards: tuple[int, ...]  # rows of each process
    ids: int | None = None  # K of each token; None: (T,)
    rows: int = ROWS
    dtype: torch.dtype = torch.float32
    bias: bool = False
    padding: bool = False  # the last shard has a bias of -inf: rows that are no words
    temperature: str = "1"  # "each": one for each token
    softcap: float = 0.0
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = OUTPUTS  # those that the loss reads
    save_logits: bool | str = "auto"
    workspace_bytes: int | None = None

    @property
    def given_start(self) -> bool:
        """Shards of one size need no vocab_start."""
        return len(set(self.shards)) > 1


CASES = {
    "two": Case(shards=(20, 20)),
    "three": Case(shards=(17, 17, 17)),
    "unequal_two": Case(shards=(5, 31)),
    "unequal_three": Case(shards=(23, 1, 40), bias=True),
    "ids": Case(shards=(20, 20), ids=3),
    "ids_unequal": Case(shards=(2, 9, 30), ids=5, bias=True, temperature="each"),
    "temperature": Case(shards=(17, 17, 17), temperature="0.6"),
    "temperatures": Case(shards=(20, 20), temperature="each"),
    "softcap": Case(shards=(17, 17, 17), softcap=1.5, logit_scale=2.0),
    "everything": Case(shards=(9, 30, 14), ids=2, bias=True, temperature="each", softcap=3.0, logit_scale=-1.3),
    "saved": Case(shards=(20, 20), save_logits=True, bias=True, softcap=2.0),
    "not_saved": Case(shards=(20, 20), save_logits=False, bias=True, softcap=2.0),
    "not_saved_three": Case(shards=(9, 30, 14), ids=2, save_logits=False, temperature="each"),
    "small_workspace": Case(shards=(17, 17, 17), workspace_bytes=64),
    "several_tiles": Case(shards=(8193, 70), ids=2),
    "one_row_each": Case(shards=(1, 1, 1)),
    "one_token": Case(shards=(20, 20), rows=1),
    "no_tokens": Case(shards=(20, 20), rows=0, ids=2),
    "logprobs_only": Case(shards=(5, 31), outputs=("logprobs",), bias=True),
    "entropy_only": Case(shards=(17, 17, 17), outputs=("entropy",)),
    "a_shard_without_probability": Case(shards=(17, 17, 17), logit_scale=60.0),
    "a_shard_of_padding": Case(shards=(20, 20), bias=True, padding=True),
    "fp64": Case(shards=(9, 30, 14), ids=2, dtype=torch.float64, bias=True, softcap=3.0),
    "bf16": Case(shards=(20, 20), dtype=torch.bfloat16, bias=True),
    "fp16": Case(shards=(17, 17, 17), dtype=torch.float16),
}


def inputs(case: Case) -> dict[str, Any]:
    """hidden, weight, bias, ids, temperature of a case, and a factor for each output, the same in every process."""
    g = torch.Generator().manual_seed(3)
    vocabulary = sum(case.shards)
    hidden = torch.randn(case.rows, SIZE, generator=g).to(case.dtype)
    weight = (torch.randn(vocabulary, SIZE, generator=g) * 0.8).to(case.dtype)
    bias = torch.randn(vocabulary, generator=g).to(case.dtype) if case.bias else None
    words = vocabulary
    if case.padding and bias is not None:
        words -= case.shards[-1]
        bias[words:] = -torch.inf
    shape = (case.rows,) if case.ids is None else (case.rows, case.ids)
    ids = torch.randint(0, words, shape, generator=g)
    temperature: Any = torch.linspace(0.5, 2.0, max(case.rows, 1))[: case.rows].to(torch.float64)
    factors = [torch.randn(shape if name == "logprobs" else (case.rows,), generator=g) for name in OUTPUTS]
    if case.temperature != "each":
        temperature = float(case.temperature)
    return dict(hidden=hidden, weight=weight, bias=bias, ids=ids, temperature=temperature, factors=factors)


def loss_of(case: Case, found: tuple[Tensor | None, ...], factors: list[Tensor]) -> Tensor:
    parts = zip(OUTPUTS, found, factors, strict=True)
    return sum((x * factor).sum() for name, x, factor in parts if name in case.outputs and x is not None)  # type: ignore[return-value]


# -- the processes ----------------------------------------------------------------------------------------------------
def run_shard(case: Case, rank: int, group: dist.ProcessGroup) -> dict[str, Tensor | None]:
    """Outputs of a case on one process, gradients of hidden and of its rows of the head."""
    x, start = inputs(case), sum(case.shards[:rank])
    rows = slice(start, start + case.shards[rank])
    hidden = x["hidden"].requires_grad_()
    weight = x["weight"][rows].clone().requires_grad_()
    bias = None if x["bias"] is None else x["bias"][rows].clone().requires_grad_()
    found = linear_logprobs(
        hidden,
        weight,
        x["ids"],
        bias=bias,
        temperature=x["temperature"],
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        entropy="entropy" in case.outputs,
        sum_sq="sum_sq" in case.outputs,
        save_logits=case.save_logits,
        workspace_bytes=case.workspace_bytes,
        process_group=group,
        vocab_start=start if case.given_start else None,
    )
    loss_of(case, found, x["factors"]).backward()
    result = {name: None if value is None else value.detach() for name, value in found._asdict().items()}
    return {**result, "hidden": hidden.grad, "weight": weight.grad, "bias": None if bias is None else bias.grad}


def run_policy_loss(rank: int, group: dist.ProcessGroup) -> dict[str, Tensor | None]:
    """Loss and gradients of the two-phase path: log-probabilities over the shards, then a loss of them."""
    case = CASES["two"]
    x, start = inputs(case), sum(case.shards[:rank])
    hidden = x["hidden"].requires_grad_()
    weight = x["weight"][start : start + case.shards[rank]].clone().requires_grad_()
    found = linear_logprobs(hidden, weight, x["ids"], entropy=True, process_group=group)
    loss, _ = policy_loss_from_logprobs(found.logprobs, entropy=found.entropy, **policy_arguments(x))
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def policy_arguments(x: dict[str, Any]) -> dict[str, Any]:
    advantages, old = x["factors"][1], -x["factors"][2].abs() - 1
    spec = LossSpec(ratio_level="step", entropy_coef=0.1, clip_low=0.5, clip_high=2.0)
    return dict(advantages=advantages, old_logprobs=old, mask=torch.arange(len(old)) % 4 != 1, spec=spec)


def work(rank: int, world: int, folder: str) -> None:
    """One process: run every case that has a shard for it."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    groups = {world: dist.group.WORLD, world - 1: dist.new_group(list(range(world - 1)))}
    found = {
        name: run_shard(case, rank, groups[len(case.shards)])  # type: ignore[arg-type]
        for name, case in CASES.items()
        if rank < len(case.shards)
    }
    if rank < world - 1:
        found["policy_loss"] = run_policy_loss(rank, groups[world - 1])  # type: ignore[arg-type]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor | None]]]:
    """What each process found: case -> name -> tensor."""
    folder = tmp_path_factory.mktemp("processes")
    world = max(len(case.shards) for case in CASES.values())
    torch.multiprocessing.spawn(work, args=(world, str(folder)), nprocs=world)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


# -- the whole head ---------------------------------------------------------------------------------------------------
def whole(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of the whole head in plain torch, products in dtype."""
    x = inputs(case)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x["hidden"], x["weight"], x["bias"])]
    z = F.linear(*leaves) * case.logit_scale  # type: ignore[arg-type]
    z = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
    temperature = x["temperature"]
    z = z.to(wide) / (temperature[:, None].to(wide) if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    terms = logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)
    picked = logp.gather(1, x["ids"].reshape(case.rows, case.ids or 1)).view(x["ids"].shape)
    found = (picked, z.logsumexp(-1), -terms.sum(-1), logp.exp().square().sum(-1))
    loss_of(case, found, x["factors"]).backward()
    values = {name: value.detach() for name, value in zip(OUTPUTS, found, strict=True)}
    grads = {name: t.grad for name, t in zip(("hidden", "weight", "bias"), leaves, strict=True) if t is not None}
    return {**values, **grads}  # type: ignore[dict-item]


def shards(processes: list[Any], name: str) -> list[dict[str, Tensor]]:
    return [found[name] for found in processes[: len(CASES[name].shards)]]


def check(actual: Tensor, name: str, key: str) -> None:
    """The error rule against the whole head."""
    case = CASES[name]
    assert not actual.isnan().any()
    check_error(actual, whole(case, torch.float64)[key], whole(case, case.dtype)[key], TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_whole_head(processes, name):
    first, *others = shards(processes, name)
    for key in CASES[name].outputs:
        check(first[key], name, key)
        assert all(bitwise_equal(first[key], other[key]) for other in others)


@pytest.mark.parametrize("name", CASES)
def test_every_process_has_the_whole_gradient_of_hidden(processes, name):
    first, *others = shards(processes, name)
    check(first["hidden"], name, "hidden")
    assert all(bitwise_equal(first["hidden"], other["hidden"]) for other in others)


@pytest.mark.parametrize("name", CASES)
def test_every_process_has_the_gradient_of_its_rows(processes, name):
    found = shards(processes, name)
    assert [len(shard["weight"]) for shard in found] == list(CASES[name].shards)
    check(torch.cat([shard["weight"] for shard in found]), name, "weight")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bias])
def test_every_process_has_the_gradient_of_its_bias(processes, name):
    check(torch.cat([shard["bias"] for shard in shards(processes, name)]), name, "bias")


@pytest.mark.parametrize("name", CASES)
def test_outputs_that_nobody_asked_for_are_none(processes, name):
    unasked = {"entropy", "sum_sq"} - set(CASES[name].outputs)
    assert all(shard[key] is None for shard in shards(processes, name) for key in unasked)


def test_logprobs_are_never_above_zero(processes):
    values = torch.cat([shard["logprobs"].double().flatten() for name in CASES for shard in shards(processes, name)])
    assert len(values) > 500 and values.max() <= 0


def test_saving_logits_changes_nothing_but_the_work(processes):
    for key in (*OUTPUTS, "hidden", "weight", "bias"):
        saved, formed = ([shard[key] for shard in shards(processes, name)] for name in ("saved", "not_saved"))
        torch.testing.assert_close(saved, formed, rtol=2e-6, atol=2e-6)


def test_a_policy_loss_over_the_shards_is_the_one_pass_loss(processes):
    x = inputs(CASES["two"])
    leaves = [x[key].double().requires_grad_() for key in ("hidden", "weight")]
    logp = (leaves[0] @ leaves[1].T).log_softmax(-1)
    picked, entropy = logp.gather(1, x["ids"][:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    loss, _ = policy_loss_from_logprobs(picked, entropy=entropy, **policy_arguments(x))
    loss.backward()
    found = [process["policy_loss"] for process in processes[:2]]
    expected = [loss.detach(), leaves[0].grad, leaves[1].grad]
    actual = [found[0]["loss"], found[1]["hidden"], torch.cat([shard["weight"] for shard in found])]
    torch.testing.assert_close([x.double() for x in actual], expected, rtol=2e-5, atol=2e-6)
