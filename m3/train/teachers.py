"""Teachers: frozen models that say how likely they find tokens that somebody drew. In process, on an engine, or served.

Log-probabilities are in nats, of the tokens whose mask is not 0, at the temperature that the sample was drawn at; 0
elsewhere. Teacher and student share one vocabulary: ids are what travels.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from m3.engine.engine import AsyncEngine
from m3.engine.request import SamplingParams
from m3.rollout.chat import ChatError, Failure
from m3.train.policy_model import PolicyModel
from m3.train.rollouts import Physician
from m3.train.streams import Sample, microbatches, pack
from m3.train.together import together
from m3kernels.checks import refuse

MAX_TOKENS = 4096  # of a packed batch; ours: as the trainer's
CONCURRENCY = 16  # calls to a server under way at once; ours
TIMEOUT = 600.0  # seconds of one of them; ours: a long prompt waits behind others
STATUSES = {408: Failure.timeout, 504: Failure.timeout, 409: Failure.unreachable, 429: Failure.unreachable}


class Teacher(Protocol):
    """``name`` goes with everything that it says: it tells one model's weights from another's."""

    name: str

    async def logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        """(T,) fp32 for each sample, in their order.

        Raises:
            ValueError: a sample that it cannot judge. ChatError: a server that does not answer.
        """
        ...


class ModelTeacher:
    """A model in this process, read as the trainer reads its own.

    Args:
        max_tokens: of the samples that are packed together; a longer one stands alone.
    """

    def __init__(self, model: PolicyModel, name: str, *, max_tokens: int = MAX_TOKENS) -> None:
        self.name = name
        self._model, self._max_tokens = model, max_tokens
        self._one_at_a_time = asyncio.Lock()

    async def logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        async with self._one_at_a_time:
            work = asyncio.ensure_future(asyncio.to_thread(self._read, samples))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait({work})  # nobody changes the weights while they are read
                raise

    def _read(self, samples: Sequence[Sample]) -> list[Tensor]:
        found: list[Tensor] = []
        for part in microbatches(samples, self._max_tokens):
            packed = pack(part)
            found += [one.clone() for one in self._model.logprobs(packed).split([sample.tokens for sample in part])]
        return found


class EngineTeacher:
    """A model on an engine of its own, whose weights nobody changes."""

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        self.name = name
        self._engine = engine

    async def logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        return await together([self._of(sample) for sample in samples])

    async def _of(self, sample: Sample) -> Tensor:
        _check_temperature("EngineTeacher", sample)
        params = SamplingParams(max_tokens=1, prompt_logprobs=True, seed=0)
        done = await self._engine.complete(sample.ids.tolist(), params)
        if done.prompt_logprobs is None:
            raise ChatError(Failure.unreachable, f"{self.name}: {done.error or done.finish_reason}"[:500])
        return _placed(sample, done.prompt_logprobs)


class ServedTeacher:
    """A model behind a server that gives log-probabilities of prompts, as vLLM's completions do.

    Args:
        base_url: with its version: "http://127.0.0.1:8000/v1". model: its name there.
        name: None: that of the model.
        api_key: None: the environment's OPENAI_API_KEY, and no key where there is none.
        timeout: seconds of one attempt. concurrency: calls under way at once.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        name: str | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        max_retries: int = 3,
        concurrency: int = CONCURRENCY,
    ) -> None:
        import os

        import openai

        self.name = model if name is None else name
        self._model, self._where = model, f"{base_url} ({model})"
        self._room = asyncio.Semaphore(concurrency)
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=max_retries)

    async def logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        return await together([self._of(sample) for sample in samples])

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def _of(self, sample: Sample) -> Tensor:
        import openai

        _check_temperature("ServedTeacher", sample)
        ids = sample.ids.tolist()
        async with self._room:
            try:
                answer: Any = await self._client.completions.create(
                    model=self._model, prompt=ids, max_tokens=1, temperature=0.0, extra_body={"prompt_logprobs": 0}
                )
            except openai.OpenAIError as error:
                raise failed(self._where, error) from error
        return _placed(sample, self._told(answer, ids))

    def _told(self, answer: Any, ids: Sequence[int]) -> list[float]:
        """Of ids[1:]: from one object a token, {id: {"logprob": nats, ...}, ...}; the first is null."""
        choices = getattr(answer, "choices", None)
        rows: Any = getattr(choices[0], "prompt_logprobs", None) if choices else None
        if not isinstance(rows, list) or len(rows) != len(ids):
            got = f"{len(rows)}" if isinstance(rows, list) else "none"
            raise ChatError(Failure.unreachable, f"{self._where}: want prompt_logprobs of {len(ids)} tokens; got {got}")
        found = []
        for place, (row, token) in enumerate(zip(rows[1:], ids[1:], strict=True), 1):
            told = row.get(str(token)) if isinstance(row, dict) else None
            value = told.get("logprob") if isinstance(told, dict) else None
            if not isinstance(value, (int, float)) or math.isnan(value):
                want = f"the log-probability of token {token} at {place}"
                raise ChatError(Failure.unreachable, f"{self._where}: want {want}; got {str(row)[:80]}")
            found.append(float(value))
        return found


class SamplingTeacher:
    """The teacher that drew the samples itself: what its sampler said of them. For rollouts without filters alone.

    Raises:
        ValueError: a physician that draws with top_k, top_p or min_p: its log-probabilities are those of another law.
    """

    def __init__(self, physician: Physician, name: str | None = None) -> None:
        if physician.filtered:
            raise refuse("SamplingTeacher", "physician", "one without top_k, top_p, min_p", physician.sampling)
        self.name = physician.name if name is None else name

    async def logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        for sample in samples:
            if sample.sampler_logprobs is None:
                want = "a stream of every sample"
                raise refuse("SamplingTeacher", "sampler_logprobs", want, f"none of sample {sample.id!r}")
        return [torch.where(one.mask > 0, one.sampler_logprobs, 0.0) for one in samples]  # type: ignore[arg-type]


async def judged(stream: str, samples: Sequence[Sample], teacher: Teacher) -> list[Sample]:
    """The samples with the teacher's log-probabilities as their ``stream``."""
    found = await teacher.logprobs(samples)
    changes: list[dict[str, Any]] = [{stream: told} for told in found]
    return [dataclasses.replace(one, **change) for one, change in zip(samples, changes, strict=True)]


def failed(where: str, error: Exception) -> ChatError:
    """What an error of the openai client is, by name. ``where``: which server."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return ChatError(Failure.timeout, f"{where}: no answer, after every retry")
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        failure = STATUSES.get(status, Failure.unreachable if status >= 500 else Failure.refused)
        return ChatError(failure, f"{where}: status {status}: {error.message}"[:500])
    return ChatError(Failure.unreachable, f"{where}: {error}"[:500])


def _check_temperature(op: str, sample: Sample) -> None:
    if sample.temperature != 1.0:
        want = "1: log-probabilities of prompts are those of temperature 1"
        raise refuse(op, "temperature", want, f"{sample.temperature:g} of sample {sample.id!r}")


def _placed(sample: Sample, told: Sequence[float]) -> Tensor:
    """Log-probabilities of ids[1:] as a stream."""
    return torch.where(sample.mask > 0, torch.tensor([0.0, *told], dtype=torch.float32), 0.0)
