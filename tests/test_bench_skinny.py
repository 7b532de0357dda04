"""The benchmark of few rows: arms share weights fairly, a row carries its roofline, promises are read from the rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import record, roofline, skinny, skinny_report, workloads
from bench.record import SkinnyRow
from bench.skinny import Plan, Rows, Store
from bench.workloads import Linear, make_problem

TINY = Linear(name="tiny", n=128, k=192, group_size=64)
TIMED = dict.fromkeys(SkinnyRow.TIMED)


@pytest.fixture(autouse=True)
def process_settings():
    """Arms set the thread count and the instruction set; each test leaves them as it found them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    skinny.use_isa(None)


@pytest.fixture
def small_roofline(monkeypatch):
    """A read probe of 8 MiB and no measurement of peaks."""
    monkeypatch.setattr(roofline, "BUFFER_BYTES", 8 << 20)
    ceilings = roofline.Ceilings(threads=1, read_bytes=1e10, read_kind=0, peaks={}, source="c")
    monkeypatch.setattr(roofline, "measured", lambda threads, machine, again=True: ceilings)
    roofline.buffer.cache_clear()
    yield
    roofline.buffer.cache_clear()


def make_row(**changes: object) -> SkinnyRow:
    values = {
        "op": "int4_skinny",
        "shape": "qwen3-8b.o",
        "m": 4,
        "n": 4096,
        "k": 4096,
        "group_size": 128,
        "isa": "avx2",
        "memory": "streamed",
        "weight_bytes": 8 << 20,
        "copies": 64,
        "arm": "m3_int8",
        "device": "cpu",
        "threads": 1,
        "case_threads": 1,
        "gate": "passed",
        "error": 6e-3,
        "tolerance": 8e-3,
        "median_s": 9e-4,
        "p20_s": 8e-4,
        "p80_s": 1e-3,
        "rounds": 9,
        "growth": (1.4, 1.3, 1.45),
        "read_gbytes_s": 12.0,
        "peak_gmacs": 120.0,
        "least_s": 7e-4,
        "least_growth": 1.0,
        "commit": "0123456789ab",
        "dirty": False,
        "machine": {"cpu": "some cpu", "cores": 2, "python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "date": "2026-11-22T00:00:00+00:00",
        "command": "python -m bench skinny",
    }
    return SkinnyRow(**{**values, **changes})


def test_a_row_survives_its_file_and_carries_no_growth_without_a_gate(tmp_path):
    rows = [make_row(), make_row(gate="failed", error=1.0, m=8, **TIMED)]
    record.append(tmp_path / "rows.jsonl", rows)
    assert record.read(tmp_path / "rows.jsonl") == rows
    with pytest.raises(ValueError, match="Row: gate: want 'passed' for a row with growth; got 'failed'"):
        make_row(gate="failed", **{**TIMED, "growth": (1.0, 1.0, 1.0)})


@pytest.mark.parametrize("field", ["m", "isa", "memory", "arm", "shape"])
def test_rows_of_different_cases_do_not_replace_each_other(field):
    other = {"m": 8, "isa": "avx512vnni", "memory": "cached", "arm": "m3_int16", "shape": "else"}[field]
    rows = [make_row(), make_row(**{field: other}), make_row(median_s=9.0)]
    assert [row.median_s for row in record.latest(rows)] == [9.0, 9e-4]


def test_a_copy_comes_back_only_after_all_others():
    store = Store(make_problem(TINY, 1), 5 * 13_056, 2 * 13_056)
    taken = [copy for _ in range(5) for copy in store.take()]
    assert len(store.weights) == 5
    assert taken == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_every_named_shape_has_a_store():
    assert set(workloads.SKINNY_STORES) == set(workloads.SKINNY_LINEARS)
    assert all(set(plan.shapes) <= set(workloads.SKINNY_LINEARS) for plan in skinny.PRESETS.values())


@pytest.mark.parametrize(
    ("field", "value"), [("modes", ("int7",)), ("ms", (2, 4))], ids=["unknown mode", "nothing to compare with"]
)
def test_a_plan_refuses_what_it_cannot_measure(field, value):
    with pytest.raises(ValueError, match=f"bench skinny: {field}: want .*"):
        Plan(**{field: value})


@pytest.mark.parametrize("mode", skinny.MODES)
def test_an_arm_computes_its_rows(mode):
    problem = make_problem(TINY, 8)
    arm = Rows(problem, Store(problem, 0, 0), mode=mode, isa=skinny.best_isa(), m=8)
    result = skinny.gate(arm, problem)
    assert result.passed
    assert arm.product(1).shape == (8, 128)


def test_the_gate_sees_a_row_that_depends_on_its_neighbours(monkeypatch):
    problem = make_problem(TINY, 4)
    arm = Rows(problem, Store(problem, 0, 0), mode="exact", isa=skinny.best_isa(), m=4)
    product = arm.product
    monkeypatch.setattr(arm, "product", lambda copy: product(copy) * (1 + 2**-23))
    assert not skinny.gate(arm, problem).passed


@pytest.mark.parametrize(
    ("m", "read", "peak", "wanted"),
    [(1, 1e9, 1e9, 128 * 192 / 1e9), (8, 1e9, 1e12, 13_056 / 1e9), (8, 1e12, 1e9, 8 * 128 * 192 / 1e9)],
    ids=["one row", "memory", "arithmetic"],
)
def test_the_least_time_is_the_longer_of_reading_and_multiplying(m, read, peak, wanted):
    problem = dataclasses.replace(make_problem(TINY, 1))
    assert skinny.least_seconds(m, TINY, problem, read, peak) == pytest.approx(wanted, rel=0.05)


def test_a_case_gives_a_row_per_arm_with_growth_and_roofline(monkeypatch, small_roofline):
    monkeypatch.setitem(workloads.SKINNY_LINEARS, "tiny", TINY)
    monkeypatch.setitem(workloads.SKINNY_STORES, "tiny", {"streamed": 1 << 20, "cached": 0})
    plan = Plan(modes=("int8",), isas=(skinny.best_isa(), "pdp11"), ms=(1, 4), seconds=0.0, min_rounds=2)
    name = skinny.INSTRUCTIONS.get((skinny.best_isa(), "int8"), ("none", 1))[0]
    streamed, cached = skinny.run("tiny", plan, lambda text: None, {name: 1e11})
    assert [(row.memory, row.m, row.gate.partition(":")[0]) for row in streamed] == [
        ("streamed", 1, "absent"),
        ("streamed", 4, "absent"),
        ("streamed", 1, "passed"),
        ("streamed", 4, "passed"),
    ]
    assert {row.memory for row in cached} == {"cached"}
    one, four = streamed[2:]
    assert one.growth == (1.0, 1.0, 1.0)
    assert four.growth[0] > 0
    assert four.read_gbytes_s > 0


# -- the report -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, [True]),
        ({"growth": (1.6, 1.5, 1.7)}, [False]),
        ({"m": 8, "growth": (2.6, 2.5, 2.7)}, [True]),
        ({"gate": "failed", "error": 1.0, **TIMED}, [False]),
        ({"isa": "avx512vnni"}, []),
        ({"memory": "cached"}, []),
        ({"m": 2}, []),
    ],
    ids=["kept", "missed", "eight rows", "no time", "another instruction set", "from cache", "two rows"],
)
def test_promises(changes, verdicts):
    assert [line.passed for line in skinny_report.acceptance([make_row(**changes)])] == verdicts


def test_the_table_shows_growth_beside_the_roofline():
    rows = [make_row(m=1, growth=(1.0, 1.0, 1.0)), make_row(), make_row(m=8, gate="failed", error=1.0, **TIMED)]
    text = skinny_report.tables(rows)
    assert "1.40 (1.00)" in text
    assert "78%/78%" in text
    assert "none: error over 8e-03" in text
    (section, *rest) = skinny_report.sections(rows)
    assert "Promises of few rows" in section
    assert len(rest) == 1
