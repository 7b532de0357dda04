"""transformers over our INT4 kernels: logits against dequantised weights and our engine, round trips, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from int4_formats import QUANTIZATION, rewrite
from quantize_files import config_of
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, make_checkpoint
from transformers import AutoModel, AutoModelForCausalLM

from m3.engine.core import EngineCore
from m3.engine.engine import Engine
from m3.engine.request import SamplingParams
from m3.models.hub import resolve
from m3.models.loader import load_model
from m3.plugins.transformers import Int4Config, register
from m3.plugins.transformers_int4 import PackedExperts, PackedLinear
from m3.quantize.export import export_model
from m3.quantize.job import quantize_checkpoint
from m3.quantize.round_to_nearest import RoundConfig, quantize_model

RELATIVE_ERROR = 5e-6  # fp32 in another order of summation, relative to the largest logit
EXACT = Int4Config(activations="exact")
FAMILIES = ("llama-tied", "llama-untied-bias", "qwen3", "qwen3_moe")


@pytest.fixture(autouse=True)
def unclaimed() -> Iterator[None]:
    yield
    register(())


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a folder as `m3 quantize` writes it: asymmetric, in fp32."""
    folders = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        make_checkpoint(folder / "dense", family)
        rounded = quantize_model(load_model(folder / "dense"), RoundConfig(group_size=32, symmetric=False))
        export_model(rounded, folder / "int4", folder / "dense", dtype=torch.float32)
        folders[family] = folder / "int4"
    return folders


def load(folder: Path, config: Int4Config | None = EXACT, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)


def tokens(count: int = 29) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (2, count), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found = model(tokens())
    return found if isinstance(found, torch.Tensor) else found.logits


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def change_settings(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_our_loader(family, quantised):
    assert (
        relative_error(logits(load(quantised[family])), logits(load_model(quantised[family], activations="exact")))
        <= RELATIVE_ERROR
    )


@pytest.mark.parametrize("family", ["llama-tied", "qwen3_moe"])
def test_greedy_text_and_log_probabilities_are_those_of_the_engine(family, quantised):
    model = load(quantised[family])
    engine = Engine(EngineCore(load_model(quantised[family], activations="exact")))
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs="raw")
    wanted = engine.generate(tokens(9).tolist(), params)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens(9))
    got = model.generate(tokens(9), attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    drawn = got.sequences[:, 9:]
    assert drawn.tolist() == [one.tokens for one in wanted]
    found = torch.stack(got.logits, 1).log_softmax(-1).gather(2, drawn[..., None])[..., 0]
    torch.testing.assert_close(found, torch.tensor([one.logprobs for one in wanted]), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, "llama") for kind in QUANTIZATION] + [("gptq-act-order", "qwen3_moe"), ("awq", "qwen3_moe")],
)
def test_formats_are_read_and_written_back_bit_for_bit(kind, family, tmp_path):
    reference = make_checkpoint(tmp_path / "in", family)
    rewrite(tmp_path / "in", kind, reference)
    model = load(tmp_path / "in")
    assert relative_error(logits(model), logits(reference)) <= RELATIVE_ERROR
    model.save_pretrained(tmp_path / "out")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: tensor.dtype for name, tensor in want.items()}
    assert [name for name in want if not torch.equal(want[name], got[name])] == []
    assert settings_of(tmp_path / "out") == QUANTIZATION[kind]


def test_the_quantisation_job_with_a_layer_that_stays_dense(tmp_path):
    make_checkpoint(tmp_path / "dense", "qwen3_moe-one-dense-layer")
    kept = "model.layers.1.mlp.down_proj"
    quantize_checkpoint(tmp_path / "dense", tmp_path / "int4", config_of("rtn", keep=(kept,)))
    model = load(tmp_path / "int4", None)
    assert type(model.get_submodule(kept)) is torch.nn.Linear
    assert isinstance(model.get_submodule("model.layers.1.mlp.up_proj"), PackedLinear)
    assert isinstance(model.get_submodule("model.layers.2.mlp.experts"), PackedExperts)
    ours = load_model(tmp_path / "int4", activations="exact")
    assert relative_error(logits(load(tmp_path / "int4")), logits(ours)) <= RELATIVE_ERROR


