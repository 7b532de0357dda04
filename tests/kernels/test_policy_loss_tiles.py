"""The native CPU tile kernels of policy_loss on every instruction set that runs here, against plain torch in fp64.

Values, running sums over many tiles, rows that do not see each other, threads that do not matter, hostile memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from native_tiles import BUILT, converted, margins, padded, set_threads, two_parts, use
from torch import Tensor

from m3kernels.policy_loss import _cpu, tiles
from m3kernels.policy_loss.reference import TOLERANCE
from m3kernels.policy_loss.tiles import new_state
from m3kernels.testing import bitwise_equal, check_error, relative_error, surrounded_by_nan

TWINS = {"avx512vnni": "avx512", "avxvnni": "avx2"}
FAR = 2**40  # an id of no vocabulary


@pytest.fixture(params=BUILT)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, in use for the test."""
    yield from use(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield from set_threads()


def random_ids(rows: int, ids: int, vocabulary: int) -> Tensor:
    """(rows, ids): random ones, the first and the last index, repeats, negative ones and ids of nothing."""
    table = torch.randint(0, max(1, vocabulary), (rows, ids))
    edges = torch.tensor([0, vocabulary - 1, -1, vocabulary, FAR, -(2**63), 2**63 - 1, 0])
    if ids > 1:
        table[:, : len(edges)] = edges[:ids]
    return table


# -- statistics -------------------------------------------------------------------------------------------------------
STATISTICS: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, widths=(1,)),
    "no_rows": dict(rows=0, widths=(5,)),
    "no_columns": dict(rows=3, widths=(0,)),
    "empty_tiles_between": dict(rows=3, widths=(0, 7, 0, 9)),
    "no_ids": dict(rows=3, widths=(33,), ids=0),
    "under_a_vector": dict(rows=5, widths=(3,), ids=3),
    "one_vector": dict(rows=2, widths=(16,)),
    "vector_and_one": dict(rows=2, widths=(17, 15), ids=2),
    "four_vectors_and_one": dict(rows=3, widths=(65,), entropy=True, sum_sq=True),
    "two_blocks_and_part": dict(rows=3, widths=(2083,), entropy=True, sum_sq=True, ids=9),
    "many_tiles": dict(rows=4, widths=(129,) * 40, entropy=True, sum_sq=True, ids=9),
    "uneven_tiles": dict(rows=4, widths=(1, 500, 2, 77, 1024), entropy=True),
    "ascending": dict(rows=3, widths=(64,) * 8, ascending=True, entropy=True, sum_sq=True),
    "strided": dict(rows=5, widths=(77, 64), pad=19, ids=4),
    "many_ids": dict(rows=2, widths=(40, 37), ids=131),
    "entropy": dict(rows=5, widths=(100, 101), entropy=True),
    "sum_sq": dict(rows=5, widths=(100, 101), sum_sq=True),
    "bias": dict(rows=3, widths=(61, 70), bias=True, pad=3),
    "scale": dict(rows=3, widths=(61, 70), logit_scale=0.3, entropy=True),
    "negative_scale": dict(rows=3, widths=(61, 70), logit_scale=-2.5),
    "softcap": dict(rows=3, widths=(61, 70), softcap=5.0, entropy=True),
    "softcap_of_tiny": dict(rows=3, widths=(61, 70), softcap=30.0, magnitude=1e-6),
    "temperature": dict(rows=3, widths=(61, 70), temperature=True),
    "everything": dict(
        rows=7, widths=(131, 1, 300), ids=9, pad=5, bias=True, logit_scale=0.5, softcap=20.0, temperature=True,
        entropy=True, sum_sq=True,
    ),
    "everything_with_holes": dict(
        rows=7, widths=(131, 300), ids=9, bias=True, logit_scale=0.5, softcap=20.0, temperature=True, entropy=True,
        sum_sq=True, holes=True,
    ),
    "holes": dict(rows=6, widths=(50, 131), ids=9, holes=True, entropy=True, sum_sq=True),
    "all_holes": dict(rows=2, widths=(50, 3), all_holes=True, entropy=True, sum_sq=True),
    "first_tile_all_holes": dict(rows=2, widths=(50, 30), first_holes=True, entropy=True, sum_sq=True),
    "huge": dict(rows=5, widths=(200, 311), magnitude=1e4, sum_sq=True),
    "huge_cliffs": dict(rows=5, widths=(200, 311), cliffs=True, entropy=True, sum_sq=True),
    "huge_negative": dict(rows=5, widths=(200, 311), magnitude=1.0, offset=-1e4, entropy=True, sum_sq=True),
    "huge_softcap": dict(rows=5, widths=(200, 311), magnitude=1e4, softcap=50.0, temperature=True),
    "flat": dict(rows=3, widths=(1000,), magnitude=0.0, entropy=True, sum_sq=True),
}  # fmt: skip


