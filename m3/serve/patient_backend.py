"""The patient of a case behind the server: any OpenAI client can consult it. Models are "patient/<case id>".

The client is the physician. In its conversation, as it sees it, its own messages have the role "user" and the
patient's answers come back as "assistant"; in m3's trajectories the physician is "assistant" and the patient "user",
so the two are exchanged here. The client's system messages are not for the patient, and are left out.

Nothing is kept between requests: each brings the whole conversation. An empty one is answered with the opening line.
Where the conversation begins with the physician ("Hello, what brings you here?"), the first answer is the opening line,
and after it what the message asked for. The same conversation and seed (default 0) get the same answer; a patient has
no other parameters: temperature, top_p, max_tokens, stop and the like have no effect. What would change the form of the
answer (several of them, tools, log-probabilities, JSON) is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

from m3.environment.case import Case, Phase
from m3.environment.episode import Patient
from m3.environment.llm_patient import LLMPatient, LLMPatientConfig
from m3.environment.patient import ScriptedPatient
from m3.environment.trajectory import Message
from m3.rollout.chat import ChatClient, ChatError, Failure
from m3.serve.backend import Delta
from m3.serve.chat_schema import ChatRequest
from m3.serve.schema import RequestError
from m3kernels.checks import refuse

PREFIX = "patient/"
MAX_MESSAGES = 400  # of a conversation; ours
MAX_BODY = 2**19  # bytes of a request; ours: what is said in a very long consultation


class PatientBackend:
    """A ChatBackend of the patients of cases.

    Args:
        cases: at least one; ids are told apart.
        client: opens the model that plays the patients (m3.rollout.open.open_chat); None: they are scripted.
        config: of patients that a model plays.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        client: contextlib.AbstractAsyncContextManager[ChatClient] | None = None,
        config: LLMPatientConfig | None = None,
    ) -> None:
        if not cases:
            raise refuse("PatientBackend", "cases", "one or more", "none")
        self._cases: Mapping[str, Case] = {PREFIX + case.id: case for case in cases}
        if len(self._cases) < len(cases):
            raise refuse("PatientBackend", "cases", "each id once", f"{len(cases)} cases, {len(self._cases)} ids")
        self._opens = client
        self._config = config
        self._client: ChatClient | None = None

    def models(self) -> Sequence[str]:
        return tuple(self._cases)

    def failure(self) -> str | None:
        return "not started" if self._opens is not None and self._client is None else None

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if self._opens is not None:
                self._client = await stack.enter_async_context(self._opens)
            yield
        self._client = None

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Delta]:
        """As ChatBackend.stream; one delta.

        Raises:
            RequestError: 400: the last message is not the physician's, there are too many, or something is asked for
                that a patient does not do; 503, 504: the model that plays the patient does not answer.
        """
        _check_form(request)
        case = self._cases[request.model]
        patient = self._patient(case, request.seed or 0)
        try:
            text = await answer(patient, request.plain())
        except ChatError as error:
            status = 504 if error.failure is Failure.timeout else 503
            raise RequestError(
                status, "the model that plays the patient does not answer", code=error.failure
            ) from error
        yield Delta(text=text, finish_reason="stop")

    def _patient(self, case: Case, seed: int) -> Patient:
        if self._client is None:
            return ScriptedPatient(case, seed=seed)
        return LLMPatient(case, self._client, seed=seed, config=self._config)


def _check_form(request: ChatRequest) -> None:
    asked = {
        "n": request.n > 1,
        "tools": bool(request.tools),
        "logprobs": request.logprobs,
        "prompt_logprobs": request.prompt_logprobs is not None,
        "response_format": request.response_format is not None and request.response_format.type != "text",
        "structured_outputs": request.structured_outputs is not None,
    }
    for name, given in asked.items():
        if given:
            raise RequestError(400, f"{name}: want the default: a patient answers in words, once", param=name)


async def answer(patient: Patient, chat: Sequence[Mapping[str, str]]) -> str:
    """What a patient says next in a client's conversation."""
    spoken = [message for message in chat if message["role"] != "system"]
    if len(spoken) > MAX_MESSAGES:
        want = f"messages: want at most {MAX_MESSAGES}; got {len(spoken)}"
        raise RequestError(400, want, param="messages")
    opening = await patient.open()
    if not spoken:
        return opening.content
    if spoken[-1]["role"] != "user":
        raise RequestError(400, "messages: want the physician's, role 'user', as the last", param="messages")
    reply = await patient.answer(to_messages(spoken, opening))
    first = all(message["role"] == "user" for message in spoken)
    if not first:
        return reply.content
    return f"{opening.content} {reply.content}" if reply.facts else opening.content


def to_messages(chat: Sequence[Mapping[str, str]], opening: Message) -> list[Message]:
    """A client's conversation, at least one message, in m3's roles; it begins with the patient's opening line, turn 0.

    Where the client's begins with the physician, the opening line is at the head of the patient's first answer there:
    it is taken off, where something else is left.
    """
    led = chat[0]["role"] == "user"
    messages = [opening] if led else []
    for row in chat:
        turn = messages[-1].turn if messages else -1
        if row["role"] == "user":
            messages.append(Message(role="assistant", content=row["content"], turn=turn, phase=Phase.inquiry))
            continue
        content = row["content"]
        if led:
            content = content.removeprefix(opening.content).strip() or content
            led = False
        messages.append(Message(role="user", content=content, turn=turn + 1, phase=Phase.inquiry))
    return messages
