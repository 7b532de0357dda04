"""A mixture of experts around its products, on a GPU or the emulated device: bit for bit, with hostile ids."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from m3kernels.testing import bitwise_equal, relative_error, surrounded_by_nan, uninitialized_is_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = (0, 1, 2) if DEVICE == "cpu" else (0,)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
halves = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)


@pytest.fixture
def room(cuda_module: None) -> ModuleType:
    from m3kernels.int4 import _cuda

    return _cuda


def configure(seed: int) -> None:
    if DEVICE == "cpu":
        import emulated_cuda

        emulated_cuda.configure(seed=seed)


def sorted_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """offsets, row_token, slot_row as the room's route gives them, by a stable sort."""
    bucket = torch.where((ids < 0) | (ids >= experts), experts, ids).flatten()
    in_order, order = bucket.sort(stable=True)
    bounds = torch.arange(experts + 1, device=ids.device)
    slot_row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    slot_row = torch.where(bucket == experts, -1, slot_row).view(ids.shape)
    found = torch.searchsorted(in_order, bounds), order // ids.shape[1], slot_row
    return tuple(tensor.int() for tensor in found)  # type: ignore[return-value]


# -- routing ----------------------------------------------------------------------------------------------------------
ROUTED = {  # (tokens, topk, experts)
    "one": (1, 1, 1),
    "a_token": (1, 8, 256),
    "a_warp_and_one": (33, 1, 3),
    "decoding": (16, 8, 128),
    "one_pass": (128, 8, 60),
    "passes": (700, 4, 7),
    "most_of_one_block": (8192, 1, 5),
    "two_launches": (8193, 1, 5),
    "many_blocks": (6000, 8, 40),
    "most_experts": (1200, 1, 2048),
}


@pytest.mark.parametrize("case", ROUTED)
@pytest.mark.parametrize("hostile", (False, True), ids=("valid", "hostile"))
def test_route(room: ModuleType, case: str, hostile: bool) -> None:
    tokens, topk, experts = ROUTED[case]
    ids = torch.randint(0, experts, (tokens, topk), device=DEVICE)
    if hostile:
        wrong = torch.tensor([-1, experts, 2**31, -(2**63), 2**63 - 1, 2**32], device=DEVICE)
        ids = torch.where(torch.rand(ids.shape, device=DEVICE) < 0.2, wrong[ids % len(wrong)], ids)
    expected = sorted_by_expert(ids, experts)
    for seed in SEEDS if tokens * topk < 10000 else SEEDS[:2]:
        configure(seed)
        with uninitialized_is_nan():
            found = room.route(ids, experts)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tokens", (7, 9000))
