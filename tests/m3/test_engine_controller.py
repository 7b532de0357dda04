"""The controller on simulated machines: it finds the fastest way, pays little for looking, and changes its mind."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from m3.engine.config import CHAINS, Shape
from m3.engine.controller import Controller, PassCost

TREE = Shape(steps=4, topk=4, nodes=8)
SHAPES = (*CHAINS, TREE)
Way = Shape | None
Machine = Callable[[Way, int], tuple[float, int]]  # (way, requests) -> seconds, tokens of a step


def machine(seconds: dict[Way, float], tokens: dict[Way, float], *, noise: float = 0.05, load: float = 0.0) -> Machine:
    """Seconds of a step grow by ``load`` a node and request; tokens are drawn with the mean given."""
    chance = random.Random(0)

    def step(way: Way, requests: int) -> tuple[float, int]:
        nodes = 1 if way is None else way.nodes
        whole, part = divmod(tokens[way] * requests, 1)
        wall = seconds[way] + load * nodes * requests
        return wall * chance.uniform(1 - noise, 1 + noise), int(whole) + (chance.random() < part)

    return step


def serve(controller: Controller, world: Machine, requests: int, steps: int) -> tuple[float, float, list[Way]]:
    """Seconds, tokens and ways of so many steps."""
    total, count, ways = 0.0, 0.0, []
    for _ in range(steps):
        way = controller.choose(requests)
        seconds, tokens = world(way, requests)
        controller.record(requests, way, seconds, tokens)
        total, count = total + seconds, count + tokens
        ways.append(way)
    return total, count, ways


EVEN = dict.fromkeys((None, *SHAPES), 1.0)
COST = {None: 1.0, **{shape: 1.0 + 0.1 * shape.nodes for shape in SHAPES}}
GOOD = {None: 1.0, **dict(zip(SHAPES, (1.6, 2.0, 2.2, 3.0), strict=True))}


@pytest.mark.parametrize("requests", [1, 3, 16, 64])
def test_never_much_slower_than_plain(requests):
    """Drafts that are never accepted cost what it takes to find out, and 1 % from then on."""
    total, tokens, ways = serve(Controller(SHAPES), machine(COST, EVEN), requests, 1000)
    plain = machine(COST, EVEN)
    alone = sum(plain(None, requests)[0] for _ in range(1000))
    assert tokens == 1000 * requests
    assert total < 1.03 * alone
    assert ways[-200:].count(None) > 190


@pytest.mark.parametrize(
    ("accepted", "best"),
    [
        (GOOD, TREE),
        ({**EVEN, SHAPES[0]: 1.9}, SHAPES[0]),
        ({**EVEN, SHAPES[2]: 2.9}, SHAPES[2]),
        (EVEN, None),
    ],
    ids=["tree", "chain 1", "chain 3", "plain"],
)
def test_the_fastest_way_is_found(accepted, best):
    total, tokens, ways = serve(Controller(SHAPES), machine(COST, accepted), 1, 600)
    assert ways[100:].count(best) > 400
    rate = accepted[best] / COST[best]
    assert tokens / total > 0.96 * rate


def test_each_load_has_its_own_answer():
    """Where rows cost time, speculation pays for one request and not for sixteen."""
    controller, world = Controller(SHAPES), machine(COST, GOOD, load=0.2)
    for _ in range(300):
        for requests in (1, 16):
            way = controller.choose(requests)
            controller.record(requests, way, *world(way, requests))
    assert serve(controller, world, 1, 50)[2].count(None) < 5
    assert serve(controller, world, 16, 50)[2].count(None) > 40


@pytest.mark.parametrize(("before", "after", "best"), [(GOOD, EVEN, None), (EVEN, GOOD, TREE)], ids=["worse", "better"])
def test_it_changes_its_mind(before, after, best):
    controller = Controller(SHAPES)
    serve(controller, machine(COST, before), 1, 400)
    ways = serve(controller, machine(COST, after), 1, 1500)[2]
    assert ways[-100:].count(best) > 90


def test_a_way_that_becomes_much_slower_is_left():
    """A step that takes long once says nothing; steps that all do, do."""
    controller = Controller((TREE,))
    serve(controller, machine(COST, GOOD), 1, 100)
    controller.record(1, TREE, 500.0, 3)
    assert serve(controller, machine(COST, GOOD), 1, 50)[2].count(TREE) > 45
    slow = {**COST, TREE: 10.0}
    ways = serve(controller, machine(slow, GOOD), 1, 100)[2]
    assert ways[-50:].count(None) > 45


def test_without_adaption_the_first_shape_is_used():
    controller = Controller((TREE, *CHAINS), adaptive=False)
    assert set(serve(controller, machine(COST, EVEN), 4, 20)[2]) == {TREE}
    assert controller.report() == []


def test_the_report_is_what_was_measured():
    controller = Controller((TREE,))
    serve(controller, machine(COST, GOOD, noise=0.0), 3, 40)
    rows = {row["way"]: row for row in controller.report()}
    assert set(rows) == {"plain", str(TREE)}
    assert {row["requests"] for row in rows.values()} == {4}
    assert rows[str(TREE)]["tokens_per_step"] == pytest.approx(9.0)
    assert rows[str(TREE)]["seconds_per_step"] == pytest.approx(COST[TREE])
    assert sum(row["steps"] for row in rows.values()) == 40


# -- the cost of a pass -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("experts", [False, True])
def test_the_cost_of_a_pass_is_found(experts):
    cost, chance = PassCost(experts=experts), random.Random(0)
    assert cost.table(10) is None
    for _ in range(200):
        rows, touched = chance.randint(1, 64), chance.uniform(1, 30)
        seconds = 0.01 + 0.0005 * rows + (0.002 * touched if experts else 0.0)
        cost.add(rows, touched, seconds * chance.uniform(0.99, 1.01))
    table = cost.table(400)
    assert table is not None
    of_rows, of_expert = table
    assert of_rows.dtype == torch.float64
    assert len(of_rows) == 401
    torch.testing.assert_close(of_rows, 0.01 + 0.0005 * torch.arange(401, dtype=torch.float64), rtol=0.1, atol=1e-3)
    assert of_expert == pytest.approx(0.002 if experts else 0.0, rel=0.05)


def test_costs_are_never_negative():
    cost = PassCost(experts=True)
    for rows in range(1, 40):
        cost.add(rows, 40 - rows, 1.0 / rows)
    assert min(cost.coefficients()) >= 0
    table = cost.table(3)
    assert table is not None
    assert bool((table[0] > 0).all())


def test_the_same_pass_again_and_again():
    """Nothing tells rows from the rest: some finite cost all the same."""
    cost = PassCost(experts=False)
    for _ in range(20):
        cost.add(4, 0.0, 0.02)
    table = cost.table(8)
    assert table is not None
    assert float(table[0][4]) == pytest.approx(0.02, rel=0.01)
