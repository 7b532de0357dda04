"""The physician behind an OpenAI-compatible server, token in, token out: /v1/completions with ids.

    {"prompt": [ids], "return_token_ids": true, "logprobs": 0, "stop_token_ids": [end], "seed": ..., "temperature": 1}

goes out; ``token_ids`` (with the token that ended the message) and ``logprobs.token_logprobs`` of each come back. vLLM
answers so, and ``m3 serve``. A server that returns text alone is refused: tokenising its text again would give other
ids, with log-probabilities that nobody drew them with. A server's log-probabilities are those of the model's own law
(vLLM's raw ones), so it draws at temperature 1 without filters.

New weights: they are written as a checkpoint (safetensors, config, tokenizer), then a hook of the user's makes the
server take them, and the run waits until it has:

    http://host:port/update_weights_from_disk    a POST of {"model_path": folder, "weight_version": "7"}: SGLang's form;
                                                 `m3 serve --weights-from FOLDER` takes it
    reload.sh {folder} {version}                 else a command, which must end with 0

The server reads the folder under the same path: on the same machine, or a shared disk.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.checkpoint import save_tensors
from m3.environment.case import Phase
from m3.environment.episode import CaseView, Said
from m3.environment.trajectory import Message
from m3.models.tokenizer import Tokenizer
from m3.train.policy_model import TOKENIZER_FILES
from m3.train.rollouts import NOTHING, prompt_ids
from m3.train.teachers import CONCURRENCY, TIMEOUT, failed
from m3kernels.checks import refuse

OP = "ServedPhysician"
# no filter, no penalty; said, because servers have defaults of the model's
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


class ServedPhysician:
    """A physician as EnginePhysician is one: ``act``, ``refresh``, ``version``.

    Args:
        base_url: with its version: "http://127.0.0.1:8000/v1". model: its name there.
        source: folder of the checkpoint that the server began with; its tokenizer and config go with new weights.
        weights: folder for checkpoints that the server is to take. refresh: the hook above; "": weights stay.
        max_tokens: of one message. timeout: seconds of one attempt. concurrency: calls under way at once.
        api_key: None: the environment's OPENAI_API_KEY, and no key where there is none.
    """

    temperature, filtered = 1.0, False

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        source: str | Path,
        weights: str | Path,
        refresh: str = "",
        max_tokens: int = 400,
        timeout: float = TIMEOUT,
        max_retries: int = 3,
        concurrency: int = CONCURRENCY,
        api_key: str | None = None,
    ) -> None:
        import os

        import openai

        self.name, self.version = model, 0
        self._source, self._weights, self._hook = Path(source), Path(weights), refresh
        self._tokenizer = Tokenizer(source)
        if self._tokenizer.template is None:
            raise refuse(OP, "source", "a checkpoint whose tokenizer has a chat template", str(source))
        self._max_tokens, self._timeout = max_tokens, timeout
        self._where = f"{base_url} ({model})"
        self._room = asyncio.Semaphore(concurrency)
        self._key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=self._key, timeout=timeout, max_retries=max_retries
        )

    @property
    def sampling(self) -> str:
        """All that decides a draw beside weights, prompt and seed."""
        return f"served, temperature 1.0, max_tokens {self._max_tokens}"

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> Said:
        """The next message.

        Raises:
            ChatError: timeout, refused, unreachable, as EnginePhysician. ValueError: a server without ids.
        """
        before, given = prompt_ids(self._tokenizer, messages)
        ids, logprobs, finish = await self._draw([*before, *given], seed, self._max_tokens)
        return Said(
            text=self._tokenizer.decode(ids).strip() or NOTHING,
            given_ids=tuple(given),
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            versions=(self.version,) * len(ids),
            finish=finish,
        )

    async def check(self) -> None:
        """Draw one token.

        Raises:
            ValueError: a server that takes or tells no ids. ChatError: one that does not answer.
        """
        await self._draw(self._tokenizer.chat([{"role": "user", "content": "Hello"}]), 0, 1)

    async def _draw(self, prompt: list[int], seed: int, max_tokens: int) -> tuple[list[int], list[float], str]:
        import openai

        end = self._tokenizer.eos_token_id
        more: dict[str, Any] = {**PLAIN, "return_token_ids": True, "stop_token_ids": [] if end is None else [end]}
        async with self._room:
            try:
                answer: Any = await self._client.completions.create(
                    model=self.name, prompt=prompt, max_tokens=max_tokens, temperature=1.0, top_p=1.0, seed=seed,
                    logprobs=0, extra_body=more,
                )  # fmt: skip
            except openai.OpenAIError as error:
                raise failed(self._where, error) from error
        return self._told(answer, prompt)

    def _told(self, answer: Any, prompt: list[int]) -> tuple[list[int], list[float], str]:
        """(ids, log-probabilities, how it ended) of an answer."""
        choices = getattr(answer, "choices", None)
        choice = choices[0] if choices else None
        ids = getattr(choice, "token_ids", None)
        if not isinstance(ids, list) or not ids or any(type(one) is not int for one in ids):
            want = "a server that returns token_ids (return_token_ids of /v1/completions: vLLM, m3 serve)"
            raise refuse(OP, "base_url", want, f"{self._where}, which returned {str(ids)[:80]}")
        read = getattr(choice, "prompt_token_ids", None)
        if read is not None and list(read) != prompt:
            want = f"a server that takes a prompt of {len(prompt)} ids as it is"
            raise refuse(OP, "base_url", want, f"{self._where}, which read {len(read)} other ones")
        told = getattr(getattr(choice, "logprobs", None), "token_logprobs", None)
        if not isinstance(told, list) or len(told) != len(ids) or any(not _finite(one) for one in told):
            want = f"a server that tells the log-probability of each of {len(ids)} tokens"
            raise refuse(OP, "base_url", want, f"{self._where}, which told {str(told)[:80]}")
        ended = getattr(choice, "finish_reason", None)
        return ids, [float(one) for one in told], "stop" if ended == "stop" else "length"

    # -- new weights --------------------------------------------------------------------------------------------------
    async def refresh(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Go on with these weights, by their names in a Hugging Face checkpoint.

        Raises:
            ValueError: there is no hook. RuntimeError: the hook failed; says how.
        """
        if not self._hook:
            raise refuse(OP, "refresh", "a URL or a command that makes the server take new weights", "none")
        folder = await asyncio.to_thread(write_weights, self._weights, version, tensors, self._source)
        await self._take(folder, version)
        self.version = version
        await asyncio.to_thread(_sweep, self._weights, folder)

    async def _take(self, folder: Path, version: int) -> None:
        if self._hook.startswith(("http://", "https://")):
            body = json.dumps({"model_path": str(folder), "weight_version": str(version)}).encode()
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            await asyncio.to_thread(_post, urllib.request.Request(self._hook, body, headers), self._timeout)
            return
        places = {"{folder}": str(folder), "{version}": str(version)}
        words = [_filled(word, places) for word in shlex.split(self._hook)]
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            said, _ = await asyncio.wait_for(process.communicate(), self._timeout)
        except (TimeoutError, asyncio.CancelledError) as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise RuntimeError(f"{OP}: refresh: {words[0]}: not done after {self._timeout:g} s") from error
            raise
        if process.returncode:
            told = said.decode(errors="replace").strip()[-300:]
            raise RuntimeError(f"{OP}: refresh: {words[0]}: ended with {process.returncode}: {told}")

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()


