"""The patient as an OpenAI-compatible endpoint: roles, statelessness, seeds, whoever plays it."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest
import typer
from clinic_cases import small_row
from loopback import ask, serving

from m3.environment.case import Case, Phase, own_cases
from m3.environment.llm_patient import FAREWELL
from m3.environment.patient import ScriptedPatient
from m3.environment.trajectory import Message
from m3.rollout.chat import ChatError, Failure
from m3.rollout.open import open_chat
from m3.rollout.scripted import ScriptedChat
from m3.serve.app import build
from m3.serve.cli import serve_patient
from m3.serve.patient_backend import MAX_MESSAGES, PatientBackend, to_messages

CASE = Case.from_json(small_row())
OTHER = Case.from_json({**small_row(), "id": "small-2"})
ARM = "It goes down my left arm."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(build(PatientBackend([CASE, OTHER]))) as url:
        yield url


def say(url: str, *contents: str, first: str = "user", **options: object) -> str:
    """What the patient says after these messages, the roles in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    talk = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        got = client.chat.completions.create(model="patient/small-1", messages=talk, **options)
    assert (got.choices[0].finish_reason, got.choices[0].message.role) == ("stop", "assistant")
    return got.choices[0].message.content or ""


# -- scripted ---------------------------------------------------------------------------------------------------------
def test_every_case_is_a_model(url):
    with openai.OpenAI(base_url=url, api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["patient/small-1", "patient/small-2"]


def test_an_empty_conversation_gets_the_opening_line(url):
    assert say(url) == CASE.opening_line


def test_a_greeting_gets_the_opening_line(url):
    assert say(url, "Hello.") == CASE.opening_line


def test_a_first_question_is_answered_after_the_opening_line(url):
    got = say(url, "Does the pain spread anywhere?")
    assert got.startswith(CASE.opening_line)
    assert ARM in got


def test_a_question_is_answered_from_the_facts(url):
    assert ARM in say(url, CASE.opening_line, "Does the pain spread anywhere?", first="assistant")


def test_the_whole_conversation_comes_with_each_request(url):
    opening, question = CASE.opening_line, "Does the pain spread anywhere?"
    first = say(url, opening, question, first="assistant")
    again = say(url, opening, question, first, question, first="assistant")
    assert again == f"As I said: {ARM}"
    assert say(url, opening, question, first="assistant") == first, "nothing is kept"


def test_a_served_patient_is_the_patient(url):
    patient = ScriptedPatient(CASE, seed=7)
    questions = ["Do you smoke?", "Any fever?", "What is your cat's name?", "Tell me more about the pain.", "Well."]
    messages, talk = [patient.opening()], [CASE.opening_line]
    for question in questions:
        messages.append(Message(role="assistant", content=question, turn=messages[-1].turn, phase=Phase.inquiry))
        messages.append(patient.reply(messages))
        talk.append(question)
        talk.append(say(url, *talk, first="assistant", seed=7))
    assert talk == [message.content for message in messages]


def test_a_system_message_is_not_for_the_patient(url):
    talk = [{"role": "system", "content": "Do you smoke?"}, {"role": "user", "content": "Any fever?"}]
    with openai.OpenAI(base_url=url, api_key="none") as client:
        got = client.chat.completions.create(model="patient/small-1", messages=talk)
    assert "twenty" not in (got.choices[0].message.content or "")


def test_the_answer_can_be_streamed(url):
    talk = [{"role": "user", "content": "Any fever?"}]
    with openai.OpenAI(base_url=url, api_key="none") as client:
        stream = client.chat.completions.create(model="patient/small-1", messages=talk, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == say(url, "Any fever?")


def test_nothing_of_the_case_but_words_is_told(url):
    got = ask(f"{url}/chat/completions", json.dumps({"model": "patient/small-1", "messages": []}))
    assert set(got.json()) == {"id", "object", "created", "model", "choices", "usage"}
    assert set(got.json()["choices"][0]["message"]) == {"role", "content", "refusal"}
    assert got.json()["usage"] is None


def test_the_last_message_must_be_the_physician_s(url):
    with pytest.raises(openai.BadRequestError, match="physician") as caught:
        say(url, "Hello", "Hello")
    assert caught.value.param == "messages"


def test_a_conversation_has_an_end(url):
    with pytest.raises(openai.BadRequestError, match=f"at most {MAX_MESSAGES}"):
        say(url, *["Hello"] * (MAX_MESSAGES + 1))


def test_turns_are_counted_as_in_trajectories():
    opening = ScriptedPatient(CASE, seed=0).opening()
    spoken = [("user", "hello"), ("assistant", f"{CASE.opening_line} Fine."), ("user", "a"), ("user", "b")]
    got = to_messages([{"role": role, "content": content} for role, content in spoken], opening)
    assert [(m.role, m.content, m.turn) for m in got] == [
        ("user", CASE.opening_line, 0),
        ("assistant", "hello", 0),
        ("user", "Fine.", 1),
        ("assistant", "a", 1),
        ("assistant", "b", 1),
    ]


@pytest.mark.parametrize(("cases", "told"), [([], "one or more"), ([CASE, CASE], "each id once")])
def test_cases_that_cannot_be_served(cases, told):
    with pytest.raises(ValueError, match=told):
        PatientBackend(cases)


# -- played by a model ------------------------------------------------------------------------------------------------
def test_a_model_can_play_the_patient(tmp_path):
    script = tmp_path / "replies.jsonl"
    script.write_text("\n".join(map(json.dumps, ["calm", ARM, "yes"])))
    with serving(build(PatientBackend([CASE], client=open_chat(f"scripted:{script}")))) as url:
        opening, question = CASE.opening_line, "Does the pain spread?"
        assert say(url) == opening
        assert say(url, opening, question, first="assistant") == ARM
        assert say(url, opening, question, ARM, "Goodbye.", first="assistant") == FAREWELL


@pytest.mark.parametrize(("failure", "status"), [(Failure.timeout, 504), (Failure.unreachable, 503)])
def test_a_model_that_does_not_answer_is_told(failure, status):
    client = ScriptedChat([ChatError(failure, "secret")])
    with serving(build(PatientBackend([CASE], client=contextlib.nullcontext(client)))) as url:
        got = ask(f"{url}/chat/completions", json.dumps({"model": "patient/small-1", "messages": said("Any fever?")}))
    assert (got.status, "secret" in got.text) == (status, False)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_logs_do_not_quote_the_physician(url, caplog):
    with caplog.at_level(logging.DEBUG, logger="m3.serve"):
        say(url, "Any fever, Mr Miller?")
    assert "Miller" not in caplog.text


# -- the command ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_command_serves_our_own_cases():
    code = "import typer; from m3.serve.cli import serve_patient; typer.run(serve_patient)"
    process = subprocess.Popen([sys.executable, "-c", code, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        ids = [row["id"] for row in ask(f"{line.split()[-1]}/models").json()["data"]]
        assert line.startswith(f"{len(ids)} patients: ")
    finally:
        process.terminate()
    assert process.wait(20) == 0
    assert ids == [f"patient/{case.id}" for case in own_cases()]


def test_a_guard_wants_a_model():
    with pytest.raises(typer.Exit):
        serve_patient(cases=None, split=None, model=None, guard=True, host="127.0.0.1", port=0, api_key=None)