def test_what_was_saved_loads_again_in_both(quantised, tmp_path):
    model = load(quantised["qwen3_moe"], None)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path, None)), logits(model))
    ours = load_model(quantised["qwen3_moe"], activations="exact")
    assert torch.equal(logits(load_model(tmp_path, activations="exact")), logits(ours))


def test_scales_keep_their_dtype_and_the_rest_gets_the_models(quantised):
    model = load(quantised["qwen3_moe"], dtype=torch.bfloat16)
    experts, linear = model.model.layers[0].mlp.experts, model.model.layers[0].self_attn.q_proj
    assert isinstance(experts, PackedExperts)
    assert isinstance(linear, PackedLinear)
    assert {experts.w13.int4.scales.dtype, linear.weight.int4.scales.dtype} == {torch.float16}
    assert model.model.norm.weight.dtype == torch.bfloat16
    fp32 = logits(load(quantised["qwen3_moe"]))
    assert 1e-4 < relative_error(logits(model).float(), fp32) < 0.1  # bf16 activations


def test_a_quantised_head(tmp_path):
    make_checkpoint(tmp_path / "dense", "llama-untied-bias")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    cut = {name: tensor[:96].contiguous() if len(tensor) == 99 else tensor for name, tensor in tensors.items()}
    save_file(cut, tmp_path / "dense" / "model.safetensors", {"format": "pt"})  # GPTQ wants rows in multiples of 8
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "vocab_size": 96}))
    rounded = quantize_model(load_model(tmp_path / "dense"), RoundConfig(group_size=32, head=True))
    export_model(rounded, tmp_path / "int4", tmp_path / "dense", dtype=torch.float32)
    found = load(tmp_path / "int4")
    assert isinstance(found.lm_head, PackedLinear)
    ids = tokens() % 96
    with torch.no_grad():
        got, want = found(ids).logits, load_model(tmp_path / "int4", activations="exact")(ids)
    assert relative_error(got, want) <= RELATIVE_ERROR


def test_a_model_without_its_head(quantised):
    model = AutoModel.from_pretrained(quantised["llama-tied"], dtype=torch.float32, quantization_config=EXACT)
    whole = load(quantised["llama-tied"])
    with torch.no_grad():
        assert torch.equal(model(tokens()).last_hidden_state, whole.model(tokens()).last_hidden_state)


def test_packed_tensors_are_counted_and_move_with_the_model(quantised):
    model = load(quantised["llama-tied"])
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.int4.nbytes <= sum(tensor.nbytes for tensor in linear.buffers())
    assert model.get_memory_footprint() >= sum(
        m.weight.int4.nbytes for m in model.modules() if isinstance(m, PackedLinear)
    )
    assert linear.to("meta").weight.int4.device.type == "meta"