def _post(request: urllib.request.Request, timeout: float) -> None:
    """Raises RuntimeError: another status than 200, or no answer."""
    url = request.full_url
    try:
        with urllib.request.urlopen(request, timeout=timeout) as found:
            status, said = found.status, ""
    except urllib.error.HTTPError as error:
        with error:
            status, said = error.code, error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"{OP}: refresh: {url}: {type(error).__name__}: {error}") from error
    if status != 200:
        raise RuntimeError(f"{OP}: refresh: {url}: status {status}: {said}")


def write_weights(folder: Path, version: int, tensors: Mapping[str, Tensor], source: Path) -> Path:
    """A checkpoint of these weights, whole or not there at all; its path, absolute.

    Args:
        source: folder of the model's config and tokenizer.
    """

    path = (folder / f"version-{version:06d}").resolve()
    part = path.with_name(f".writing-{path.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_tensors(plain, part / "model.safetensors")
    for pattern in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        for file in source.glob(pattern):
            shutil.copy(file, part / file.name)
    if path.exists():  # of the same step, before a kill
        shutil.rmtree(path)
    part.rename(path)
    return path


def _sweep(folder: Path, kept: Path) -> None:
    """Delete checkpoints of other versions."""
    for old in folder.glob("version-*"):
        if old.resolve() != kept:
            shutil.rmtree(old)


def _filled(word: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        word = word.replace(place, value)
    return word


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
