"""Acceptance of a draft: the batched walk against drafting each path alone, from the definition."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from draft_cases import AUX_LAYERS, make_material
from torch import Tensor

from m3.draft.batches import draft_vocabulary
from m3.draft.evaluate import CHAIN_3, SHAPES, TREE_8, Shape, Walk, acceptance, draft_tree, evaluate, matched
from m3.draft.hidden import StateCache
from m3.draft.store import Response
from m3.draft.train import TrainConfig, Trainer
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.models.loader import load_model
from m3kernels.spec_decode import tree_finalize
from m3kernels.spec_decode.types import Tree

EACH_SHAPE = {
    str(shape): shape for shape in (*SHAPES, Shape(steps=1, topk=1, nodes=2), Shape(steps=3, topk=2, nodes=5))
}


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama[0])


@pytest.fixture(scope="module")
def material(model, tmp_path_factory):
    return make_material(model, tmp_path_factory.mktemp("states"), train=6, held_out=0, max_tokens=14)


@pytest.fixture(scope="module")
def draft(model, material, tmp_path_factory) -> GatedEagle3:
    """A draft that has learned about half of what it is measured on."""
    config = TrainConfig(steps=15, draft_vocab=70, lr=1e-2, head_lr_factor=1.0)
    folder = tmp_path_factory.mktemp("run")
    return Trainer(model, material.train, [], material.cache, folder, config, aux_layers=AUX_LAYERS).run().eval()


# -- the definition: every path drafted alone, nothing cached ----------------------------------------------------------
@torch.no_grad()
def laws_along(draft: GatedEagle3, one: Response, cache: StateCache, root: int, path: tuple[int, ...]) -> Tensor:
    """(V_d,) log-probabilities of what follows ``path`` drafted after position ``root``."""
    text = torch.tensor(one.prompt + one.response)[: root + 1]
    aux = cache.get(one.group, one.index).aux[:root]
    inputs, hidden = draft.embed(text[1:])[None], draft.fuse(aux)[None]
    for token in (*path, None):
        positions = torch.arange(1, inputs.shape[1] + 1)
        out, _ = draft.extend(inputs, hidden, positions)
        if token is None:
            break
        inputs = torch.cat((inputs, draft.embed(torch.tensor([[token]]))), dim=1)
        hidden = torch.cat((hidden, draft.feedback(out[:, -1:])), dim=1)
    return draft.logits(out[0, -1]).log_softmax(-1)


def tree_by_definition(draft: GatedEagle3, one: Response, cache: StateCache, root: int, shape: Shape) -> set[tuple]:
    """The paths of the tree that is kept: expand the best of each step, keep the best of all."""
    ids = torch.arange(draft.config.draft_vocab_size) + draft.d2t
    frontier: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    candidates: list[tuple[tuple[int, ...], float]] = []
    for _ in range(shape.steps):
        step = []
        for path, score in frontier:
            best = laws_along(draft, one, cache, root, path).topk(shape.topk)
            step += [((*path, int(ids[i])), score + float(v)) for v, i in zip(*best, strict=True)]
        candidates += step
        frontier = sorted(step, key=lambda pair: -pair[1])[: shape.topk]
    return {path for path, _ in sorted(candidates, key=lambda pair: -pair[1])[: shape.nodes - 1]}


def paths_of(tree: Tree, row: int) -> set[tuple]:
    """Tokens from the root to every node but itself."""
    paths: dict[int, tuple] = {0: ()}
    for node in range(1, tree.candidates.shape[1]):
        if tree.parents[row, node] >= 0:
            paths[node] = (*paths[int(tree.parents[row, node])], int(tree.candidates[row, node]))
    return {path for node, path in paths.items() if node}


@pytest.mark.parametrize("shape", EACH_SHAPE.values(), ids=EACH_SHAPE)
def test_a_tree_is_that_of_the_definition(draft, material, shape):
    walk = Walk(draft, material.train, material.cache)
    rows, roots = [0, 3, 4], [len(material.train[row].prompt) + ahead for row, ahead in ((0, 0), (3, 4), (4, 9))]
    bonus = torch.tensor([walk.texts[row][root] for row, root in zip(rows, roots, strict=True)])
    tree = draft_tree(walk, torch.tensor(rows), torch.tensor(roots), bonus, shape)
    assert tree.candidates[:, 0].tolist() == bonus.tolist()
    for at, (row, root) in enumerate(zip(rows, roots, strict=True)):
        assert paths_of(tree, at) == tree_by_definition(draft, material.train[row], material.cache, root, shape)


def test_acceptance_is_counted_round_by_round(draft, material):
    """A chain of 2 on the first response, by hand."""
    one, shape = material.train[0], Shape(steps=2, topk=1, nodes=3)
    text = one.prompt + one.response
    root, rounds = len(one.prompt), 0
    while root < len(text) - 1:
        (path,) = [path for path in tree_by_definition(draft, one, material.cache, root, shape) if len(path) == 2]
        right = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path, text[root + 1 :], strict=False))
        root = min(root + 1 + len(list(right)), len(text) - 1)
        rounds += 1
    found = acceptance(Walk(draft, [one], material.cache), shape)
    assert (found.rounds, found.tokens) == (rounds, len(one.response) - 1)
    assert found.length == found.tokens / rounds
    assert 1 < found.length < 3


def test_neighbours_change_nothing(draft, material):
    together = acceptance(Walk(draft, material.train, material.cache), TREE_8)
    alone = [acceptance(Walk(draft, [one], material.cache), TREE_8) for one in material.train]
    assert together.by_response == tuple((one.rounds, one.tokens) for one in alone)
    assert together.rounds == sum(one.rounds for one in alone)


def test_all_shapes_and_how_far_they_are(draft, material):
    seen: list[tuple[int, int]] = []
    found = evaluate(draft, material.train[:2], material.cache, SHAPES, lambda done, total: seen.append((done, total)))
    assert [one.shape for one in found] == list(SHAPES)
    total = 4 * sum(len(one.response) - 1 for one in material.train[:2])
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_draft_that_knows_nothing_gains_nothing(model, material):
    """Its vocabulary has no token of the texts."""
    said = {token for one in material.train for token in one.response}
    unsaid = torch.tensor([token for token in range(99) if token not in said])
    shape = GatedEagle3Config.for_target(model.config, draft_vocab_size=len(unsaid), gate="none", aux_layers=AUX_LAYERS)
    found = acceptance(Walk(GatedEagle3.warm_start(shape, model, unsaid), material.train, material.cache), CHAIN_3)
    assert found.length == 1.0
    assert found.rounds == found.tokens


def tree_of(chains: list[list[int]], root: int) -> Tree:
    """A tree of two steps with two nodes each: [[a, b], [aa, ab, ba, bb]]."""
    scores = torch.tensor([[-1.0, -2.0, -1.5, -1.6, -2.5, -2.6]])
    tokens = torch.tensor([[*chains[0], *chains[1]]])
    parents = torch.tensor([[-1, 0, 1]])
    lengths = torch.tensor([3])
    return tree_finalize(scores, tokens, parents, torch.tensor([root]), lengths, topk=2, num_nodes=7)


TEXTS = {
    "nothing": ([9, 1], 0),
    "first child": ([9, 5, 1], 1),
    "second child": ([9, 6, 1], 1),
    "grandchild of the first": ([9, 5, 8, 5], 2),
    "grandchild of the second": ([9, 6, 7, 5], 2),
    "another's grandchild": ([9, 6, 8, 5], 1),
    "text ends": ([9, 5], 1),
    "text is over": ([9], 0),
}


@pytest.mark.parametrize(("text", "wanted"), TEXTS.values(), ids=TEXTS)
def test_what_a_tree_spells(text, wanted):
    assert matched(tree_of([[5, 6], [7, 8, 7, 4]], 9), [text]) == [wanted]


def test_only_greedy_responses_say_what_is_accepted(draft, material):
    warm = dataclasses.replace(material.train[0], temperature=0.7)
    with pytest.raises(ValueError, match="responses: want one or more, all of temperature 0"):
        Walk(draft, [warm], material.cache)


def test_the_vocabulary_of_the_draft_is_used(draft, material):
    said = draft_vocabulary(material.train, material.cache, 70, 99)
    walk = Walk(draft, material.train, material.cache)
    tree = draft_tree(walk, torch.tensor([0]), torch.tensor([walk.first[0]]), torch.tensor([0]), TREE_8)
    assert set(tree.candidates[0, 1:].tolist()) <= set(said.tolist())
