"""Filling a store: the engine's replies against one sequence at a time, states against transformers', resumption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from draft_cases import AUX_LAYERS, MARK, make_material, random_prompts

from m3.draft.generate import EngineGenerator, Plan, Request, fill, requests_of
from m3.draft.hidden import Probe, StateCache, teach
from m3.draft.prompts import PromptSet
from m3.draft.store import HELD_OUT, OUT_OF_TEMPLATE, TRAIN, Response, Store
from m3.models.generate import Sampling, generate
from m3.models.loader import load_model

PROMPTS = PromptSet(train=("one", "two", "three four"), held_out=("five", "six"), out_of_template=("seven",))


class Letters:
    """A tokenizer of bytes, without a template."""

    template = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 99 for letter in text]


@pytest.fixture(scope="module")
def model(llama):
    found = load_model(llama[0])
    assert found.config.eos_token_ids == (2,)
    return found


# -- the generator ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_greedy_is_one_sequence_at_a_time(model, batch):
    prompts = random_prompts(7, 99)
    replies = dict(EngineGenerator(model, batch=batch).generate([Request(prompt, 0.0, 0, 25) for prompt in prompts]))
    for number, prompt in enumerate(prompts):
        alone = list(generate(model, prompt, Sampling(max_tokens=25)))
        assert replies[number] == (alone if len(alone) == 25 else [*alone, 2])


def test_no_requests_no_replies(model):
    assert list(EngineGenerator(model).generate([])) == []


def test_tokens_have_the_law_of_the_temperature(model):
    """2000 first tokens at temperature 1.5: a chi-square of the nine likeliest and the rest below its 99.9 % point."""
    prompt, count, heat = [5, 6, 7], 2000, 1.5
    with torch.inference_mode():
        law = (model(torch.tensor([prompt]))[0, -1].double() / heat).softmax(-1)
    requests = [Request(prompt, heat, seed, 1) for seed in range(count)]
    drawn = torch.tensor([tokens[0] for _, tokens in EngineGenerator(model, batch=500).generate(requests)])
    top = law.topk(9).indices
    wanted = torch.cat((law[top], 1 - law[top].sum().view(1))) * count
    got = torch.stack([*((drawn == token).sum() for token in top), (~torch.isin(drawn, top)).sum()])
    assert float(((got - wanted) ** 2 / wanted).sum()) < 27.88


def test_a_seed_repeats_whatever_the_batch(model):
    requests = [Request(prompt, 1.0, seed, 20) for seed, prompt in enumerate(random_prompts(6, 99))]
    alone, together = (dict(EngineGenerator(model, batch=batch).generate(requests)) for batch in (1, 6))
    assert alone == together
    other = [request._replace(seed=request.seed + 100) for request in requests]
    assert dict(EngineGenerator(model).generate(other)) != together


# -- states -----------------------------------------------------------------------------------------------------------
def reference_states(llama: tuple, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' hidden states of AUX_LAYERS and the final one, and its likeliest tokens, of all but the last."""
    with torch.inference_mode():
        out = llama[1](torch.tensor([tokens[:-1]]), output_hidden_states=True)
    before_norm: list[torch.Tensor] = []
    hook = llama[1].model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.inference_mode():
        llama[1](torch.tensor([tokens[:-1]]))
    hook.remove()
    layers = {**dict(enumerate(out.hidden_states)), len(out.hidden_states) - 1: before_norm[0]}
    states = torch.cat([*(layers[index][0] for index in AUX_LAYERS), out.hidden_states[-1][0]], dim=-1)
    return states, out.logits[0].argmax(-1)


def check_states(llama: tuple, cache: StateCache, one: Response) -> None:
    states, best = reference_states(llama, one.prompt + one.response)
    found = cache.get(one.group, one.index)
    torch.testing.assert_close(torch.cat((found.aux, found.final), -1).float(), states, rtol=2e-3, atol=2e-3)
    assert found.best.tolist() == best.tolist()


@pytest.mark.parametrize("index", [0, 3, 11])
def test_states_are_those_of_transformers(llama, model, tmp_path, index):
    material = make_material(model, tmp_path)
    check_states(llama, material.cache, material.train[index])


