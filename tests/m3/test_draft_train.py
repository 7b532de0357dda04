"""Training a draft: its loss against autograd in fp64, its batches against the definition, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from draft_cases import AUX_LAYERS, make_material

from m3.draft.batches import Order, draft_vocabulary, length_of, lesson_rows, make_batch, packed
from m3.draft.distill import CHUNK, distill_head
from m3.draft.train import CHECKPOINT, METRICS, RUN, TrainConfig, Trainer
from m3.models.loader import load_model

ROOT = Path(__file__).parent.parent.parent
SMALL = {"draft_vocab": 60, "batch_tokens": 80, "log_every": 4, "evaluations": 2}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama[0])


@pytest.fixture(scope="module")
def material(model, tmp_path_factory):
    return make_material(model, tmp_path_factory.mktemp("states"))


def trainer(model, material, folder, **settings) -> Trainer:
    config = TrainConfig(**{**SMALL, **settings})
    return Trainer(model, material.train, material.held_out, material.cache, folder, config, aux_layers=AUX_LAYERS)


# -- loss -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("steps", "lessons"), [(1, 1), (2, CHUNK - 1), (3, CHUNK + 5)], ids=str)
def test_the_loss_and_its_gradients_are_those_of_autograd(steps, lessons):
    generator = torch.Generator().manual_seed(0)
    y, head, final, teacher_head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((steps, lessons, 8), (23, 8), (lessons, 6), (23, 6))
    )
    best = torch.randint(-1, 23, (lessons,), generator=generator)
    best[0] = 3
    weights = 0.8 ** torch.arange(steps, dtype=torch.float64)
    y.requires_grad_(True)
    head.requires_grad_(True)
    total, learned = distill_head(y, head, final, teacher_head, best, weights)
    got = torch.autograd.grad(total, (y, head))

    logits = y @ head.T
    teacher = (final @ teacher_head.T).softmax(-1)
    cross = -(teacher * logits.log_softmax(-1)).sum(-1)[:, best >= 0].mean(-1)
    torch.testing.assert_close(learned.loss, cross)
    torch.testing.assert_close(total, (weights * cross).sum())
    torch.testing.assert_close(got, torch.autograd.grad((weights * cross).sum(), (y, head)))
    assert learned.hits.tolist() == (logits.argmax(-1) == best).sum(-1).tolist()


def test_lessons_outside_of_the_vocabulary_teach_nothing():
    y, head = torch.ones(2, 3, 4, requires_grad=True), torch.ones(5, 4)
    total, learned = distill_head(y, head, torch.ones(3, 4), head, torch.tensor([-1, -1, -1]), torch.ones(2))
    total.backward()
    assert total.item() == 0
    assert not y.grad.any()
    assert learned.hits.tolist() == [0, 0]


# -- batches ----------------------------------------------------------------------------------------------------------
def test_a_lesson_is_what_the_target_says_next_and_is_answered_by_who_has_not_seen_it(material):
    """Greedy responses: the likeliest token at j is the text's own at j + 1."""
    batch = make_batch(material.train[:3], material.cache)
    length = batch.tokens.shape[1]
    at = 0
    for row, one in enumerate(material.train[:3]):
        text = one.prompt + one.response
        for j in range(len(one.prompt), len(text) - 1):
            assert batch.rows[at] == row * length + j
            assert batch.best[at] == text[j + 1]
            assert lesson_rows(batch, 2)[at] == row * length + j - 3
            assert torch.equal(batch.final[at], material.cache.get(one.group, one.index).final[j])
            at += 1
        assert batch.tokens[row, : len(text) - 1].tolist() == list(text[:-1])
        assert batch.mask[row].sum() == len(text) - 1
    assert at == len(batch.best)


def test_an_epoch_has_every_response_once_and_the_next_another_order(material):
    order = Order(material.train, batch_tokens=80, seed=3)
    epochs = [order.epoch(number) for number in range(2)]
    for groups in epochs:
        assert sorted(one.index for group in groups for one in group) == list(range(12))
        assert all(len(group) * max(map(length_of, group)) <= 80 for group in groups if len(group) > 1)
    assert epochs[0] != epochs[1]
    assert Order(material.train, batch_tokens=80, seed=3).epoch(1) == epochs[1]
    assert Order(material.train, batch_tokens=80, seed=4).epoch(1) != epochs[1]


@pytest.mark.parametrize("skip", [0, 1, 7, 20])
def test_batches_go_on_where_they_were(material, skip):
    order = Order(material.train, batch_tokens=80, seed=0)
    stream, later = order.following(0), order.following(skip)
    wanted = [next(stream) for _ in range(skip + 9)][skip:]
    assert [next(later) for _ in range(9)] == wanted


def test_a_response_longer_than_a_batch_goes_alone(material):
    assert [len(group) for group in packed(material.train[:4], 1)] == [1, 1, 1, 1]


def test_the_vocabulary_is_of_the_most_frequent_tokens(material):
    counts = torch.zeros(99, dtype=torch.int64)
    for one in material.train:
        for token in one.response:
            counts[token] += 2  # said, and the likeliest: these responses are greedy
    chosen = draft_vocabulary(material.train, material.cache, 20, 99)
    assert chosen.tolist() == sorted(chosen.tolist())
    assert counts[chosen].min() >= counts[[token for token in range(99) if token not in chosen]].max()