def test_route_without_a_valid_id(room: ModuleType, tokens: int) -> None:
    ids = torch.full((tokens, 1), -1, device=DEVICE)
    offsets, row_token, slot_row = room.route(ids, 3)
    assert offsets.tolist() == [0] * 4 and (slot_row == -1).all()
    assert torch.equal(row_token, torch.arange(tokens, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("tokens", (50, 8200))
def test_route_writes_only_what_is_its_own(room: ModuleType, tokens: int) -> None:
    from m3kernels import _cuda_ext, cuda

    topk, experts, margin = 1, 6, 32
    ids = torch.randint(-2, experts + 2, (tokens, topk), device=DEVICE)
    sizes = (experts + 1, tokens, tokens, _cuda_ext.int4_route_workspace(tokens, topk, experts))
    buffers = [torch.full((size + 2 * margin,), -77, dtype=torch.int32, device=DEVICE) for size in sizes]
    spans = [(buffer.data_ptr() + 4 * margin, size) for buffer, size in zip(buffers, sizes, strict=True)]
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    ids_span, count_span = (ids.data_ptr(), ids.numel()), (counter.data_ptr(), 1)
    _cuda_ext.int4_route(ids_span, tokens, topk, experts, *spans, count_span, cuda.stream(ids))
    assert all((buffer[:margin] == -77).all() and (buffer[-margin:] == -77).all() for buffer in buffers)
    assert counter.item() == 0


# -- the sum over a token's experts -----------------------------------------------------------------------------------
def combined(rows: Tensor, slot_row: Tensor, weights: Tensor) -> Tensor:
    """Slot by slot, a product and a sum rounded once to fp32: exact in fp64, but for one more rounding."""
    y = torch.zeros(len(slot_row), rows.shape[1], device=rows.device)
    for j in range(slot_row.shape[1]):
        term = rows[slot_row[:, j].clamp(min=0)].double() * weights[:, j, None].double()
        y = torch.where(slot_row[:, j, None] < 0, y, (y.double() + term).float())
    return y


@halves
@pytest.mark.parametrize(("tokens", "topk", "columns"), ((1, 1, 1), (3, 2, 130), (5, 8, 512), (2, 3, 1030), (4, 6, 7)))
def test_combine(room: ModuleType, dtype: torch.dtype, tokens: int, topk: int, columns: int) -> None:
    rows = torch.randn(tokens * topk, columns, device=DEVICE)
    slot_row = torch.randperm(tokens * topk, device=DEVICE).view(tokens, topk)
    slot_row[torch.rand(tokens, topk, device=DEVICE) < 0.2] = -1
    rows[~torch.isin(torch.arange(len(rows), device=DEVICE), slot_row)] = torch.nan  # rows of no expert
    weights = torch.rand(tokens, topk, device=DEVICE)
    expected = combined(rows, slot_row, weights).to(dtype)
    with uninitialized_is_nan():
        y = room.combine(surrounded_by_nan(rows), slot_row.int(), surrounded_by_nan(weights), dtype)
    assert bitwise_equal(y, expected)


@pytest.mark.parametrize("row", (-5, 4, 2**31 - 1, -(2**31)))
def test_combine_reads_no_row_that_is_not_there(room: ModuleType, row: int) -> None:
    rows, weights = torch.ones(4, 8, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    slot_row = torch.tensor([[0, row], [1, 2]], dtype=torch.int32, device=DEVICE)
    y = room.combine(rows, slot_row, weights, torch.bfloat16)
    assert y.tolist() == [[1.0] * 8, [2.0] * 8]


# -- silu(gate) * up --------------------------------------------------------------------------------------------------
@halves
@pytest.mark.parametrize(("rows", "columns"), ((1, 1), (3, 17), (5, 100), (2, 1028)))
def test_gate(room: ModuleType, dtype: torch.dtype, rows: int, columns: int) -> None:
    x = torch.randn(rows, 2 * columns, device=DEVICE) * 6
    gate, up = x.double().chunk(2, dim=1)
    with uninitialized_is_nan():
        y = room.gate(surrounded_by_nan(x), dtype)
    assert relative_error(y, torch.nn.functional.silu(gate) * up).max <= torch.finfo(dtype).eps / 2


@halves
def test_gate_at_the_ends_of_the_range(room: ModuleType, dtype: torch.dtype) -> None:
    gates = torch.tensor([-torch.inf, -200.0, -89.0, 0.0, -0.0, 89.0, 200.0, torch.inf, torch.nan], device=DEVICE)
    y = room.gate(torch.cat((gates, torch.ones_like(gates)))[None], dtype)[0]
    expected = torch.tensor([torch.nan, 0.0, 0.0, 0.0, 0.0, 89.0, 200.0, torch.inf, torch.nan])
    assert torch.equal(y.float().cpu().abs().nan_to_num(7.0), expected.nan_to_num(7.0))


# -- columns in the order of each expert ------------------------------------------------------------------------------
@halves
@pytest.mark.parametrize(("rows", "columns", "experts"), ((1, 1, 1), (7, 33, 3), (5, 2050, 2), (40, 64, 300)))
def test_gather(room: ModuleType, dtype: torch.dtype, rows: int, columns: int, experts: int) -> None:
    x = torch.randn(9, columns, device=DEVICE).to(dtype)
    perm = torch.rand(experts, columns, device=DEVICE).argsort(-1).int()
    index = torch.randint(0, 9, (rows,), dtype=torch.int32, device=DEVICE)
    expert = torch.randint(0, experts, (rows,), device=DEVICE).sort().values
    offsets = torch.searchsorted(expert, torch.arange(experts + 1, device=DEVICE)).int()
    expected = x[index.long()].gather(1, perm[expert].long())
    with uninitialized_is_nan():
        y = room.gather(surrounded_by_nan(x), perm, rows, index, offsets)
    assert bitwise_equal(y, expected)


def test_gather_without_index_or_experts(room: ModuleType) -> None:
    x, perm = torch.randn(6, 50, device=DEVICE).half(), torch.randperm(50, device=DEVICE).int()
    assert bitwise_equal(room.gather(x, perm, 6), x[:, perm.long()])


def test_gather_of_what_is_not_there_is_zero(room: ModuleType) -> None:
    """Rows out of range, rows of no expert, columns out of range."""
    x = torch.ones(3, 4, dtype=torch.float16, device=DEVICE)
    perm = torch.tensor([[0, 1, 2, 3], [0, -1, 4, 2**31 - 1]], dtype=torch.int32, device=DEVICE)
    index = torch.tensor([0, -1, 3, 1, 2, 2], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)
    y = room.gather(x, perm, 6, index, offsets)
    assert y.tolist() == [[1] * 4, [0] * 4, [0] * 4, [1, 0, 0, 0], [1, 0, 0, 0], [0] * 4]


# -- the border -------------------------------------------------------------------------------------------------------
def test_the_border_refuses_what_would_be_unsafe(room: ModuleType) -> None:
    from m3kernels import _cuda_ext

    one, four, none = (64, 1), (64, 4), (0, 0)
    with pytest.raises(ValueError, match=r"int4_moe: experts: want 1 .. 2048; got 2049"):
        _cuda_ext.int4_route(four, 2, 2, 2049, (64, 2050), four, four, none, one, 0)
    with pytest.raises(ValueError, match="int4_moe: topk_ids: want 4 elements; got 3"):
        _cuda_ext.int4_route((64, 3), 2, 2, 3, four, four, four, none, one, 0)
    with pytest.raises(ValueError, match="int4_moe: workspace: want 12 elements; got 0"):
        _cuda_ext.int4_route((64, 9000), 9000, 1, 3, four, (64, 9000), (64, 9000), none, one, 0)
    with pytest.raises(ValueError, match=r"int4_moe: y: want 1 \(bf16\) or 2 \(fp16\); got 0"):
        _cuda_ext.int4_combine((64, 8), four, four, 2, 2, 2, four, 0, 0)
    with pytest.raises(ValueError, match="int4_gather: perm: want 6 elements; got 4"):
        _cuda_ext.int4_gather(four, 2, 2, none, 2, four, four, 3, four, 0)
    with pytest.raises(ValueError, match="int4_moe: x: want 8 elements; got 4"):
        _cuda_ext.int4_gate(four, 2, 2, four, 1, 0)