def test_gradients_reach_the_input_of_linears_and_are_refused_by_experts(quantised):
    model = load(quantised["llama-tied"])
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    weights = torch.randn(2, 29, 99, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((model(inputs_embeds=embedded).logits * weights).sum(), embedded)
    step = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    with torch.no_grad():
        up, down = ((model(inputs_embeds=embedded + sign * step).logits * weights).sum() for sign in (1, -1))
    assert float((grad * step).sum()) == pytest.approx(float(up - down) / 2, rel=2e-2)
    with pytest.raises(ValueError, match="int4_moe: x: want no gradient"):
        load(quantised["qwen3_moe"])(tokens())


# -- which checkpoints are ours ---------------------------------------------------------------------------------------
@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    rewrite(tmp_path, "gptq-v1", make_checkpoint(tmp_path, "llama"))
    return tmp_path


def test_ours_need_no_argument_and_others_need_register(foreign, quantised):
    assert isinstance(load(quantised["qwen3"], None).model.layers[0].mlp.up_proj, PackedLinear)
    with pytest.raises(ImportError, match="optimum"):
        load(foreign, None)
    register()
    assert isinstance(load(foreign, None).model.layers[0].mlp.up_proj, PackedLinear)
    register(("awq",))
    with pytest.raises(ImportError, match="optimum"):
        load(foreign, None)


def test_other_widths_stay_with_transformers(foreign):
    change_settings(foreign, bits=8)
    register()
    with pytest.raises(ImportError, match="optimum"):
        load(foreign, None)


def test_our_name_for_the_layout(foreign):
    before = logits(load(foreign))
    change_settings(foreign, quant_method="m3_int4")
    assert torch.equal(logits(load(foreign, EXACT)), before)
    assert isinstance(load(foreign, None).model.layers[0].mlp.up_proj, PackedLinear)


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_register_knows_its_methods():
    with pytest.raises(ValueError, match=r"register: methods: want of .*'gptq'.*; got \['gguf'\]"):
        register(("gguf",))


def test_activations_are_checked():
    with pytest.raises(ValueError, match="Int4Config: activations: want auto or exact or int16 or int8; got 'int4'"):
        Int4Config(activations="int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"layers\.0\.self_attn\.q_proj: from_autoround: quantization_config\['bits'\]: want 4; got 8"),
        ({"group_size": 16}, r"layers\.0\.self_attn\.q_proj: from_gptq: scales: want \(4, 96\)"),
        ({"quant_method": "fp8"}, "Int4Config: quantization_config: want quant_method gptq or awq .*; got 'fp8'"),
    ],
    ids=["8 bits", "another group size", "another method"],
)
def test_settings_that_do_not_fit(changes, message, foreign):
    change_settings(foreign, **changes)
    with pytest.raises(ValueError, match=message):
        load(foreign)


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_layer_that_the_model_has_not(foreign):
    with_tensors(
        foreign, lambda tensors: tensors.update({"model.layers.9.x.qweight": torch.zeros(1, dtype=torch.int32)})
    )
    with pytest.raises(ValueError, match=r"for every INT4 layer; got model\.layers\.9\.x"):
        load(foreign)


def test_an_expert_that_is_missing(tmp_path):
    rewrite(tmp_path, "gptq-v1", make_checkpoint(tmp_path, "qwen3_moe"))
    name = "model.layers.1.mlp.experts.3.up_proj"
    with_tensors(
        tmp_path, lambda tensors: [tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")]
    )
    with pytest.raises(ValueError, match=f"want all 6 experts in INT4, as the first; got {name}"):
        load(tmp_path)


def test_experts_with_another_activation(tmp_path):
    rewrite(tmp_path, "gptq-v1", make_checkpoint(tmp_path, "qwen3_moe"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: want experts with .* and SiLU; got .* GELU"):
        load(tmp_path)


def test_a_checkpoint_without_packed_tensors(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": QUANTIZATION["gptq-v1"]})
    (tmp_path / "copy" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"want packed tensors .*; got none in its files"):
        load(tmp_path / "copy")


def test_a_dense_checkpoint_is_not_quantised_on_the_way(llama):
    with pytest.raises(ValueError, match="pre-quantized"):
        load(llama[0])


# -- a real model -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_smollm2_in_int4_writes_what_the_engine_writes(tmp_path):
    source = resolve("SmolLM2-135M-Instruct")
    rounded = quantize_model(load_model(source), RoundConfig(group_size=64))
    export_model(rounded, tmp_path, source, dtype=torch.float32)
    model = load(tmp_path)
    ours = load_model(tmp_path, activations="exact")
    ids = torch.randint(0, 49152, (1, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(model(ids).logits, ours(ids)) <= RELATIVE_ERROR
    prompt = ids[:, :16]
    wanted = Engine(EngineCore(ours)).generate(prompt.tolist(), SamplingParams(max_tokens=48, ignore_eos=True))
    mask = torch.ones_like(prompt)
    model.generation_config.eos_token_id = None
    got = model.generate(prompt, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=0)
    assert got[0, 16:].tolist() == wanted[0].tokens
