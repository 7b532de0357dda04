"""Every instruction set that runs here: tree_verify and draft_topk decide as the reference, and as each other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.spec_decode import _cpu, reference
from m3kernels.testing import bitwise_equal
from tests.kernels.spec_decode_rows_cases import DRAFTS, FILTERS, MODES, ROWS, drafting, verification

ISAS = ("avx512", "avx2", "neon", "scalar")  # those with kernels of rows of their own
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=[name for name in ISAS if name in _cpu_ext.build_info()["isas"]])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, in use for the test."""
    if request.param not in _cpu_ext.isas():
        pytest.skip(f"this CPU does not run {request.param}")
    before = _cpu_ext.get_isa()
    _cpu_ext.set_isa(request.param)
    yield request.param
    _cpu_ext.set_isa(before)


@functools.cache
def verified(mode: str, filters: str, rows: str, **more: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """Arguments of tree_verify and what the reference says, once for all instruction sets."""
    args = verification(mode, FILTERS[filters], **{**ROWS[rows], **more})
    return args, reference.tree_verify(*args)


def check(args: list[Any], expected: tuple[Tensor, ...]) -> None:
    found = _cpu.tree_verify(*args)
    assert all(map(bitwise_equal, found[:3], expected[:3]))
    torch.testing.assert_close(found[3], expected[3], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("mode", MODES)
def test_filters_decide_as_the_reference(isa: str, mode: str, filters: str) -> None:
    check(*verified(mode, filters, "blocks_and_part", logprobs="sampling"))


@pytest.mark.parametrize("rows", ["odd", "flat", "ties", "nan", "infinite", "lowest"])
@pytest.mark.parametrize("mode", ["target_only", "coupled"])
def test_rows_decide_as_the_reference(isa: str, mode: str, rows: str) -> None:
    check(*verified(mode, "plain", rows, logprobs="raw"))


@pytest.mark.parametrize("grammar", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("mode", ["target_only", "chain"])
def test_every_type_of_row_decides_as_the_reference(isa: str, mode: str, name: str, grammar: bool) -> None:
    check(*verified(mode, "top_p", "block_and_part", dtype=TYPES[name], grammar=grammar, logprobs="raw"))


def test_half_precision_numbers_are_read(isa: str) -> None:
    """A third of all fp16 words, subnormals and nan included, beside a 0: the larger is emitted."""
    row = torch.arange(-(2**15), 2**15, 3).to(torch.int16).view(torch.float16)
    args = verification("greedy", FILTERS["plain"], vocabulary=2, logprobs="raw")
    args[0] = torch.stack([row, torch.zeros_like(row)], -1)[:, None]
    requests = len(row)
    args[1:4] = [torch.full((requests, 1), -1)] * 3
    args[4:14] = [torch.ones(requests), *[None] * 9]
    args[15] = 1
    found, z = _cpu.tree_verify(*args), row.float().nan_to_num(-torch.inf, 1e30, -torch.inf)
    pair = torch.stack([z, torch.zeros_like(z)], -1).double()
    assert bitwise_equal(found[0][:, 0], pair.argmax(-1))
    torch.testing.assert_close(found[3][:, 0].double(), pair.log_softmax(-1).amax(-1), rtol=0, atol=1e-6)


@functools.cache
def drafted(name: str) -> tuple[list[Any], tuple[Tensor, ...]]:
    args = drafting(**DRAFTS[name])
    return args, reference.draft_topk(*args)


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_are_those_of_the_reference(isa: str, name: str) -> None:
    args, expected = drafted(name)
    found = _cpu.draft_topk(*args)
    assert all(bitwise_equal(found[i], expected[i]) for i in (0, 2, 4, 5))
    for i in (1, 3):
        torch.testing.assert_close(found[i], expected[i], rtol=1e-6, atol=2e-6)


def test_tokens_of_a_race_do_not_depend_on_the_instruction_set(isa: str) -> None:
    """The few that can win are scored in double by the same code, so equality is exact, not likely."""
    args = verification("coupled", FILTERS["plain"], vocabulary=12000, sharpness=0.3)
    found = _cpu.tree_verify(*args)[0]
    _cpu_ext.set_isa("scalar")
    assert bitwise_equal(found, _cpu.tree_verify(*args)[0])
