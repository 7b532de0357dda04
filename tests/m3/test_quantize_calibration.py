"""Calibration sets: the shipped prompts, a model's own words after a kill at any moment, good and bad files."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from letters_model import make_letters_model

from m3.draft.generate import EngineGenerator, Request
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.calibration import (
    Calibration,
    CalibrationConfig,
    Prompt,
    calibration_of,
    from_file,
    order_of,
    packed,
    read_prompts,
)

SMALL = CalibrationConfig(samples=6, tokens=96, max_tokens=24, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_letters_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_letters_model(tmp_path_factory.mktemp("moe"), "qwen3_moe")


@pytest.fixture(scope="module")
def own_words(folder, tmp_path_factory):
    """(the calibration set of an uninterrupted run, its file)."""
    path = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    return calibration_of("self", folder, SMALL, store=path), path


class Dying:
    """An engine that is killed after some responses."""

    def __init__(self, folder, after):
        self.engine, self.after = EngineGenerator(load_model(folder)), after

    def generate(self, requests):
        for reply in self.engine.generate(requests):
            if self.after == 0:
                raise KeyboardInterrupt
            self.after -= 1
            yield reply


class Silent:
    """Ends every response at once."""

    def generate(self, requests):
        for which, _ in enumerate(requests):
            yield which, []


# -- prompts ----------------------------------------------------------------------------------------------------------
def test_shipped_prompts_cover_domains_and_languages_evenly():
    prompts = read_prompts()
    counts = collections.Counter((prompt.domain, prompt.language) for prompt in prompts)
    assert counts == {(d, lang): 16 for d in ("clinical", "reasoning", "general", "code") for lang in ("en", "zh")}
    assert len({prompt.text for prompt in prompts}) == 128


def test_every_first_part_of_a_domain_has_both_languages():
    prompts = [Prompt(domain="d", language=lang, text=f"{lang}{n}") for lang in ("en", "zh") for n in range(8)]
    order = order_of(prompts, 1)["d"]
    assert sorted(order) == sorted(prompt.text for prompt in prompts)
    assert [text[:2] for text in order] == ["en", "zh"] * 8
    assert order != order_of(prompts, 2)["d"]


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "no-domain": ('{"language": "en", "prompt": "x"}', 'line 1: want "domain"'),
        "not-json": ('{"domain": "d", "language": "en", "prompt": "x"}\nhello', "line 2: want a JSON object"),
        "list": ("[1]", "line 1: want a JSON object"),
        "empty": (" \n", "an empty file"),
    }.values(),
)
def test_bad_prompts_are_named(tmp_path, text, told):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(path)


# -- the model's own words --------------------------------------------------------------------------------------------
def test_sequences_begin_with_a_conversation_and_end_where_they_are_full():
    assert packed([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]], 4) == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert packed([[1], [2]], 4) == []


def test_own_words_are_what_the_engine_says(folder, own_words):
    found, _ = own_words
    assert [tuple(one.shape) for one in found.ids] == [(96,)] * 6
    assert found.domains == ("clinical", "reasoning", "general", "code", "clinical", "reasoning")
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.chat([{"role": "user", "content": order_of(read_prompts(), 3)["reasoning"][0]}])
    request = Request(prompt, 1.0, 3 * 1_000_003 + 1, 24)
    response = next(iter(EngineGenerator(load_model(folder)).generate([request])))[1]
    assert found.ids[1].tolist()[: len(prompt) + len(response)] == [*prompt, *response][:96]


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_run_that_was_killed_goes_on_to_the_same_sequences(folder, own_words, tmp_path, after):
    path = tmp_path / "responses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        calibration_of("self", folder, SMALL, store=path, generator=lambda: Dying(folder, after))
    if after:
        with path.open("ab") as file:
            file.write(b'00000000 {"torn')
    again = calibration_of("self", folder, SMALL, store=path)
    assert again.digest() == own_words[0].digest()
    assert again.domains == own_words[0].domains


def test_what_is_stored_is_not_asked_for_again(folder, own_words):
    def never():
        raise AssertionError("a model that was loaded")

    found, path = own_words
    assert calibration_of("self", folder, SMALL, store=path, generator=never).digest() == found.digest()


@pytest.mark.parametrize(
    ("change", "told"),
    {
        "seed": ({"seed": 4}, "seed: want 4; got 3"),
        "temperature": ({"temperature": 0.5}, "temperature: want 0.5; got 1.0"),
        "length": ({"max_tokens": 25}, "max_tokens: want 25; got 24"),
    }.values(),
)
def test_responses_for_other_settings_are_refused(folder, own_words, change, told):
    config = CalibrationConfig(**{"samples": 6, "tokens": 96, "max_tokens": 24, "seed": 3, **change})
    with pytest.raises(ValueError, match=told):
        calibration_of("self", folder, config, store=own_words[1])


def test_responses_of_another_model_are_refused(moe, own_words):
    with pytest.raises(ValueError, match=r"responses\.jsonl: model: want "):
        calibration_of("self", moe, SMALL, store=own_words[1])


def test_a_model_that_says_too_little_is_named(folder, tmp_path):
    config = CalibrationConfig(samples=4, tokens=100_000, max_tokens=1)
    with pytest.raises(ValueError, match=r"responses \(clinical\): want 1 sequences of 100000 tokens; got 0"):
        calibration_of("self", folder, config, store=tmp_path / "r", generator=Silent)


def test_sequences_for_rare_experts_are_kept(moe, tmp_path):
    config = CalibrationConfig(samples=4, tokens=48, max_tokens=16, least_tokens=30)
    found = calibration_of("self", moe, config, store=tmp_path / "r")
    plain = CalibrationConfig(samples=8, tokens=48, max_tokens=16)
    pool = calibration_of("self", moe, plain, store=tmp_path / "r")
    assert len(found.ids) == 4
    assert {tuple(one.tolist()) for one in found.ids} <= {tuple(one.tolist()) for one in pool.ids}
    assert found.coverage.tokens == 4 * 48
    assert found.coverage.total().sum(1).tolist() == [4 * 48 * 2] * 3


# -- files ------------------------------------------------------------------------------------------------------------
def test_a_text_is_cut_into_sequences(folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 5 + "\n")
    tokenizer = Tokenizer(folder)
    found = from_file(path, tokenizer, CalibrationConfig(samples=3, tokens=16))
    assert [tokenizer.decode(one.tolist()) for one in found.ids] == [
        "abcdefghijabcdef",
        "ghijabcdefghijab",
        "cdefghijabcdefgh",
    ]
    assert found.source == "text.txt"


def test_json_lines_keep_domains_apart_and_follow_the_seed(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"domain": "ab"[n % 2], "text": "ab"[n % 2] * 10} for n in range(20)]
    rows.append({"messages": [{"role": "user", "content": "hello, how are you?"}]})
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = Tokenizer(folder)
    found = from_file(path, tokenizer, CalibrationConfig(samples=13, tokens=16, seed=1))
    said = {(domain, tokenizer.decode(one.tolist())) for domain, one in zip(found.domains, found.ids, strict=True)}
    assert said == {("a", "a" * 16), ("b", "b" * 16), ("file", "u:hello, how ar")}
    other = from_file(path, tokenizer, CalibrationConfig(samples=13, tokens=16, seed=2))
    assert other.domains != found.domains


@pytest.mark.parametrize(
    ("name", "data", "told"),
    {
        "missing": ("nothing.txt", None, "want 'self', a text file or a .jsonl file"),
        "empty": ("a.txt", b"\n", "an empty file"),
        "one-token": ("a.txt", b"x", "want 2 sequences of 8 tokens .* got 0 of them, 1 tokens"),
        "too-short": ("a.txt", b"0123456789abcde", "got 1 of them, 15 tokens"),
        "not-text": ("a.txt", b"\xff\xfe\x00", "want a file of UTF-8 text"),
        "not-json": ("a.jsonl", b'{"text": "x"}\nx', "a.jsonl: line 2: want a JSON object"),
        "no-text": ("a.jsonl", b'{"body": "x"}', 'a.jsonl: line 1: want "text", or "messages"'),
        "no-role": ("a.jsonl", b'{"messages": [{"content": "x"}]}', 'a.jsonl: line 1: want "text", or "messages"'),
    }.values(),
)
def test_bad_files_are_named(folder, tmp_path, name, data, told):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=told):
        calibration_of(path, folder, CalibrationConfig(samples=2, tokens=8), store=tmp_path / "r")


@pytest.mark.parametrize("change", [{"samples": 0}, {"tokens": 1}, {"max_tokens": 0}, {"least_tokens": -1}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        CalibrationConfig(**change)


@pytest.mark.parametrize("ids", [(), (torch.tensor([1]),), (torch.tensor([1, 2]), torch.tensor([1, 2, 3]))])
def test_sequences_of_no_or_unequal_length_are_refused(ids):
    with pytest.raises(ValueError, match="want one sequence or more, of one length"):
        Calibration(ids=ids, domains=("d",) * len(ids), source="test")
