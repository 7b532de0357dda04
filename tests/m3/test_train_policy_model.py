"""The trained model: packed sequences do not see one another, its head is linear, its weights are the checkpoint's."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint
from train_cases import OBJECTIVES, draw_samples, with_one_thread

from m3.checkpoint import Checkpoint
from m3.models.loader import load_model
from m3.models.refresh import refresh_weights
from m3.train import objective
from m3.train.optim import OptimConfig, Optimizer
from m3.train.policy_model import LoraConfig, PolicyModel
from m3.train.streams import pack

one_thread = pytest.fixture(autouse=True, scope="module")(with_one_thread)

FAMILIES = ["llama-tied", "qwen2", "qwen3", "qwen3_moe"]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folder of a tiny model of a family; made when first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_checkpoint(made[name], name)
        return made[name]

    return of


# -- packed -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_hidden_states_are_those_of_one_sequence_at_a_time(family, name, attention):
    model = PolicyModel.load(family(name), attention=attention)
    samples = draw_samples(lengths=(9, 2, 17, 2, 6))
    with torch.no_grad():
        found = model.hidden(pack(samples))
        wanted = torch.cat([model.hidden(pack([sample])) for sample in samples])
    assert float(wanted.abs().max()) > 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_a_neighbour_changes_nothing(llama):
    """Bitwise: the same places, other tokens in the other sequences."""
    model = PolicyModel.load(llama[0])
    one, two, three = draw_samples(lengths=(8, 12, 5))
    other = draw_samples("b", lengths=(8, 12, 5))
    with torch.no_grad():
        found = model.hidden(pack([one, two, three]))[8:20]
        beside = model.hidden(pack([other[0], two, other[2]]))[8:20]
    assert torch.equal(found, beside)


def test_hidden_states_and_head_give_the_logits_of_the_model(llama):
    model = PolicyModel.load(llama[0])
    sample = draw_samples(lengths=(9,))[0]
    with torch.no_grad():
        logits = model.hidden(pack([sample])) @ model.head.weight.T
        torch.testing.assert_close(logits, llama[1](input_ids=sample.ids[None]).logits[0], rtol=0, atol=2e-5)
    assert model.head.bias is None and model.head.softcap == 0


# -- what it refuses, and what it turns off ---------------------------------------------------------------------------
def test_a_head_that_is_not_linear_is_refused(family):
    import transformers

    causal = transformers.AutoModelForCausalLM.from_pretrained(family("qwen2"))
    causal.lm_head.register_forward_hook(lambda module, ids, logits: 2 * logits)
    with pytest.raises(ValueError, match=r"PolicyModel: causal: want logits that are a linear head.*nats off"):
        PolicyModel(causal)


def test_a_capped_head_is_read_as_such():
    """Gemma 2 caps its logits: cap * tanh(u / cap)."""
    import transformers

    torch.manual_seed(0)
    shape = dict(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Gemma2Config(
        **shape, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, initializer_range=0.5
    )
    model = PolicyModel(transformers.Gemma2ForCausalLM(config).eval())
    assert model.head.softcap == 2.0
    sample = draw_samples(lengths=(9,))[0]
    laws = model.causal(input_ids=sample.ids[None]).logits[0].log_softmax(-1)
    places = sample.mask.nonzero()[:, 0]
    torch.testing.assert_close(
        model.logprobs(pack([sample]))[places], laws[places - 1, sample.ids[places]], rtol=0, atol=2e-5
    )


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"PolicyModel.load: folder: want a Hugging Face checkpoint with config\.json"):
        PolicyModel.load(tmp_path)


def test_dropout_is_off(family):
    import transformers

    causal = transformers.AutoModelForCausalLM.from_pretrained(family("qwen3"), attention_dropout=0.5)
    model = PolicyModel(causal)
    packed = pack(draw_samples())
    with torch.no_grad():
        assert torch.equal(model.train().hidden(packed), model.eval().hidden(packed))


# -- its weights ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_named_and_shaped_as_in_the_checkpoint(family, name):
    saved = Checkpoint(family(name))
    tensors = PolicyModel.load(family(name)).tensors()
    assert tensors.keys() == saved.names
    assert all(torch.equal(tensors[key], saved.get(key)) for key in saved.names)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engines_model_takes_the_tensors(family, name):
    """After one update of the trainer, the decoder says what the trainer does."""
    model, decoder = PolicyModel.load(family(name)), load_model(family(name))
    with torch.no_grad():
        for index, (_, parameter) in enumerate(model.trained()):
            parameter.mul_(1.1 + 0.01 * index)
    refresh_weights(decoder, model.tensors())
    ids = draw_samples(lengths=(12,))[0].ids
    with torch.no_grad():
        wanted = model.causal(input_ids=ids[None]).logits[0].log_softmax(-1)
        found = decoder(ids[None])[0].float().log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_the_same_model(family, tmp_path, name):
    model = PolicyModel.load(family(name))
    with torch.no_grad():
        model.head.weight.mul_(1.25)
    model.save(tmp_path / "saved")
    again = PolicyModel.load(tmp_path / "saved")
    assert again.causal.config.to_dict() | {"_name_or_path": ""} == model.causal.config.to_dict() | {
        "_name_or_path": ""
    }
    assert all(torch.equal(value, again.tensors()[key]) for key, value in model.tensors().items())


def test_a_tied_weight_learns_once(family):
    names = [name for name, _ in PolicyModel.load(family("llama-tied")).trained()]
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1


# -- how it is trained ------------------------------------------------------------------------------------------------
def gradients(model: PolicyModel) -> dict[str, torch.Tensor]:
    loss, _ = objective.loss(OBJECTIVES["spar"], model, pack(draw_samples()), 5.0)
    loss.backward()
    return {name: one.grad for name, one in model.trained()}


def test_gradient_checkpointing_has_the_same_gradients(llama):
    plain = gradients(PolicyModel.load(llama[0]))
    kept = PolicyModel.load(llama[0], gradient_checkpointing=True)
    calls = []
    kept.causal.model.layers[0].input_layernorm.register_forward_hook(lambda *call: calls.append(1))
    found = gradients(kept)
    assert len(calls) == 2  # forward, and again in the backward pass
    assert all(torch.equal(found[name], one) for name, one in plain.items())


def test_bf16_weights_give_the_loss_to_their_precision(llama):
    samples = draw_samples()
    model, coarse = PolicyModel.load(llama[0]), PolicyModel.load(llama[0], dtype=torch.bfloat16)
    fine_logprobs, logprobs = model.logprobs(pack(samples)), coarse.logprobs(pack(samples))
    assert logprobs.dtype == torch.float32
    assert float((logprobs - fine_logprobs).abs().mean()) < 0.1
    loss, _ = objective.loss(OBJECTIVES["clip-forward-kl"], coarse, pack(samples), 1.0)
    loss.backward()
    assert all(one.grad.dtype == torch.bfloat16 for _, one in coarse.trained())


def test_bf16_passes_leave_the_weights_their_precision(llama):
    samples, fine = draw_samples(), PolicyModel.load(llama[0])
    model = PolicyModel.load(llama[0], compute=torch.bfloat16)
    error = (model.logprobs(pack(samples)) - fine.logprobs(pack(samples))).abs()
    assert 0 < float(error.mean()) < 0.05
    wanted, found = gradients(fine), gradients(model)
    assert all(one.dtype == torch.float32 for one in found.values())
    worst = max(float((found[name] - one).norm() / one.norm()) for name, one in wanted.items())
    assert worst < 0.1
    before = {name: one.detach().clone() for name, one in model.trained()}
    Optimizer(model, OptimConfig(lr=1e-6)).step(1e-6)
    assert all(not torch.equal(before[name], one) for name, one in model.trained())


# -- adapters ---------------------------------------------------------------------------------------------------------
@needs_peft
def test_adapters_alone_learn_and_begin_as_nothing(llama):
    model, plain = PolicyModel.load(llama[0], lora=LoraConfig(rank=4)), PolicyModel.load(llama[0])
    packed = pack(draw_samples())
    assert torch.equal(model.logprobs(packed), plain.logprobs(packed))
    names = [name for name, _ in model.trained()]
    assert len(names) == 3 * 7 * 2 and all(".lora_" in name for name in names)
    assert all(torch.equal(value, plain.tensors()[name]) for name, value in model.tensors().items())


@needs_peft
def test_a_fingerprint_tells_frozen_weights_apart(llama):
    assert PolicyModel.load(llama[0]).frozen() == ""
    model = PolicyModel.load(llama[0], lora=LoraConfig(rank=4))
    with torch.no_grad():
        next(one for _, one in model.trained()).fill_(7.0)
    assert model.frozen() == PolicyModel.load(llama[0], lora=LoraConfig(rank=4)).frozen() != ""
    with torch.no_grad():
        model.causal.model.norm.weight[0] += 1
    assert model.frozen() != PolicyModel.load(llama[0], lora=LoraConfig(rank=4)).frozen()


@needs_peft
@pytest.mark.parametrize("checkpointing", [False, True])
def test_merged_adapters_are_the_model_that_was_trained(llama, tmp_path, checkpointing):
    model = PolicyModel.load(llama[0], lora=LoraConfig(rank=4, alpha=8.0), gradient_checkpointing=checkpointing)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, one in model.trained():
            one.copy_(torch.randn(one.shape, generator=chance) * 0.1)
    assert all(float(one.abs().max()) > 0 for one in gradients(model).values())
    model.save(tmp_path / "merged")
    packed = pack(draw_samples())
    merged = PolicyModel.load(tmp_path / "merged")
    torch.testing.assert_close(merged.logprobs(packed), model.logprobs(packed), rtol=0, atol=5e-5)
    assert float((model.logprobs(packed) - PolicyModel.load(llama[0]).logprobs(packed)).abs().max()) > 0.1


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}])
def test_lora_numbers_are_checked(wrong):
    with pytest.raises(ValueError, match="LoraConfig: rank, alpha"):
        dataclasses.replace(LoraConfig(), **wrong)
