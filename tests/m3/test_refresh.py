"""New weights in place: a model that was refreshed is the model of the new checkpoint, and mistakes change nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    ROUNDING,
    Answer,
    Ask,
    add,
    assert_empty,
    drain,
    drawn,
    fixed,
    make_draft,
    make_target,
    one_by_one,
    plain_core,
    reference,
    together,
)
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint

from m3.engine.config import EngineConfig, Shape
from m3.engine.core import EngineCore
from m3.engine.request import SamplingParams
from m3.models.decoder import Decoder
from m3.models.loader import load_model
from m3.models.refresh import refresh_weights
from m3.quantize.round_to_nearest import quantize_model

FAMILIES = ("llama", "llama-untied-bias", "llama-tied", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe-one-dense-layer")
TOKENS = torch.arange(3, 40)[None]


def other_checkpoint(family: str) -> tuple[dict[str, torch.Tensor], Decoder]:
    """Tensors by name, and the model, of other weights."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), family)
        tensors = load_file(Path(folder) / "model.safetensors")
        generator = torch.Generator().manual_seed(7)
        tensors = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
        save_file(tensors, Path(folder) / "model.safetensors")
        return tensors, load_model(folder)


def state(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: Decoder, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_dense(family):
    tensors, want = other_checkpoint(family)
    model = make_target(family)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert not torch.equal(model(TOKENS), want(TOKENS))
    refresh_weights(model, tensors)
    assert torch.equal(model(TOKENS), want(TOKENS))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_is_rounded_anew(family):
    tensors, dense = other_checkpoint(family)
    model, want = make_target(family, "int4"), quantize_model(dense, ROUNDING)
    refresh_weights(model, tensors)
    assert_same_state(model, state(want))
    assert torch.equal(model(TOKENS), want(TOKENS))


def test_bf16():
    tensors, want = other_checkpoint("qwen2")
    model = make_target("qwen2", "bf16")
    refresh_weights(model, tensors)
    assert torch.equal(model(TOKENS), want.to(torch.bfloat16)(TOKENS))


def test_a_part():
    """One tensor alone; the rest stays."""
    tensors, _ = other_checkpoint("llama")
    model = make_target("llama")
    before = state(model)
    name = "model.layers.1.self_attn.k_proj.weight"
    refresh_weights(model, {name: tensors[name]})
    qkv = model.blocks[1].attention.qkv.weight
    assert torch.equal(qkv[96:144], tensors[name])
    assert torch.equal(qkv[:96], before["layers.1.attention.qkv.weight"][:96])
    assert torch.equal(qkv[144:], before["layers.1.attention.qkv.weight"][144:])
    same = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert set(before) - set(same) == {"layers.1.attention.qkv.weight"}


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("names", [("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens")], ids=str)
def test_a_tied_head_and_the_embedding_are_one(weights, names):
    tensors, dense = other_checkpoint("llama-tied")
    model = make_target("llama-tied", weights)
    value = tensors["model.embed_tokens.weight"]
    refresh_weights(model, {f"{name}.weight": value for name in names})
    assert torch.equal(model.embedding, value)
    want = dense if weights == "fp32" else quantize_model(dense, ROUNDING)
    x = torch.randn(5, 64)
    assert torch.equal(model.head(x), want.head(x))


FIRST = "model.layers.0."
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({f"{FIRST}self_attn.r_proj.weight": torch.zeros(96, 64)}, "the name of a tensor of this model"),
    "a layer": ({"model.layers.3.input_layernorm.weight": torch.zeros(64)}, "the name of a tensor of this model"),
    "a shape": ({f"{FIRST}self_attn.o_proj.weight": torch.zeros(64, 95)}, r"\(64, 96\) of floating point"),
    "integers": ({"model.norm.weight": torch.zeros(64, dtype=torch.int64)}, r"\(64,\) of floating point"),
    "no tensor": ({"model.norm.weight": [1.0] * 64}, r"\(64,\) of floating point"),
    "rows of q and k exchanged": (
        {
            f"{FIRST}self_attn.q_proj.weight": torch.zeros(48, 64),
            f"{FIRST}self_attn.k_proj.weight": torch.zeros(96, 64),
            f"{FIRST}self_attn.v_proj.weight": torch.zeros(48, 64),
        },
        r"\(96, 64\) of floating point",
    ),
}


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize(("wrong", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_changes_nothing(weights, wrong, message):
    model = make_target("llama", weights)
    before = state(model)
    right = {"model.embed_tokens.weight": torch.ones(99, 64), f"{FIRST}mlp.down_proj.weight": torch.ones(64, 96)}
    with pytest.raises(ValueError, match=message):
        refresh_weights(model, {**right, **wrong})
    assert_same_state(model, before)


def test_a_part_of_a_fused_int4_linear_is_refused():
    model = make_target("llama", "int4")
    with pytest.raises(ValueError, match="one INT4 weight"):
        refresh_weights(model, {f"{FIRST}self_attn.q_proj.weight": torch.zeros(96, 64)})


def test_an_int4_weight_that_is_not_a_number_changes_nothing():
    model = make_target("llama", "int4")
    before = state(model)
    with pytest.raises(ValueError):
        refresh_weights(
            model,
            {"model.norm.weight": torch.ones(64), f"{FIRST}mlp.down_proj.weight": torch.full((64, 96), torch.nan)},
        )
    assert_same_state(model, before)


def test_a_tied_head_of_its_own_is_refused():
    model = make_target("llama-tied")
    with pytest.raises(ValueError, match="to which it is tied"):
        refresh_weights(model, {"lm_head.weight": torch.ones(99, 64), "model.embed_tokens.weight": torch.zeros(99, 64)})


# -- while an engine serves -------------------------------------------------------------------------------------------
LONG = [
    Ask([5, 6, 7, 8 + index], SamplingParams(max_tokens=20, temperature=index % 2, ignore_eos=True), index)
    for index in range(5)
]


def half_way(core: EngineCore, steps: int = 6) -> dict[str, Answer]:
    answers = {str(index): Answer() for index in range(len(LONG))}
    for index, ask in enumerate(LONG):
        add(core, ask, str(index))
    drain(core, answers, steps=steps)
    assert all(0 < len(answer.tokens) < 20 for answer in answers.values())
    return answers


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("draft", [False, True])
def test_requests_go_on_with_the_new_weights(weights, draft):
    """Their keys are computed anew: from here on each is what a fresh engine makes of its tokens so far."""
    tensors, dense = other_checkpoint("qwen3")
    fresh = dense if weights == "fp32" else quantize_model(dense, ROUNDING)
    model = make_target("qwen3", weights)
    given: dict[str, Any] = {"draft": make_draft(model), "speculation": fixed(Shape.chain(2))} if draft else {}
    core = EngineCore(model, EngineConfig(num_pages=100, page_size=4), **given)
    answers = half_way(core)
    before = [len(answers[str(index)].tokens) for index in range(len(LONG))]
    core.update_weights(tensors, 3)
    assert core.pool.cached == 0
    drain(core, answers)
    assert_empty(core)
    rest = []
    for index, (ask, count) in enumerate(zip(LONG, before, strict=True)):
        answer = answers[str(index)]
        assert answer.versions == [0] * count + [3] * (20 - count)
        params = SamplingParams(max_tokens=20 - count, temperature=ask.params.temperature, ignore_eos=True)
        rest.append(Ask(ask.prompt + answer.tokens[:count], params, ask.seed))
    want = one_by_one(plain_core(fresh), rest)
    assert [answers[str(index)].tokens[count:] for index, count in enumerate(before)] == [a.tokens for a in want]


def test_nothing_of_the_old_weights_is_found_in_the_cache():
    tensors, fresh = other_checkpoint("llama")
    core = plain_core(make_target("llama"), page_size=2)
    cases = reference().asks
    together(core, cases)
    assert core.pool.cached > 0
    core.update_weights(tensors, 1)
    want = one_by_one(plain_core(fresh, prefix_reuse=False), cases)
    assert drawn(together(core, cases)) == drawn(want)


def test_keys_may_be_kept():
    """As asynchronous RL does: nothing is computed again, and nobody else finds these keys."""
    tensors, fresh = other_checkpoint("llama")
    core = plain_core(make_target("llama"), page_size=2)
    answers = half_way(core)
    rows = core.stats.rows
    core.update_weights(tensors, 1, keep_keys=True)
    drain(core, answers)
    assert core.stats.preemptions == 0
    assert core.stats.rows - rows == sum(answer.versions.count(1) for answer in answers.values())
    assert {answer.reason for answer in answers.values()} == {"length"}
    want = one_by_one(plain_core(fresh, prefix_reuse=False), LONG)
    assert drawn(together(core, LONG)) == drawn(want)


def test_a_mistake_leaves_the_engine_as_it_was():
    core, want = plain_core(make_target("llama")), reference()
    answers = {str(index): Answer() for index in range(12)}
    for index, ask in enumerate(want.asks):
        add(core, ask, str(index))
    drain(core, answers, steps=3)
    with pytest.raises(ValueError, match="refresh_weights"):
        core.update_weights({"model.norm.weight": torch.zeros(63)}, 9)
    drain(core, answers)
    assert drawn(list(answers.values())) == drawn(want.answers)
    assert {version for answer in answers.values() for version in answer.versions} == {0}


def test_a_function_may_write():
    model = make_target("llama")
    core = plain_core(model)
    tensors, fresh = other_checkpoint("llama")
    core.update_weights(lambda: refresh_weights(model, tensors), 1)
    cases = reference().asks
    assert drawn(together(core, cases)) == drawn(one_by_one(plain_core(fresh), cases))
