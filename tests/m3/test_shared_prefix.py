"""What packed sequences share of their beginnings is computed once: the tree, and that it changes nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import make_checkpoint
from train_cases import OBJECTIVES, draw_sample, with_one_thread

from m3.train import objective, shared_prefix
from m3.train.policy_model import LoraConfig, PolicyModel
from m3.train.shared_prefix import ATTENTION, LEAST
from m3.train.streams import Sample, pack

one_thread = pytest.fixture(autouse=True, scope="module")(with_one_thread)

FAMILIES = ["llama-tied", "qwen2", "qwen3", "qwen3_moe"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folder of a tiny model of a family; made when first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_checkpoint(made[name], name)
        return made[name]

    return of


def tree_of(*sequences, least=1):
    bounds = torch.tensor([0, *(len(one) for one in sequences)]).cumsum(0)
    return shared_prefix.tree(torch.tensor([token for one in sequences for token in one]), bounds, least)


def forked(first: Sample, seed: str, shared: int, tokens: int) -> Sample:
    """Another sample, whose first ``shared`` tokens are those of ``first``."""
    other = draw_sample(seed, tokens)
    return dataclasses.replace(other, ids=torch.cat([first.ids[:shared], other.ids[shared:]]))


def rollouts() -> list[Sample]:
    """Two groups, each of a context of 20 tokens; one goes on from another's reply, one is a beginning of it; twins."""
    one, alone = draw_sample("one", 30), draw_sample("alone", 24)
    two = forked(one, "two", 20, 33)
    return [
        one,
        two,
        alone,
        forked(two, "deeper", 28, 40),
        forked(one, "a beginning", 25, 25),
        forked(alone, "other group", 20, 29),
        forked(alone, "twin", 24, 24),
    ]


# -- the tree ---------------------------------------------------------------------------------------------------------
def test_segments_begin_where_sequences_part():
    found = tree_of([1, 2, 3, 4], [1, 2, 5], [7, 8], [1, 2, 5, 6], [1, 2])
    assert found.tokens.tolist() == [0, 1, 2, 3, 6, 7, 8, 12]
    assert found.lengths == (2, 2, 1, 2, 1)
    assert found.paths == ((0, 1), (0, 2), (3,), (0, 2, 4), (0,))
    assert found.kept == (0, 1, 0, 2, 1)


def test_a_short_prefix_is_not_shared():
    found = tree_of([1, 2, 3], [1, 2, 4], least=3)
    assert (found.paths, found.kept) == (((0,), (1,)), (0, 0))
    assert tree_of([1, 2, 3], [1, 2, 4], least=2).kept == (0, 1)


def test_rows_of_shared_tokens_go_to_every_sequence():
    found = tree_of([1, 2, 3], [1, 4], [5, 6])
    rows = found.spread(torch.arange(len(found.tokens))[:, None])
    ids = torch.tensor([1, 2, 3, 1, 4, 5, 6])
    assert torch.equal(ids[found.tokens][rows[:, 0]], ids)


def test_the_context_of_a_group_is_computed_once():
    found = shared_prefix.tree(pack(rollouts()).ids, pack(rollouts()).cu_seqlens)
    assert len(found.tokens) == 30 + 13 + 24 + 12 + 0 + 9 + 0
    assert sum(found.lengths) == len(found.tokens)


# -- the model on it --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_hidden_states_are_those_of_one_sequence_at_a_time(family, name):
    model = PolicyModel.load(family(name))
    assert model.causal.config._attn_implementation == ATTENTION
    samples = rollouts()
    with torch.no_grad():
        found = model.hidden(pack(samples))
        wanted = torch.cat([model.hidden(pack([sample])) for sample in samples])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_one_sequence_at_a_time(family, name, checkpointing):
    samples = rollouts()
    plain = PolicyModel.load(family(name), attention="eager")
    model = PolicyModel.load(family(name), gradient_checkpointing=checkpointing)
    assert not plain.shares and model.shares
    total = objective.normaliser(OBJECTIVES["ppo"], samples)
    wanted = 0.0
    for sample in samples:
        loss, _ = objective.loss(OBJECTIVES["ppo"], plain, pack([sample]), total)
        loss.backward()
        wanted += float(loss.detach())
    loss, _ = objective.loss(OBJECTIVES["ppo"], model, pack(samples), total)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    theirs = dict(plain.trained())
    for key, one in model.trained():
        assert float((one.grad - theirs[key].grad).norm() / theirs[key].grad.norm()) < 1e-4, key


def test_adapters_learn_along_the_tree(family):
    pytest.importorskip("peft", reason="needs peft")
    samples = rollouts()
    model = PolicyModel.load(family("qwen3"), lora=LoraConfig(rank=2))
    assert model.shares
    found = model.logprobs(pack(samples))
    wanted = torch.cat([model.logprobs(pack([sample])) for sample in samples])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("least", [LEAST, 1000])
def test_a_sliding_window_is_kept(least):
    """Mistral sees 7 tokens back: the same as transformers with its own masks, shared or not."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=7, initializer_range=0.5,
    )  # fmt: skip
    causal = transformers.MistralForCausalLM(config).eval()
    samples = rollouts()
    with torch.no_grad():
        wanted = torch.cat([causal.model(input_ids=sample.ids[None]).last_hidden_state[0] for sample in samples])
        config.sliding_window = None
        apart = transformers.MistralForCausalLM(config).eval()
        apart.load_state_dict(causal.state_dict())
        unlimited = torch.cat([apart.model(input_ids=sample.ids[None]).last_hidden_state[0] for sample in samples])
        config.sliding_window = 7
        model = PolicyModel(causal)
        assert model.shares
        torch.testing.assert_close(model.hidden(pack(samples), least=least), wanted, rtol=0, atol=2e-5)
    assert float((wanted - unlimited).abs().max()) > 0.1


def test_a_direct_call_of_the_model_keeps_its_padding_mask(family):
    """Who generates with the model that is trained gets the attention of transformers."""
    model = PolicyModel.load(family("qwen2"))
    plain = PolicyModel.load(family("qwen2"), attention="eager")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        found, wanted = (one.causal(input_ids=ids, attention_mask=mask).logits[:, -1] for one in (model, plain))
        unmasked = model.causal(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert float((found - unmasked)[1].abs().max()) > 1e-3