def make_statistics(
    rows: int,
    widths: tuple[int, ...],
    *,
    ids: int = 1,
    pad: int = 0,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: bool = False,
    entropy: bool = False,
    sum_sq: bool = False,
    magnitude: float = 4.0,
    offset: float = 0.0,
    ascending: bool = False,
    cliffs: bool = False,
    holes: bool = False,
    all_holes: bool = False,
    first_holes: bool = False,
) -> dict[str, Any]:
    vocabulary = sum(widths)
    z = torch.randn(rows, vocabulary) * magnitude + offset
    if cliffs:
        z += torch.where(torch.rand_like(z) < 0.5, 1e4, -1e4)
    if ascending:
        z = z.sort(1).values * 8
    if holes:
        z[torch.rand_like(z) < 0.3] = -torch.inf
    if all_holes:
        z[:] = -torch.inf
    if first_holes:
        z[:, : widths[0]] = -torch.inf
    return dict(
        z=z,
        widths=widths,
        pad=pad,
        ids=random_ids(rows, ids, vocabulary),
        bias=torch.randn(vocabulary) if bias else None,
        logit_scale=logit_scale,
        softcap=softcap,
        inverse_temperature=torch.rand(rows) + 0.5 if temperature else None,
        entropy=entropy,
        sum_sq=sum_sq,
    )


def run_statistics(room: ModuleType, dtype: torch.dtype, **case: Any) -> dict[str, Tensor]:
    """Feed the tiles one after another; {name: what comes out}."""
    z, ids, bias, inverse = (converted(case[name], dtype) for name in ("z", "ids", "bias", "inverse_temperature"))
    state = new_state(*ids.shape, entropy=case["entropy"], sum_sq=case["sum_sq"], like=z)
    outputs, first = [], 0
    for width in case["widths"]:
        tile = padded(z[:, first : first + width], case["pad"])
        tile_bias = None if bias is None else surrounded_by_nan(bias[first : first + width])
        room.statistics(tile, ids, first, tile_bias, case["logit_scale"], case["softcap"], inverse, state)
        assert margins(tile).isnan().all(), "written beside the tile"
        outputs.append(tile.clone())
        first += width
    found = {"logits": torch.cat(outputs, 1), "maximum": state.maximum, "picked": state.picked}
    found["lse"] = state.maximum + state.total.log()
    if state.weighted is not None:
        found["entropy"] = state.total.log() - state.weighted / state.total
    if state.squared is not None:
        found["sum_sq"] = state.squared / state.total.square()
    return found


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_are_within_tolerance(isa: str, case: str) -> None:
    made = make_statistics(**STATISTICS[case])
    ours, exact, torch32 = (
        run_statistics(room, dtype, **made)
        for room, dtype in ((_cpu, torch.float32), (tiles, torch.float64), (tiles, torch.float32))
    )
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        check_error(value, exact[name], torch32[name], TOLERANCE)


