"""Trees through transformers' attention seam: each node as decoded alone, the cache compacted, padding, windows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import SMALL, make_checkpoint
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache

from m3.plugins.transformers_tree import keep_path, tree_bits
from m3kernels.spec_decode import tree_finalize, tree_verify

PARENTS = [-1, 0, 0, 1, 2, 2, 4]
MASK = torch.tensor(  # row i: the ancestors of node i, and i
    [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 0, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 1, 0, 1],
    ]
).bool()
DEPTH = MASK.sum(1) - 1
NODES = torch.tensor([[5, 7, 9, 11, 13, 7, 1]])
PREFIX = 13
TOLERANCE = {"atol": 5e-5, "rtol": 0}  # logits of about 5, fp32, another order of summation


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(the model over our kernel, the same in transformers' eager attention)."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = make_checkpoint(folder, request.param)
    return load(folder), reference


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="m3_tree", dtype=dtype)


def prompts(count: int = PREFIX, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, SMALL["vocab_size"], (rows, count), generator=torch.Generator().manual_seed(0))


def through_tree(model: torch.nn.Module, mask: torch.Tensor):
    cache = model(prompts()).past_key_values
    return model(NODES, position_ids=PREFIX + DEPTH[None], past_key_values=cache, tree_mask=mask), cache


@pytest.mark.parametrize("form", ["bools", "bits"])
def test_every_node_is_what_decoding_its_path_gives(form, models):
    model, reference = models
    found, _ = through_tree(model, MASK[None] if form == "bools" else tree_bits(MASK[None]))
    alone = [reference(torch.cat([prompts(), NODES[:, row]], 1)).logits[0, -1] for row in MASK]
    torch.testing.assert_close(found.logits[0], torch.stack(alone), **TOLERANCE)


def test_a_tree_that_grows_level_by_level(models):
    model, reference = models
    cache = model(prompts()).past_key_values
    rows = []
    for start, stop in ((0, 1), (1, 3), (3, 6), (6, 7)):
        level = slice(start, stop)
        options = {"position_ids": PREFIX + DEPTH[None, level], "tree_mask": MASK[None, level, :stop]}
        rows.append(model(NODES[:, level], past_key_values=cache, **options).logits[0])
    alone = [reference(torch.cat([prompts(), NODES[:, row]], 1)).logits[0, -1] for row in MASK]
    torch.testing.assert_close(torch.cat(rows), torch.stack(alone), **TOLERANCE)


def test_a_path_that_is_kept_goes_on_as_plain_decoding(models):
    model, reference = models
    _, cache = through_tree(model, MASK[None])
    keep_path(cache, PREFIX, torch.tensor([[0, 2, 4]]))
    assert cache.get_seq_length() == PREFIX + 3
    last = torch.tensor([[3]])
    plain = reference(torch.cat([prompts(), NODES[:, [0, 2, 4]], last], 1))
    torch.testing.assert_close(model(last, past_key_values=cache).logits[:, -1], plain.logits[:, -1], **TOLERANCE)
    for layer, wanted in zip(cache.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, wanted.keys, **TOLERANCE)
        torch.testing.assert_close(layer.values, wanted.values, **TOLERANCE)


def test_speculation_with_our_verification_writes_plain_greedy_text(models):
    """Trees of two guesses a node, one of them now and then right: draft, one pass, walk, keep, again."""
    model, reference = models
    reference.generation_config.eos_token_id = None
    count = 24
    prompt = prompts()
    plain = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    answer = plain[0, PREFIX:].tolist()
    out = model(prompt)
    cache, text, passes = out.past_key_values, [int(out.logits[0, -1].argmax())], 0
    while len(text) < count - 3:
        guess = answer[len(text) :] if passes % 3 else [0] * count  # the second branch is right, or none is
        candidates = torch.tensor([[text[-1], 1, guess[0], 2, guess[1]]])
        mask = torch.tensor(
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]]
        ).bool()
        prefix = cache.get_seq_length()
        logits = model(
            candidates, position_ids=prefix + mask.sum(1)[None] - 1, past_key_values=cache, tree_mask=mask[None]
        ).logits
        links = torch.tensor([[1, -1, 3, -1, -1]]), torch.tensor([[-1, 2, -1, 4, -1]])
        verified = tree_verify(logits, candidates, *links, mode="greedy")
        accepted = int(verified.accept_length[0]) + 1
        text += verified.tokens[0, :accepted].tolist()
        keep_path(cache, prefix, verified.accept_index[:, :accepted])
        passes += 1
    assert text == answer[: len(text)]
    assert passes < len(text) - 6


def test_bits():
    mask = torch.zeros(2, 40).bool()
    mask[0, [0, 31, 32]] = True
    mask[1, 39] = True
    assert tree_bits(mask).tolist() == [[1 - 2**31, 1], [0, 128]]


def test_trees_as_our_kernels_make_them(models):
    """Tree.mask_bits and Tree.positions go in as they are."""
    model, reference = models
    scores, tokens = torch.tensor([[-0.1, -0.9, -0.2, -0.3, -1.0, -2.0]]), torch.tensor([[7, 9, 11, 13, 15, 17]])
    parents, seq_lens = torch.tensor([[-1, 0, 1]]), torch.tensor([PREFIX])
    tree = tree_finalize(scores, tokens, parents, torch.tensor([5]), seq_lens, topk=2, num_nodes=6)
    cache = model(prompts()).past_key_values
    found = model(tree.candidates, position_ids=tree.positions, past_key_values=cache, tree_mask=tree.mask_bits)
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1, 2]]
    paths = []
    for node in range(tree.candidates.shape[1]):
        path = [node]
        while tree.parents[0, path[0]] >= 0:
            path.insert(0, int(tree.parents[0, path[0]]))
        paths.append(tree.candidates[:, path])
    alone = [reference(torch.cat([prompts(), path], 1)).logits[0, -1] for path in paths]
    torch.testing.assert_close(found.logits[0], torch.stack(alone), **TOLERANCE)


# -- plain use --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding", [[0, 4], [5, 0], [0, 0]], ids=["second", "first", "none"])
def test_padded_prompts_and_generation_are_those_of_eager_attention(padding, models):
    model, reference = models
    ids = prompts(9, rows=2)
    mask = (torch.arange(9)[None] >= torch.tensor(padding)[:, None]).long()
    got, want = (one(ids, attention_mask=mask).logits[mask.bool()] for one in (model, reference))
    torch.testing.assert_close(got, want, **TOLERANCE)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_a_tree_behind_a_padded_prompt(models):
    model, reference = models
    ids, mask = prompts(9, rows=2), torch.ones(2, 9).long()
    mask[1, :4] = 0
    cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
    positions = mask.sum(1)[:, None] + DEPTH
    both = torch.cat([mask, torch.ones(2, 7).long()], 1)
    options = {"attention_mask": both, "position_ids": positions, "tree_mask": MASK.expand(2, -1, -1)}
    found = model(NODES.expand(2, -1), past_key_values=cache, **options)
    alone = [reference(torch.cat([ids[1:, 4:], NODES[:, row]], 1)).logits[0, -1] for row in MASK]
    torch.testing.assert_close(found.logits[1], torch.stack(alone), **TOLERANCE)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("window")
    torch.manual_seed(0)
    config = Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    reference = Qwen3ForCausalLM(config).eval()
    reference.save_pretrained(folder)
    return load(folder), reference


def test_a_sliding_window(windowed):
    model, reference = windowed
    ids = prompts(17, rows=2)
    assert "sliding_attention" in model.config.layer_types
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, **TOLERANCE)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_bfloat16(models, tmp_path):
    model, reference = models
    reference.save_pretrained(tmp_path)
    half = load(tmp_path, torch.bfloat16)
    found, wanted = half(prompts()).logits, model(prompts()).logits
    assert found.dtype == torch.bfloat16
    assert 1e-3 < float((found.float() - wanted).abs().mean()) < 0.05  # a mean: at a near tie an expert may change


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK, r"m3_tree: tree_mask: want \(1, 7, W\) int32.*; got"),
        (MASK[None, :, :5], r"m3_tree: tree_mask: want .*M at least 7"),
        (MASK[None].long(), r"m3_tree: tree_mask: want .*int32"),
    ],
    ids=["no batch", "too few keys", "another dtype"],
)
def test_masks_that_do_not_fit(mask, message, models):
    with pytest.raises(ValueError, match=message):
        through_tree(models[0], mask)


def test_gradients_are_refused(models):
    with torch.enable_grad(), pytest.raises(ValueError, match="tree_attention: k_cache: want no gradient"):
        models[0](prompts())


def test_sequences_packed_behind_one_another_are_refused(models):
    with pytest.raises(
        ValueError, match="m3_tree: position_ids: want one sequence a row, or a tree with its tree_mask"
    ):
        models[0](prompts(), position_ids=torch.arange(PREFIX)[None] % 7)


def test_a_cache_of_fixed_size_is_refused(models):
    with pytest.raises(ValueError, match=r"m3_tree: past_key_values: want a cache that grows .*; got one of 32 slots"):
        models[0](prompts(), past_key_values=StaticCache(config=models[0].config, max_cache_len=32))


def test_dropout_is_refused(tmp_path, llama):
    folder = Path(shutil.copytree(llama[0], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    with pytest.raises(ValueError, match=r"m3_tree: dropout: want 0.*; got 0\.1"):
        load(folder).train()(prompts())


@pytest.mark.parametrize(
    "path",
    [torch.tensor([[0, 7]]), torch.tensor([[2, 0]]), torch.tensor([0, 1]), torch.tensor([[-1, 0]])],
    ids=["no such node", "not ascending", "no batch", "negative"],
)
def test_paths_that_are_none(path, models):
    _, cache = through_tree(models[0], MASK[None])
    with pytest.raises(ValueError, match=r"keep_path: path: want \(1, S\) nodes, ascending in 0\.\.6; got"):
        keep_path(cache, PREFIX, path)


def test_a_window_cannot_be_compacted(windowed):
    cache = windowed[0](prompts()).past_key_values
    with pytest.raises(ValueError, match="keep_path: cache: want layers of a DynamicCache without a window"):
        keep_path(cache, PREFIX - 2, torch.tensor([[0]]))
