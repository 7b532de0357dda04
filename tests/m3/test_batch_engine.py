"""Engine over a toy core: completions in order, bad prompts before any start, interrupts that leave the core clean."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
from toy_core import MAX_PROMPT, ToyCore, answer, beginning, make_tokenizer

from m3.engine.engine import Engine, EngineBusy, EngineDead
from m3.engine.request import SamplingParams
from m3.models.tokenizer import Tokenizer

SHORT = SamplingParams(max_tokens=12, seed=0)
LONG = SamplingParams(max_tokens=100_000, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_completions_are_in_the_order_of_the_prompts():
    """More prompts than the core lets wait."""
    core = ToyCore(max_running=3, max_waiting=4)
    prompts = [[index, index + 1] for index in range(50)]
    params = [SamplingParams(max_tokens=1 + index * 7 % 23, seed=index) for index in range(50)]
    done = Engine(core).generate(prompts, params)
    assert [one.prompt for one in done] == prompts
    assert [one.tokens for one in done] == [answer(prompts[index], params[index], index) for index in range(50)]
    assert {one.finish_reason for one in done} == {"length"}
    assert core.is_clean()


def test_completions_come_as_they_finish():
    params = [SamplingParams(max_tokens=count, seed=0) for count in (200, 1, 60)]
    assert [index for index, _ in Engine(ToyCore()).completions([[1], [2], [3]], params)] == [1, 2, 0]


def test_nothing():
    assert Engine(ToyCore()).generate([]) == []


def test_text_stop_strings_and_log_probabilities(tokenizer):
    core = ToyCore(script={ord("H"): [*b"abSTOP"] + [1] * 1000, ord("x"): [*"né 🩺".encode()]})
    params = SamplingParams(stop=("STOP",), max_tokens=900, logprobs="raw")
    first, second = Engine(core, tokenizer).generate(["Hi", "x"], params)
    assert (first.text, first.finish_reason, first.usage.completion_tokens) == ("ab", "stop", 6)
    assert first.logprobs == [-float(byte) for byte in b"ab"]
    assert (second.text, second.finish_reason) == ("né 🩺", "stop")
    assert list(core.aborted.values()) == ["stop"]
    assert core.is_clean()


def test_a_conversation(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    core = ToyCore(script={tokenizer.chat(messages)[0]: [*b"Hello"]})
    got = Engine(core, tokenizer).chat(messages)
    assert (got.text, got.prompt) == ("Hello", tokenizer.chat(messages))


def test_a_deadline():
    (got,) = Engine(ToyCore(step_time=0.001)).generate([[1]], SamplingParams(max_tokens=10**6, seed=0, deadline=0.1))
    assert got.finish_reason == "deadline"
    assert got.tokens == beginning([1], len(got.tokens))


def test_progress():
    seen: list[tuple[int, int, int]] = []
    done = Engine(ToyCore()).generate([[1], [2]], SHORT, progress=lambda *now: seen.append(now))
    assert seen[-1] == (2, 2, 24)
    assert seen == sorted(seen)
    assert len(done) == 2


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], [0] * (MAX_PROMPT + 1)], SHORT, "core: prompt"),
        ([[1], []], SHORT, "engine: prompt: want a str, or a list of ints"),
        ([[1], "text"], SHORT, "engine: prompt: want tokens where there is no tokenizer"),
        ([[1], [2]], [SHORT], "engine: params: want one for each of 2 prompts; got 1"),
        ([[1], [2]], [SHORT, None], "engine: params: want SamplingParams"),
        ("text", SHORT, "engine: prompts: want a list of prompts; got a str"),
    ],
    ids=["core", "empty", "text", "count", "params", "str"],
)
def test_a_bad_prompt_is_refused_before_any_starts(prompts, params, message):
    core = ToyCore()
    engine = Engine(core)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, params)
    assert (core.steps, core.added) == (0, [])
    assert len(engine.generate([[1]], SHORT)) == 1


def test_an_exception_of_the_caller_aborts_all():
    core = ToyCore(max_running=2, max_waiting=2)
    engine = Engine(core)

    def stop(finished: int, total: int, tokens: int) -> None:
        if tokens > 40:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine.generate([[1]] * 9, LONG, progress=stop)
    assert core.is_clean()
    assert set(core.aborted.values()) == {"abort"}
    assert engine.generate([[1]], SHORT)[0].tokens == answer([1], SHORT, 0)


def test_an_iterator_that_is_closed_aborts_the_rest():
    core = ToyCore()
    engine = Engine(core)
    completions = engine.completions([[1], [2]], [SHORT, LONG])
    assert next(completions)[0] == 0
    with pytest.raises(EngineBusy, match="want one call at a time"):
        engine.generate([[3]], SHORT)
    completions.close()
    assert core.is_clean()
    assert engine.generate([[3]], SHORT)[0].tokens == answer([3], SHORT, 0)


@pytest.fixture
def interrupts():
    """Ctrl-C as in a program that does nothing about it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_waits_for_the_step_and_aborts_all():
    whole_steps: list[int] = []

    def interrupt(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # the interpreter looks for signals between instructions
            whole_steps.append(step)

    core = ToyCore(max_running=2, max_waiting=2, on_step=interrupt)
    engine = Engine(core)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1]] * 9, LONG)
    assert whole_steps == [5]
    assert core.is_clean()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert engine.generate([[1]], SHORT)[0].tokens == answer([1], SHORT, 0)


@pytest.mark.usefixtures("interrupts")
def test_a_program_with_its_own_answer_to_an_interrupt_keeps_it():
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    core = ToyCore(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    assert Engine(core).generate([[1]], SHORT)[0].finish_reason == "length"
    assert heard == [signal.SIGINT]


def test_another_thread():
    found: list[Any] = []
    core = ToyCore()
    thread = threading.Thread(target=lambda: found.extend(Engine(core).generate([[1]], SHORT)))
    thread.start()
    thread.join()
    assert found[0].tokens == answer([1], SHORT, 0)


def test_a_broken_core():
    engine = Engine(ToyCore(fail_at=3))
    with pytest.raises(EngineDead, match="ZeroDivisionError: the toy broke") as caught:
        engine.generate([[1]], LONG)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineDead, match="ZeroDivisionError: the toy broke"):
        engine.generate([[1]], SHORT)


def test_a_core_that_never_has_room():
    with pytest.raises(EngineBusy, match="want a core with room for a request"):
        Engine(ToyCore(max_waiting=0)).generate([[1]], SHORT)