@pytest.mark.parametrize("case", ("many_tiles", "holes", "huge", "strided"))
def test_identity_leaves_logits_and_picks_them(isa: str, case: str) -> None:
    made = make_statistics(**STATISTICS[case])
    found = run_statistics(_cpu, torch.float32, **made)
    assert bitwise_equal(found["logits"], made["z"])
    assert bitwise_equal(found["maximum"], made["z"].amax(1))
    ids = made["ids"]
    inside = (ids >= 0) & (ids < made["z"].shape[1])
    wanted = torch.where(inside, made["z"].gather(1, torch.where(inside, ids, 0)), -torch.inf)
    assert bitwise_equal(found["picked"], wanted)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf), ids=str)
@pytest.mark.parametrize("column", (0, 37, 99))
def test_statistics_of_a_bad_row_are_nan_and_of_its_neighbours_are_not(isa: str, bad: float, column: int) -> None:
    made = make_statistics(3, (60, 40), entropy=True, sum_sq=True)
    made["z"][1, column] = bad
    found = run_statistics(_cpu, torch.float32, **made)
    assert found["lse"].isnan().tolist() == [False, True, False]
    assert found["entropy"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("case", ("everything", "everything_with_holes", "two_blocks_and_part", "many_tiles"))
def test_statistics_of_a_row_do_not_see_the_others(isa: str, case: str) -> None:
    made = make_statistics(**STATISTICS[case])
    together = run_statistics(_cpu, torch.float32, **made)
    rows = range(made["z"].shape[0])
    per_row = ("z", "ids", "inverse_temperature")
    alone = [
        run_statistics(
            _cpu, torch.float32, **{k: v[i : i + 1] if k in per_row and v is not None else v for k, v in made.items()}
        )
        for i in rows
    ]
    for name, value in together.items():
        assert bitwise_equal(value, torch.cat([one[name] for one in alone])), name


@pytest.mark.parametrize("count", (2, 3))
def test_statistics_do_not_depend_on_threads(isa: str, threads: Callable[[int], None], count: int) -> None:
    made = make_statistics(61, (1500, 700), ids=3, softcap=20.0, temperature=True, entropy=True, sum_sq=True)
    threads(1)
    one = run_statistics(_cpu, torch.float32, **made)
    threads(count)
    more = run_statistics(_cpu, torch.float32, **made)
    for name, value in one.items():
        assert bitwise_equal(value, more[name]), name


def test_exponential_is_within_two_ulp(isa: str) -> None:
    """total of a row of one logit below a maximum of 0 is 1 + exp: read off exp alone, where the state holds the 0."""
    x = torch.linspace(-87.3, 0.0, 20011)[:, None].contiguous()
    state = new_state(x.shape[0], 0, entropy=False, sum_sq=False, like=x)
    state.maximum.zero_()
    _cpu.statistics(x.clone(), torch.empty(x.shape[0], 0, dtype=torch.int64), 0, None, 1.0, 0.0, None, state)
    exact = x[:, 0].double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert float(((state.total.double() - exact) / ulp).abs().max()) <= 2


# -- gradient ---------------------------------------------------------------------------------------------------------
GRADIENT: dict[str, dict[str, Any]] = {
    "one_by_one": dict(rows=1, columns=1),
    "no_rows": dict(rows=0, columns=5),
    "no_columns": dict(rows=3, columns=0),
    "no_ids": dict(rows=3, columns=35, ids=0),
    "under_a_vector": dict(rows=5, columns=3, ids=9),
    "vector_and_one": dict(rows=5, columns=17),
    "blocks": dict(rows=3, columns=2083, ids=9),
    "strided": dict(rows=4, columns=67, pad=13, ids=2),
    "repeated_ids": dict(rows=4, columns=67, ids=131),
    "first": dict(rows=4, columns=67, ids=9, first=1000),
    "some_rows": dict(rows=9, columns=131, ids=9, some=(7, 0, 7, 3)),
    "no_row_of_many": dict(rows=9, columns=131, some=()),
    "slope": dict(rows=4, columns=131, slope=True),
    "square": dict(rows=4, columns=131, square=True),
    "slope_and_square": dict(rows=4, columns=131, slope=True, square=True, ids=2),
    "scale": dict(rows=4, columns=131, logit_scale=-0.3, slope=True),
    "softcap": dict(rows=4, columns=131, softcap=20.0, ids=9),
    "temperature": dict(rows=4, columns=131, temperature=True, ids=9),
    "everything": dict(
        rows=9, columns=300, pad=3, ids=9, first=77, some=(8, 1, 2), slope=True, square=True, logit_scale=0.5,
        softcap=20.0, temperature=True,
    ),
    "holes": dict(rows=4, columns=131, holes=True, slope=True, square=True, ids=2),
    "huge": dict(rows=4, columns=131, magnitude=1e4, slope=True, square=True, ids=2),
}  # fmt: skip


def make_gradient(
    rows: int,
    columns: int,
    *,
    ids: int = 1,
    first: int = 0,
    pad: int = 0,
    some: tuple[int, ...] | None = None,
    slope: bool = False,
    square: bool = False,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: bool = False,
    magnitude: float = 4.0,
    holes: bool = False,
) -> dict[str, Any]:
    inverse = torch.rand(rows) + 0.5 if temperature else None
    z = torch.randn(rows, columns) * magnitude
    if softcap:
        z = softcap * torch.tanh(z / softcap) * (1.0 if inverse is None else inverse[:, None])
    if holes:
        z[torch.rand_like(z) < 0.3] = -torch.inf
    lse = z.double().logsumexp(1) + 0.1 if columns else torch.zeros(rows)  # the rest of the vocabulary is elsewhere
    lse, lse_low = two_parts(lse)
    table = random_ids(rows, ids, columns)
    table = torch.where(table.abs() < FAR, table + first, table)
    which = None if some is None else torch.tensor(some, dtype=torch.int64)
    taken = slice(None) if which is None else which
    values = [torch.randn(rows)[taken] for _ in range(3)]
    return dict(
        z=z,
        pad=pad,
        rows=which,
        ids=table[taken].contiguous(),
        first=first,
        lse=lse[taken].contiguous(),
        lse_low=lse_low[taken].contiguous(),
        base=values[0],
        slope=values[1] if slope else None,
        square=values[2] if square else None,
        picked=torch.randn(rows, ids)[taken].contiguous(),
        complement=torch.randn(rows, ids)[taken].contiguous(),
        logit_scale=logit_scale,
        softcap=softcap,
        inverse_temperature=None if inverse is None else inverse[taken].contiguous(),
    )


GRADIENT_NAMES = (
    "rows", "ids", "first", "lse", "lse_low", "base", "slope", "square", "picked", "complement", "logit_scale",
    "softcap", "inverse_temperature",
)  # fmt: skip


def run_gradient(room: ModuleType, dtype: torch.dtype, in_place: bool = False, **case: Any) -> Tensor:
    z = padded(converted(case["z"], dtype), case["pad"])
    out = z if in_place else padded(z.new_full((case["ids"].shape[0], z.shape[1]), torch.nan), case["pad"] + 2)
    room.gradient(z, *(converted(case[name], dtype) for name in GRADIENT_NAMES), out)
    assert margins(out).isnan().all(), "written beside the tile"
    return out.clone()


@pytest.mark.parametrize("case", GRADIENT)
def test_gradient_is_within_tolerance(isa: str, case: str) -> None:
    made = make_gradient(**GRADIENT[case])
    exact, torch32 = (run_gradient(tiles, dtype, **made) for dtype in (torch.float64, torch.float32))
    check_error(run_gradient(_cpu, torch.float32, **made), exact, torch32, TOLERANCE)


@pytest.mark.parametrize("case", [name for name in GRADIENT if "some" not in GRADIENT[name]])
def test_gradient_in_place_is_the_same(isa: str, case: str) -> None:
    made = make_gradient(**GRADIENT[case])
    apart, in_place = (run_gradient(_cpu, torch.float32, place, **made) for place in (False, True))
    assert bitwise_equal(apart, in_place)


PER_ROW = {"ids", "lse", "lse_low", "base", "slope", "square", "picked", "complement", "inverse_temperature"}


@pytest.mark.parametrize("case", ("everything", "some_rows", "blocks", "slope_and_square"))
def test_gradient_of_a_row_does_not_see_the_others(isa: str, case: str) -> None:
    made = make_gradient(**GRADIENT[case])
    together = run_gradient(_cpu, torch.float32, **made)
    which = range(made["z"].shape[0]) if made["rows"] is None else made["rows"].tolist()
    alone = []
    for i, row in enumerate(which):
        one = {name: v[i : i + 1] if name in PER_ROW and v is not None else v for name, v in made.items()}
        alone.append(run_gradient(_cpu, torch.float32, **{**one, "z": made["z"][row : row + 1], "rows": None}))
    assert bitwise_equal(together, torch.cat(alone))


@pytest.mark.parametrize("count", (2, 3))
def test_gradient_does_not_depend_on_threads(isa: str, threads: Callable[[int], None], count: int) -> None:
    made = make_gradient(61, 1500, ids=5, slope=True, softcap=20.0)
    threads(1)
    one = run_gradient(_cpu, torch.float32, **made)
    threads(count)
    assert bitwise_equal(one, run_gradient(_cpu, torch.float32, **made))


def test_gradient_is_that_of_autograd(isa: str) -> None:
    """Softcap, temperature, scale; log-probabilities of two ids, entropy and sum of squares."""
    raw = torch.randn(5, 90, dtype=torch.float64, requires_grad=True)
    inverse, ids = torch.rand(5, dtype=torch.float64) + 0.5, torch.randint(0, 90, (5, 2))
    z = 7.0 * torch.tanh(0.8 * raw / 7.0) * inverse[:, None]
    lse = z.logsumexp(1)
    log_p = z - lse[:, None]
    w_pick, w_entropy, w_square = torch.randn(5, 2).double(), torch.randn(5).double(), torch.randn(5).double()
    entropy, sum_sq = -(log_p.exp() * log_p).sum(1), log_p.exp().square().sum(1)
    loss = (w_pick * log_p.gather(1, ids)).sum() + (w_entropy * entropy).sum() + (w_square * sum_sq).sum()
    loss.backward()
    # d H / d z' = -p (log p + H);  d sum p^2 / d z' = 2 p (p - sum p^2);  d log p_k / d z' = [k] - p
    base = -w_pick.sum(1) - w_entropy * entropy - 2 * w_square * sum_sq
    lse, lse_low = two_parts(lse.detach())
    complement = -w_pick * torch.expm1(log_p.gather(1, ids))
    made = dict(
        z=z, lse=lse, lse_low=lse_low, base=base, slope=-w_entropy, square=2 * w_square, picked=w_pick,
        complement=complement, ids=ids,
    )  # fmt: skip
    made = {name: converted(value.detach(), torch.float32) for name, value in made.items()}
    inverse32 = inverse.float()
    found = run_gradient(
        _cpu, torch.float32, pad=0, rows=None, first=0, logit_scale=0.8, softcap=7.0, inverse_temperature=inverse32,
        **made,
    )  # fmt: skip
    assert relative_error(found, raw.grad).max < 2e-6


@pytest.mark.parametrize("transform", ({}, dict(softcap=30.0), dict(logit_scale=0.7, temperature=True)), ids=str)
@pytest.mark.parametrize("log_p", (-1e-4, -1e-5, -1e-6, -1e-7))
def test_gradient_of_an_id_that_is_all_but_certain(isa: str, log_p: float, transform: dict[str, Any]) -> None:
    """d log p / d z' is 1 - p there, to the last digits, though fp32 has few numbers between such a p and 1."""
    made = make_gradient(5, 131, magnitude=1.0, **transform)
    ids, picked = torch.randint(0, 131, (5, 1)), torch.randn(5, 1)
    others = made["z"].double().scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    made["z"].scatter_(1, ids, (others - math.log(math.expm1(-log_p))).float())
    top = made["z"].gather(1, ids).double()
    exact_log_p = -(others - top).exp().log1p()  # log_p, but for the rounding of top
    exact = -picked.double() * exact_log_p.expm1()
    lse, lse_low = two_parts((top - exact_log_p)[:, 0])
    made.update(
        ids=ids, lse=lse, lse_low=lse_low, base=-picked[:, 0], picked=picked, complement=exact.float()
    )  # fmt: skip
    found = run_gradient(_cpu, torch.float32, **made)
    inverse = converted(made["inverse_temperature"], torch.float64)
    tiles.chain(exact, top, made["logit_scale"], made["softcap"], inverse, exact)
    assert (found.gather(1, ids) / exact - 1).abs().max() < 1e-6


@pytest.mark.parametrize("ids", (1, 2, 40), ids="{}_ids".format)
def test_gradient_is_the_complement_where_base_is_minus_what_is_picked(isa: str, ids: int) -> None:
    """Bit by bit, whatever p: nothing of p * base is left, also where one id comes many times."""
    made = make_gradient(5, 131, pad=3, magnitude=1.0)
    picked = torch.randint(-8, 9, (5, ids)).float()  # so that their sum is exact
    complement = torch.zeros(5, ids)
    complement[:, -1] = torch.randn(5)
    repeated = torch.randint(0, 131, (5, 1)).expand(5, ids).contiguous()
    made.update(ids=repeated, picked=picked, complement=complement, base=-picked.sum(1))
    found = run_gradient(_cpu, torch.float32, **made)
    assert bitwise_equal(found.gather(1, repeated[:, :1])[:, 0], complement[:, -1])


# -- the room ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TWINS)
def test_instruction_sets_without_kernels_of_their_own(name: str) -> None:
    made = make_statistics(**STATISTICS["everything"])
    found = [run_statistics(_cpu, torch.float32, **made) for chosen in (name, TWINS[name]) for _ in use(chosen)]
    for output, value in found[0].items():
        assert bitwise_equal(value, found[1][output]), output


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_room_serves(dtype: torch.dtype) -> None:
    assert _cpu.unsupported("any", torch.zeros(1, 1, dtype=dtype)) == ""


@pytest.mark.parametrize(
    ("hidden", "reason"),
    (
        (torch.zeros(1, 1, dtype=torch.float64), "computes in float32, not float64"),
        (torch.zeros(1, 1, device="meta"), "needs CPU tensors, not meta"),
    ),
    ids=("float64", "meta"),
)
def test_room_says_what_it_does_not_serve(hidden: Tensor, reason: str) -> None:
    assert _cpu.unsupported("any", hidden) == reason


def test_huge_pages_change_no_value() -> None:
    buffer = torch.arange(3_000_001, dtype=torch.float32)
    _cpu.advise_huge_pages(buffer)
    assert torch.equal(buffer, torch.arange(3_000_001, dtype=torch.float32))


@pytest.mark.parametrize("some", (None, (3,), (4, 0)), ids=str)
def test_columns_of_one_matrix_are_apart(isa: str, some: tuple[int, ...] | None) -> None:
    """Logits and out side by side in one buffer do not overlap, though their spans do."""
    made = make_gradient(5, 40, some=some)
    both = torch.cat((made["z"], torch.full((5, 40), torch.nan)), 1)
    out = both[: len(made["ids"]), 40:]
    _cpu.gradient(both[:, :40], *(made[name] for name in GRADIENT_NAMES), out)
    assert bitwise_equal(both[:, :40], made["z"])
    assert bitwise_equal(out, run_gradient(_cpu, torch.float32, **made))
