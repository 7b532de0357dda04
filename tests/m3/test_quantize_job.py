"""The quantisation job: what it writes, that it goes on after a kill, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantize_files import SCHEME, add_tokenizer, config_of, digests, quantised, tokens
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint
from typer.testing import CliRunner

from m3.checkpoint import INDEX, Checkpoint
from m3.cli import app
from m3.models.hub import resolve
from m3.models.int4_linear import Int4Linear
from m3.models.loader import load_model
from m3.quantize.autoround import AutoRoundConfig
from m3.quantize.coverage import count
from m3.quantize.evaluate import compare_models
from m3.quantize.gptq import GptqConfig
from m3.quantize.job import JOURNAL, quantize_checkpoint
from m3.quantize.report import render
from m3.quantize.round_to_nearest import RoundConfig, quantize_model
from m3kernels.int4 import int4_dequantize

METHODS = ("rtn", "gptq", "autoround")


@pytest.fixture
def model(tmp_path):
    make_checkpoint(tmp_path / "model", "llama")
    add_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def passages():
    return [tokens(1, length, seed=length)[0].tolist() for length in (20, 33)]


# -- what it writes ---------------------------------------------------------------------------------------------------
def test_nearest_is_what_the_model_in_memory_is_rounded_to(model, tmp_path):
    quantize_checkpoint(model, tmp_path / "out", config_of("rtn"))
    found = load_model(tmp_path / "out")
    wanted = quantize_model(load_model(model), RoundConfig(group_size=SCHEME.group_size))
    ids = tokens(2, 9)
    assert torch.equal(found(ids), wanted(ids))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama-untied-bias", "qwen2", "qwen3", "qwen3_moe-one-dense-layer"])
def test_what_is_measured_is_what_is_written(tmp_path, family, method):
    make_checkpoint(tmp_path / "model", family)
    report = quantised(tmp_path / "model", tmp_path / "out", config_of(method))
    found = load_model(tmp_path / "out")
    assert isinstance(found.blocks[1].mlp.down, Int4Linear)
    compared = compare_models(load_model(tmp_path / "model"), found, passages())
    assert report.comparison.kl.mean == pytest.approx(compared.kl.mean, rel=0.02)
    assert report.comparison.kl.mean > 0
    assert report.comparison.perplexity_quantised.mean == pytest.approx(compared.perplexity_quantised.mean, rel=1e-3)


@pytest.mark.parametrize("method", ["gptq", "autoround"])
def test_learning_beats_the_nearest(model, tmp_path, method):
    learnt = dataclasses.replace(config_of(method), autoround=AutoRoundConfig(iterations=60, batch=12))
    ids = tokens(48, 24)
    found = [
        quantize_checkpoint(model, tmp_path / one.method, one, calibration=ids) for one in (config_of("rtn"), learnt)
    ]
    nearest, better = (report.shards[-1].hidden_error for report in found)
    assert better < 0.9 * nearest


def test_everything_else_is_copied_as_stored(tmp_path):
    make_checkpoint(tmp_path / "model", "qwen3_moe")
    path = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", config_of("rtn"))
    before, after = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "out")
    same = [name for name in before.names if name in after]
    assert "model.layers.0.mlp.gate.weight" in same
    assert "lm_head.weight" in same
    assert not [name for name in same if name.endswith("_proj.weight")]
    for name in same:
        assert after.get(name).dtype == torch.bfloat16
        assert torch.equal(after.get(name), before.get(name)), name
    rest = {name.rpartition(".")[2] for name in after.names - before.names}
    assert rest == {"qweight", "qzeros", "scales", "g_idx"}


def test_config_names_what_is_left_out(tmp_path):
    make_checkpoint(tmp_path / "model", "qwen3_moe-one-dense-layer")
    kept = ("model.layers.1.mlp.down_proj",)
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", config_of("rtn", keep=kept))
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["modules_to_not_convert"] == [*kept, "model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
    assert found["dynamic"][r"-:^model\.layers\.1\.mlp\.down_proj$"] == {}
    assert (found["bits"], found["group_size"], found["sym"], found["desc_act"]) == (4, 32, True, False)
    written = load_model(tmp_path / "out")
    assert torch.equal(written.blocks[1].mlp.down.weight, load_model(tmp_path / "model").blocks[1].mlp.down.weight)


def test_no_expert_learns_from_nothing(tmp_path):
    make_checkpoint(tmp_path / "model", "qwen3_moe-one-dense-layer")
    ids = tokens(6, 24)

    def rare(tensors):  # the router of layer 2 never chooses its last expert: one of w and -w is always above 0
        gate = tensors["model.layers.2.mlp.gate.weight"]
        gate[:4] = torch.cat([gate[:2], -gate[:2]])
        gate[4:] = 0

    def report_of(least):
        config = config_of("gptq", gptq=GptqConfig(least_tokens=least), quantised_prefix=False)
        return quantize_checkpoint(tmp_path / "model", tmp_path / f"out{least}", config, calibration=ids)

    edit_weights(tmp_path / "model", rare)
    blind, fed = report_of(0), report_of(32)
    found = count(load_model(tmp_path / "model"), list(ids)).total()
    for row, layer in enumerate((0, 2)):
        assert blind.shards[layer + 1].routed == found[row].tolist()
        assert min(map(sum, zip(fed.shards[layer + 1].routed, fed.shards[layer + 1].forced, strict=True))) >= 32
    assert blind.shards[2].routed is None
    assert blind.blind == (found == 0).sum() > 0
    assert fed.blind == 0
    page = render(fed)
    assert f"{sum(map(sum, (shard.forced or () for shard in fed.shards)))} tokens" in page
    assert "Tokens that routers gave experts" in page


def test_a_part_of_a_product_cannot_be_kept(model, tmp_path):
    config = config_of("rtn", keep=("model.layers.0.self_attn.q_proj",))
    with pytest.raises(ValueError, match=r"keep: want model.layers.0.self_attn.k_proj too"):
        quantize_checkpoint(model, tmp_path / "out", config)


def test_a_head_that_was_tied_is_rounded_apart(tmp_path):
    make_checkpoint(tmp_path / "model", "llama-tied")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 99', '"vocab_size": 96'))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:96].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    report = quantize_checkpoint(tmp_path / "model", tmp_path / "out", config_of("rtn", head=True))
    found = load_model(tmp_path / "out")
    head = int4_dequantize(found.head.weight.int4, torch.float32)
    assert torch.equal(found.embedding, weights["model.embed_tokens.weight"])
    assert (head - found.embedding).square().sum() / found.embedding.square().sum() == pytest.approx(
        report.shards[0].errors["lm_head"].weight, rel=1e-5
    )


def test_a_tied_head_is_the_embedding_whatever_else_is_stored(tmp_path):
    make_checkpoint(tmp_path / "model", "llama-tied")
    edit_weights(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(99, 64)}))
    report = quantised(tmp_path / "model", tmp_path / "out", config_of("rtn"))
    compared = compare_models(load_model(tmp_path / "model"), load_model(tmp_path / "out"), passages())
    assert report.comparison.kl.mean == pytest.approx(compared.kl.mean, rel=0.02)


def test_report_beside_the_model(model, tmp_path):
    report = quantised(model, tmp_path / "out", config_of("gptq"))
    files = [path for path in (tmp_path / "out").iterdir() if path.name != JOURNAL]
    assert len({path.stat().st_mode for path in files}) == 1  # who reads one, reads all
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["comparison"]["kl"]["mean"] == report.comparison.kl.mean
    assert len(found["shards"]) == 4
    assert 0 < found["shards"][1]["errors"]["mlp.down_proj"]["output"] < 0.1
    page = render(report)
    assert page.count("<svg") == 3
    assert f"{report.comparison.kl.mean:.4f}" in page


# -- going on ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "method"), [("llama", "autoround"), ("qwen3_moe", "gptq")])
def test_killed_ten_times_the_bytes_are_the_same(tmp_path, family, method):
    make_checkpoint(tmp_path / "model", family)
    check_killed(tmp_path / "model", tmp_path, method)


@pytest.mark.slow
def test_smollm2_killed_ten_times(tmp_path):
    check_killed(resolve("SmolLM2-135M-Instruct"), tmp_path, "gptq")


def test_killed_at_every_change_of_a_file_while_finishing(model, tmp_path):
    changes = run_killed(model, tmp_path, "rtn", "finishing")
    for change in ("open:model.safetensors.index.json", "open:report.json", "os.remove:states-3-int4.bin"):
        assert change in changes
    assert changes[-2:] == ["os.rename:config.json.tmp", "os.rename:killed.part"]


def check_killed(model, tmp_path, method):
    """Ten kills at random moments change no byte."""
    done = run_killed(model, tmp_path, method, "10")
    assert len(done) >= 10
    assert max(map(int, done)) > 0


def run_killed(model, tmp_path, method, kills):
    """What the program says; the bytes are those of a run that was not killed."""
    script = Path(__file__).with_name("quantize_files.py")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, script, model, tmp_path / "whole", tmp_path / "killed", method, kills, "7"]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert INDEX in digests(tmp_path / "whole")
    return said


def test_files_half_written_by_safetensors_go(model, tmp_path):
    """It writes beside the file and renames; killed in between, it leaves a file of a random name."""
    part = half_done(model, tmp_path)
    (part / ".tmp0a1b2c").write_bytes(b"half a shard")
    quantised(model, tmp_path / "out", config_of("gptq"))
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_another_run_does_not_go_on(model, tmp_path):
    part = half_done(model, tmp_path)
    with pytest.raises(ValueError, match=r"out.part: want a run with the same settings"):
        quantised(model, tmp_path / "out", config_of("autoround"))
    assert (part / JOURNAL).is_file()


def test_an_unfinished_run_goes_on_or_is_thrown_away(model, tmp_path):
    half_done(model, tmp_path)
    command = ("quantize", model, "-o", tmp_path / "out", "--group-size", 32, "--method", "rtn", "--no-measure")
    assert "want a run with the same settings" in refused(*command, "--resume")
    result = CliRunner().invoke(app, [str(one) for one in (*command, "--restart")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["method"] == "rtn"
    assert not (tmp_path / "out.part").exists()


def test_a_damaged_shard_is_refused(model, tmp_path):
    part = half_done(model, tmp_path)
    path = next(part.glob("model-00001-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model-00001-of-00004.safetensors: want sha256"):
        quantised(model, tmp_path / "out", config_of("gptq"))


def half_done(model, tmp_path):
    """The folder of a run that stopped after two shards."""

    def stop(record, left):
        if left == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        quantize_checkpoint(
            model,
            tmp_path / "out",
            config_of("gptq"),
            calibration=tokens(6, 24),
            held_out=passages(),
            shard_done=stop,
        )
    return tmp_path / "out.part"


# -- mistakes ---------------------------------------------------------------------------------------------------------
def edit_config(folder, key, value):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def sharded(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "one.safetensors", {"format": "pt"})
    where = dict.fromkeys(tensors, "one.safetensors") | {"model.norm.weight": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def naming_what_is_not_there(folder):
    tensors = load_file(folder / "model.safetensors")
    where = dict.fromkeys([*tensors, "model.layers.1.extra.weight"], "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def quantised_already(folder):
    quantize_checkpoint(folder, folder.with_name("quantised"), config_of("rtn"))
    folder.rename(folder.with_name("before"))
    folder.with_name("quantised").rename(folder)


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def of_another_shape(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(8, 64)


def without(name):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.pop(name))


def without_the_last_layer(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_config(folder, "model_type", "mamba"), "model_type: want llama or qwen2"),
        (sharded, "two.safetensors: want a file; got none"),
        (truncated, "model.safetensors: want a safetensors file; got"),
        (
            lambda folder: edit_weights(folder, with_nan),
            "model.safetensors: model.layers.1.mlp.up_proj.weight: want finite weights",
        ),
        (
            lambda folder: edit_weights(folder, of_another_shape),
            "model.safetensors: model.layers.2.: Block: mlp.up_proj.weight: want (96, 64) of floats",
        ),
        (without("model.layers.2.input_layernorm.weight"), "input_layernorm.weight: want (64,) of floats"),
        (without("model.norm.weight"), "model.safetensors: model.norm.weight: want (64) float32"),
        (without("lm_head.weight"), "model.safetensors: lm_head.weight: want (99, 64) float32"),
        (without("model.embed_tokens.weight"), "model.safetensors: model.embed_tokens.weight: want (99, 64) float32"),
        (lambda folder: edit_weights(folder, without_the_last_layer), "input_layernorm.weight: want (64,) of floats"),
        (naming_what_is_not_there, "model.layers.1.extra.weight: want a tensor, as model.safetensors.index.json says"),
        (quantised_already, "want a model that is not quantised yet"),
    ],
    ids=[
        *("architecture", "missing-shard", "truncated", "nan", "shape", "missing-tensor", "no-norm", "no-head"),
        *("no-embedding", "no-last-layer", "index-beyond-the-file", "quantised-already"),
    ],
)
def test_a_bad_checkpoint_is_one_line(model, tmp_path, damage, message):
    damage(model)
    assert message in refused("quantize", model, "-o", tmp_path / "out", "--group-size", 32)
    assert_nothing_looks_whole(tmp_path)
    assert damage_is_nan(message) == (tmp_path / "out.part").exists()  # all else shows before any work


def damage_is_nan(message):
    return message.endswith("want finite weights")


def in_use(out):
    out.mkdir()
    (out / "notes.txt").write_text("kept")


def a_link(out):
    out.with_name("elsewhere").mkdir()
    out.symlink_to(out.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("out", "prepare", "message"),
    [
        ("out", in_use, "OUT: want a new or empty folder; got "),
        ("out", a_link, "OUT: want a new or empty folder; got "),
        ("model", lambda out: None, "OUT: want a new or empty folder; got "),
        ("model/int4", lambda out: None, "OUT: want a folder outside "),
        ("out", lambda out: out.with_name("model").rename(out.with_name("out.part")), "OUT: want another name: "),
    ],
    ids=["in-use", "link", "model", "inside-model", "its-unfinished-name-is-the-model"],
)
def test_a_bad_out_is_one_line_and_touches_nothing(model, tmp_path, out, prepare, message):
    prepare(tmp_path / out)
    (folder,) = (path.parent for path in tmp_path.rglob("model.safetensors"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert message in refused("quantize", folder, "-o", tmp_path / out, "--group-size", 32)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--group-size", 7), "group_size: want -1 or a positive multiple of 16 (32, 64, 128); got 7", 1),
        (("--method", "awq"), "Invalid value for '--method'", 2),
        (("--group-size", "wide"), "Invalid value for '--group-size'", 2),
        (("--keep", "model.layers.7.mlp.down_proj"), "keep: want linears of the model; got model.layers.7", 1),
    ],
)
def test_a_bad_option_is_one_line(model, tmp_path, options, message, code):
    assert message in refused("quantize", model, "-o", tmp_path / "out", *options, code=code)
    assert not (tmp_path / "out.part").exists()


def test_other_options_do_not_go_on(model, tmp_path):
    half_done(model, tmp_path)
    found = refused("quantize", model, "-o", tmp_path / "out", "--group-size", 32)
    assert "out.part: want a run with the same settings" in found
    assert "finish it as it was begun, or delete that folder" in found
    assert_nothing_looks_whole(tmp_path)


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        ("a", (), 1, "want 128 sequences of 512 tokens (or ask for fewer or shorter ones); got 0 of them, 1 tokens"),
        ("a", ("--tokens", 1), 2, "greater than or equal to 2"),
        ("", ("--tokens", 8), 1, "want text; got an empty file"),
        (None, (), 1, "FILE: want 'self', a text file or a .jsonl file"),
    ],
    ids=["one-token", "windows-of-one", "empty", "absent"],
)
def test_a_bad_calibration_is_one_line(model, tmp_path, text, options, code, message):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    command = ("quantize", model, "-o", tmp_path / "out", "--method", "gptq", "--calibration", path, *options)
    assert message in refused(*command, code=code)
    assert_nothing_looks_whole(tmp_path)


def test_learning_wants_a_calibration(model, tmp_path):
    with pytest.raises(ValueError, match="calibration: want sequences, which autoround learns from; got none"):
        quantize_checkpoint(model, tmp_path / "out", config_of("autoround"))


@pytest.mark.parametrize("source", ["self", "file"])
def test_gptq_on_the_command_line(model, tmp_path, source):
    text = tmp_path / "text.txt"
    text.write_text("Chest pain for two hours. " * 20)
    options = ("--group-size", 32, "--samples", 4, "--tokens", 16, "--keep-budget", "30%", "--method", "gptq")
    command = ("quantize", model, "-o", tmp_path / "out", "--calibration", text if source == "file" else source)
    result = CliRunner().invoke(app, [str(one) for one in (*command, *options)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "layer 3 of 3: " in result.output
    assert "held-out text: perplexity " in result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["calibration"] == [4, 16]
    assert found["settings"]["keep"]
    written = Checkpoint(tmp_path / "out")
    assert all(f"{name}.weight" in written for name in found["settings"]["keep"])
    assert {"report.html", "config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "responses.jsonl").exists()
    load_model(tmp_path / "out")


def test_a_calibration_of_one_token(model, tmp_path):
    with pytest.raises(ValueError, match="want sequences of 2 tokens or more; got 1"):
        quantize_checkpoint(model, tmp_path / "out", config_of("gptq"), calibration=tokens(4, 1))


def test_a_full_disk_is_one_line_and_can_go_on(model, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    command = ("quantize", model, "-o", tmp_path / "out", "--group-size", 32)
    try:
        text = refused(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in text
    assert_nothing_looks_whole(tmp_path)
    assert CliRunner().invoke(app, [str(one) for one in command]).exit_code == 0
    load_model(tmp_path / "out")


def refused(*command, code=1) -> str:
    """The one line of a command that fails."""
    result = CliRunner().invoke(app, [str(one) for one in command], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    told = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert code == 2 or told == result.output.splitlines()[-1:], result.output
    return result.output


def assert_nothing_looks_whole(tmp_path):
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part" / "config.json").exists()
    assert not (tmp_path / "out.part" / INDEX).exists()