def test_states_of_the_teacher_pass_are_those_of_transformers(llama, model, tmp_path):
    material = make_material(model, tmp_path / "first", train=3, held_out=1)
    seen = []
    cache = StateCache(tmp_path / "second", fingerprint=MARK, aux_layers=AUX_LAYERS, hidden_size=64)
    cache.append(TRAIN, 1, torch.cat(material.cache.get(TRAIN, 1)[:2], -1), material.cache.get(TRAIN, 1).best)
    teach(model, material.train, cache, AUX_LAYERS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    for one in material.train:
        check_states(llama, cache, one)


def test_states_outlive_a_kill_between_rows_and_their_line(model, tmp_path):
    material = make_material(model, tmp_path, train=2, held_out=0)
    whole = material.cache.get(TRAIN, 1).final.clone()
    material.cache.close()
    with (tmp_path / "states.f16").open("ab") as file:
        file.write(b"rows that nobody owns")
    (tmp_path / "index.jsonl").open("ab").write(b"0000")
    cache = StateCache(tmp_path, fingerprint=MARK, aux_layers=AUX_LAYERS, hidden_size=64)
    cache.append(TRAIN, 2, torch.ones(2, 256, dtype=torch.float16), torch.tensor([4, 5]))
    again = StateCache(tmp_path, fingerprint=MARK, aux_layers=AUX_LAYERS, hidden_size=64)
    assert torch.equal(again.get(TRAIN, 1).final, whole)
    assert again.get(TRAIN, 2).aux.tolist() == [[1.0] * 192] * 2
    assert again.get(TRAIN, 2).best.tolist() == [4, 5]


OTHER = {
    "model": ({"fingerprint": "1"}, "fingerprint: want 1; got 0000"),
    "layers": ({"aux_layers": (1, 2)}, r"aux_layers: want \[1, 2\]; got list"),
    "size": ({"hidden_size": 32}, "hidden: want 32; got 64"),
}


@pytest.mark.parametrize(("change", "message"), OTHER.values(), ids=OTHER)
def test_states_of_another_target_are_refused(model, tmp_path, change, message):
    make_material(model, tmp_path, train=1, held_out=0).cache.close()
    with pytest.raises(ValueError, match=message):
        StateCache(tmp_path, **{"fingerprint": MARK, "aux_layers": AUX_LAYERS, "hidden_size": 64, **change})


def test_missing_rows_are_refused(model, tmp_path):
    make_material(model, tmp_path, train=2, held_out=0).cache.close()
    with (tmp_path / "best.i32").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(ValueError, match=r"best\.i32: want \d+ bytes, as index\.jsonl says; got 8"):
        StateCache(tmp_path, fingerprint=MARK, aux_layers=AUX_LAYERS, hidden_size=64)


def test_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match=r"aux_layers: want numbers of layers in 0\.\.3; got \(1, 4\)"):
        Probe(model, (1, 4))


# -- the plan ---------------------------------------------------------------------------------------------------------
def test_a_second_pass_has_other_temperatures_and_seeds():
    plan = Plan(tokens=1, temperatures=(0.0, 0.7, 1.0))
    requests = [request for _, request in requests_of(TRAIN, PROMPTS.train, 6, plan, Letters())]
    assert [request.temperature for request in requests] == [0.0, 0.7, 1.0, 0.7, 1.0, 0.0]
    assert len({request.seed for request in requests}) == 6
    assert requests[0].prompt == requests[3].prompt
    held_out = requests_of(HELD_OUT, PROMPTS.held_out, 2, plan, Letters())
    assert [request.temperature for _, request in held_out] == [0.0, 0.0]


class Stopping(EngineGenerator):
    """Stops with an error after some replies."""

    def __init__(self, *args: object, after: int, **options: object) -> None:
        super().__init__(*args, **options)
        self.left = after

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        for reply in super().generate(requests):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield reply


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(model, tmp_path):
    plan = Plan(tokens=60, max_tokens=9, round=2)
    ends = []
    for name, stops in (("whole", ()), ("stopped", (2, 1, 4))):
        for after in (*stops, 1000):
            store = Store(tmp_path / f"{name}.jsonl", target="tiny", fingerprint=MARK)
            generator = Stopping(model, batch=4, after=after)
            with store:
                try:
                    fill(store, generator, PROMPTS, Letters(), plan)
                except KeyboardInterrupt:
                    assert after < 1000
                end = {(one.group, one.index): one for one in store.responses}
        ends.append(end)
        assert store.tokens(TRAIN) >= 60
    assert ends[0] == ends[1]
    assert {key for key in ends[0] if key[0] != TRAIN} == {(HELD_OUT, 0), (HELD_OUT, 1), (OUT_OF_TEMPLATE, 0)}


def test_prompts_that_run_out_end_the_plan(model, tmp_path):
    with Store(tmp_path / "store.jsonl", target="tiny", fingerprint=MARK) as store:
        fill(store, EngineGenerator(model), PROMPTS, Letters(), Plan(tokens=10**6, max_tokens=2, passes=2))
        assert len(store.group(TRAIN)) == 6


@pytest.mark.parametrize("change", [{"tokens": 0}, {"max_tokens": 0}, {"temperatures": ()}], ids=str)
def test_an_empty_plan_is_refused(change):
    with pytest.raises(ValueError, match="Plan: tokens, max_tokens, temperatures: want at least one of each"):
        Plan(**change)
