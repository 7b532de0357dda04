"""``m3 draft`` on a tiny model: one command trains, the same command goes on, and mistakes end in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from m3.draft.cli import app

LINES = "\n".join(f"what is {letter}{letter}?" for letter in "abcdefghijklmnopqrstuvwxy")
OPTIONS = ("--tokens", 100, "--max-tokens", 8, "--draft-vocab", 60, "--batch-tokens", 64, "--threads", 1)
SHAPES = ("--shape", "2,1,3", "--shape", "2,3,6")


def run(*args: object, code: int = 0) -> str:
    before = torch.get_num_threads()
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    torch.set_num_threads(before)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny Llama with a tokenizer of 99 characters, and a file of prompts."""
    folder = tmp_path_factory.mktemp("target") / "tiny"
    make_checkpoint(folder, "llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:99]
    fast = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "prompts.txt").write_text(LINES)
    return folder


def train(target, out, *more: object, code: int = 0) -> str:
    return run("train", target, "-o", out, "--prompts", target / "prompts.txt", *OPTIONS, *SHAPES, *more, code=code)


@pytest.fixture(scope="module")
def draft(target, tmp_path_factory):
    """A trained draft."""
    out = tmp_path_factory.mktemp("draft")
    train(target, out, "--steps", 3)
    return out


def test_a_draft_and_its_card(target, draft):
    card = json.loads((draft / "card.json").read_text())
    assert card["steps"] == 3
    assert card["response_tokens"] >= 100
    assert card["training"]["gate"] == "elementwise"
    assert [row["name"] for row in card["acceptance"]["held_out"]] == ["chain of 2", "tree (2, 3, 6)"]
    assert all(1 <= row["length"] <= 3 for row in card["acceptance"]["held_out"])
    config = json.loads((draft / "config.json").read_text())
    assert config["draft_vocab_size"] == 60
    assert load_file(draft / "model.safetensors")["lm_head.weight"].shape == (60, 64)


def test_the_same_command_goes_on_where_it_was(target, draft):
    files = [draft / name for name in ("data/responses.jsonl", "model.safetensors", "checkpoint.pt")]
    before = [file.read_bytes() for file in files]
    assert "3 steps in" in train(target, draft, "--steps", 3)
    assert [file.read_bytes() for file in files] == before


def test_another_run_on_the_same_data(target, draft, tmp_path):
    responses = (draft / "data" / "responses.jsonl").read_bytes()
    train(target, tmp_path, "--steps", 2, "--gate", "none", "--data", draft / "data")
    assert not (tmp_path / "data").exists()
    assert (draft / "data" / "responses.jsonl").read_bytes() == responses
    assert "layers.0.self_attn.attn_gate.weight" not in load_file(tmp_path / "model.safetensors")


def test_evaluate_gives_what_training_gave(target, draft, tmp_path):
    text = run("evaluate", target, draft, *SHAPES, "--json", tmp_path / "figures.json")
    assert "held out" in text
    assert "tree (2, 3, 6)" in text
    card = json.loads((draft / "card.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text()) == card["acceptance"]


def test_evaluate_alone_lets_the_target_respond(target, draft, tmp_path):
    text = run(
        "evaluate", target, draft, "--data", tmp_path, "--prompts", target / "prompts.txt", "--shape", "1,1,2"
    )  # fmt: skip
    assert "chain of 1" in text
    assert (tmp_path / "responses.jsonl").read_bytes().count(b"held_out") == 1


WRONG = {
    "gate": (("--steps", 1, "--gate", "open"), "TrainConfig: gate: want none or headwise or elementwise; got 'open'"),
    "shape": (("--steps", 1, "--shape", "4,4"), "draft: --shape: want steps,topk,nodes, as in 4,4,8; got 4,4"),
    "both limits": (("--steps", 1, "--minutes", 1), "TrainConfig: steps: want steps or minutes, one of them"),
    "prompts": (("--steps", 1, "--prompts", "no-such-file"), "prompts: FILE: want a .toml or a text file"),
    "other settings": (("--steps", 3, "--lr", 0.5), "want a run with the settings of this one; it has lr = 0.002"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line(target, draft, options, message):
    text = train(target, draft, *options, code=1)
    assert len(text.strip().splitlines()) == 1
    assert message in text


def test_a_draft_that_is_not_there(target, tmp_path):
    text = run("evaluate", target, tmp_path / "none", code=1)
    assert len(text.strip().splitlines()) == 1
    assert "config.json" in text