# -- rates ------------------------------------------------------------------------------------------------------------
def test_the_rate_rises_and_falls():
    config = TrainConfig(steps=100, lr=1e-3, lr_end=1e-5, warmup=0.1)
    assert config.rate(0.05) == pytest.approx(5e-4)
    assert config.rate(0.1) == pytest.approx(1e-3)
    assert config.rate(0.55) == pytest.approx((1e-3 + 1e-5) / 2)
    assert config.rate(1.0) == config.rate(1.2) == pytest.approx(1e-5)


WRONG = {
    "neither": ({}, "steps: want steps or minutes, one of them; got None and None"),
    "both": ({"steps": 1, "minutes": 1.0}, "want steps or minutes, one of them; got 1 and 1.0"),
    "no steps": ({"steps": 0}, "steps: want a positive number; got 0"),
    "no test": ({"steps": 1, "ttt": 0}, "ttt: want a positive number; got 0"),
    "rising": ({"steps": 1, "lr": 1e-6}, "want 0 <= warmup < 1, 0 <= lr_end <= lr"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


# -- runs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
def test_a_draft_learns_what_a_small_target_says(model, material, tmp_path, gate):
    some = material.train[:4]
    config = TrainConfig(gate=gate, steps=40, draft_vocab=99, lr=1e-2, head_lr_factor=1.0)
    run = Trainer(model, some, [], material.cache, tmp_path, config, aux_layers=AUX_LAYERS)
    before = run.accuracy(some)
    run.run()
    after = run.accuracy(some)
    assert max(before) < 0.2
    assert min(after) > 0.7


def test_metrics_say_how_it_goes(model, material, tmp_path):
    shares = []
    trainer(model, material, tmp_path, steps=8).run(lambda share, line: shares.append(share))
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert shares == [step / 8 for step in range(1, 9)]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8]
    assert [line["step"] for line in lines if "held_out_accuracy" in line] == [4, 8]
    assert lines[0]["loss"][0] > 0
    assert len(lines[0]["accuracy"]) == 2
    assert lines[0]["tokens_per_second"] > 0


def test_a_time_limit_ends_a_run(model, material, tmp_path):
    run = trainer(model, material, tmp_path, minutes=0.3 / 60)
    started = time.monotonic()
    run.run()
    assert run.step >= 1
    assert 0.3 <= run.seconds < time.monotonic() - started + 0.1


def test_a_run_stopped_and_gone_on_ends_with_the_same_bits(model, material, tmp_path):
    whole = trainer(model, material, tmp_path / "whole", steps=9).run()

    def stop(at: int):
        def progress(share: float, line: str) -> None:
            if round(share * 9) == at:
                raise InterruptedError

        return progress

    for at in (3, 7):
        with pytest.raises(InterruptedError):
            trainer(model, material, tmp_path / "stopped", steps=9, checkpoint_seconds=0.0).run(stop(at))
    again = trainer(model, material, tmp_path / "stopped", steps=9, checkpoint_seconds=0.0)
    assert again.step == 6
    draft = again.run()
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, draft.state_dict()[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / METRICS).read_text().splitlines()]
    assert steps == sorted(steps)


def test_another_run_in_the_same_folder_is_refused(model, material, tmp_path):
    trainer(model, material, tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"want a run with the settings of this one; it has lr = 0\.002, seed = 0"):
        trainer(model, material, tmp_path, steps=2, seed=1, lr=1e-3)


def test_nothing_to_train_on_is_refused(model, material, tmp_path):
    with pytest.raises(ValueError, match="responses: want one or more; got 0"):
        Trainer(model, [], [], material.cache, tmp_path, TrainConfig(steps=1), aux_layers=AUX_LAYERS)


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from draft_cases import AUX_LAYERS, make_material
from m3.draft.train import TrainConfig, Trainer
from m3.models.loader import load_model
model = load_model({model!r})
material = make_material(model, Path({states!r}))
config = TrainConfig(steps={steps}, checkpoint_seconds=0.0, **{settings!r})
run = Trainer(model, material.train, [], material.cache, Path({folder!r}), config, aux_layers=AUX_LAYERS)
print("begun", flush=True)
run.run(lambda share, line: print(share, flush=True))
"""


def test_a_killed_run_goes_on_to_the_same_bits(llama, model, material, tmp_path):
    steps, folder = 30, tmp_path / "killed"
    names = {"model": str(llama[0]), "states": str(tmp_path / "states"), "folder": str(folder), "root": str(ROOT)}
    script = KILLED.format(steps=steps, settings=SMALL, tests=str(Path(__file__).parent), **names)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ})
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(8)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert seen[0] == b"begun\n"
    assert (folder / RUN).is_file()
    assert (folder / CHECKPOINT).is_file()
    settings = {**SMALL, "checkpoint_seconds": 0.0, "steps": steps}
    config = TrainConfig(**settings)
    again = Trainer(model, material.train, [], material.cache, folder, config, aux_layers=AUX_LAYERS)
    assert 6 <= again.step < steps
    whole = Trainer(model, material.train, [], material.cache, tmp_path / "whole", config, aux_layers=AUX_LAYERS)
    draft, wanted = again.run(), whole.run()
    for name, weight in wanted.state_dict().items():
        assert torch.equal(weight, draft.state_dict()[name]), name
