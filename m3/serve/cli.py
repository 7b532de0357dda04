"""``m3 serve`` and ``m3 clinic patient``: OpenAI-compatible servers of a model, and of the clinic's patients.

m3.cli and m3.environment.cli register the two functions; what they need is imported when they run.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from m3.terminal import Bar, Debug, Threads, console, one_line_errors, set_threads
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from fastapi import FastAPI

DISCLAIMER = "Research software: not a medical device, not for the care of patients."
M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 1 << 20  # bytes; ours
GRACE = 30.0  # seconds for which requests under way may go on after the signal to end; ours

Host = Annotated[str, typer.Option("--host", help="Address to listen at.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option("--api-key", help="A key that clients may send; several times: several. Default: M3_API_KEY's."),
]
KeysFile = Annotated[Path | None, typer.Option("--api-keys-file", help="More keys, one a line.")]
Cors = Annotated[
    list[str] | None, typer.Option("--cors", help="An origin whose pages may ask (https://...); default: none.")
]
Rate = Annotated[int | None, typer.Option("--rate", min=1, help="Requests of a key a minute; default: any number.")]
AtOnce = Annotated[int, typer.Option("--at-once", min=1, help="Requests under way at once; more get status 429.")]
AtOnceAKey = Annotated[int | None, typer.Option("--at-once-a-key", min=1, help="The same, of one key.")]
Grace = Annotated[float, typer.Option("--grace", min=0, help="Seconds for answers under way when it is to end.")]
LogFormat = Annotated[Literal["json", "text"], typer.Option("--log-format", help="Of lines on standard error.")]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option("--log-level", help="info: a line for each request: counts and times, no text."),
]


@one_line_errors
def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a model's name, or owner/name on the hub.")],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call it; default: its folder's name.")
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="fp32, bf16, fp16, or int4: rounded here.")] = "fp32",
    int4: Annotated[bool, typer.Option("--int4", help="The same as --weights int4.")] = False,
    draft: Annotated[
        Path | None, typer.Option("--draft", help="A draft of `m3 draft train`: the same text, sooner.")
    ] = None,
    weights_from: Annotated[
        Path | None,
        typer.Option("--weights-from", help="Take weights from checkpoints under this folder, as trainers ask to."),
    ] = None,
    embeddings: Annotated[
        Literal["lexical", "minilm"] | None, typer.Option("--embeddings", help="What answers /v1/embeddings.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The page for a consultation at /.")] = True,
    context: Annotated[
        int, typer.Option("--context", min=0, help="Tokens of a prompt and its answer at most; 0: the model's own.")
    ] = 0,
    running: Annotated[int, typer.Option("--running", min=1, help="Sequences computed together at most.")] = 64,
    cache_mb: Annotated[int, typer.Option("--cache-mb", min=1, help="Memory for keys and values.")] = 512,
    cache_dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "int8"], typer.Option("--cache-dtype", help="What they are held in.")
    ] = "fp32",
    api_key: ApiKeys = None,
    api_keys_file: KeysFile = None,
    cors: Cors = None,
    rate: Rate = None,
    at_once: AtOnce = 512,
    at_once_a_key: AtOnceAKey = None,
    grace: Grace = GRACE,
    log_format: LogFormat = "json",
    log_level: LogLevel = "info",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI clients: chats, completions, tools, JSON, embeddings; see docs/serving.md."""
    from m3.engine.config import EngineConfig
    from m3.engine.engine import AsyncEngine
    from m3.serve.app import build
    from m3.serve.engine_backend import EngineBackend
    from m3.serve.security import Limits

    if int4 and weights not in ("fp32", "int4"):
        raise refuse("serve", "--int4", "no other --weights beside it", weights)
    keys = all_keys(api_key, os.environ.get("M3_API_KEY"), api_keys_file)
    limits = Limits(at_once=at_once, at_once_a_key=at_once_a_key or at_once, a_minute=rate)
    set_threads(threads)
    give_memory_back()
    config = EngineConfig(
        max_context=context,
        max_running=running,
        max_step_tokens=max(running, EngineConfig.max_step_tokens),
        memory_mb=cache_mb,
        kv_dtype=cache_dtype,
    )
    embedder = None
    if embeddings is not None:
        from m3.text.embed import open_embedder

        embedder = open_embedder(embeddings)
    with Bar(f"opening {model}"):
        engine = AsyncEngine.from_model(model, config, weights="int4" if int4 else weights, draft=draft)
    called = name or Path(model).name
    backend = EngineBackend(engine, called, weights_from=weights_from, embedder=embedder)
    app = build(backend, api_keys=keys, limits=limits, cors=cors or (), page=page)
    run(app, host, port, called, grace=grace, log_format=log_format, log_level=log_level)


@one_line_errors
def serve_patient(
    cases: Annotated[Path | None, typer.Option("--cases", help="Cases, .jsonl or .json; default: our own.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="train or held_out; default: both.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Who plays them: http://host:port/v1#model or embedded:MODEL; default: scripts."),
    ] = None,
    guard: Annotated[bool, typer.Option("--guard", help="Replace answers that leak or invent (with --model).")] = False,
    host: Host = "127.0.0.1",
    port: Port = 8001,
    api_key: ApiKeys = None,
    api_keys_file: KeysFile = None,
    cors: Cors = None,
    rate: Rate = None,
    at_once: AtOnce = 512,
    at_once_a_key: AtOnceAKey = None,
    grace: Grace = GRACE,
    log_format: LogFormat = "json",
    log_level: LogLevel = "info",
    debug: Debug = False,
) -> None:
    """Serve the patients of cases as models "patient/<case id>": the client's messages are the physician's."""
    from m3.environment.case import own_cases, read_cases
    from m3.environment.llm_patient import LLMPatientConfig
    from m3.rollout.open import open_chat
    from m3.serve.app import build
    from m3.serve.patient_backend import MAX_BODY, PatientBackend
    from m3.serve.security import Limits

    if guard and model is None:
        raise refuse("patient", "--guard", "a --model whose answers it guards", "none")
    keys = all_keys(api_key, os.environ.get("M3_API_KEY"), api_keys_file)
    limits = Limits(body_bytes=MAX_BODY, at_once=at_once, at_once_a_key=at_once_a_key or at_once, a_minute=rate)
    found = own_cases(split) if cases is None else [c for c in read_cases(cases) if split in (None, c.split)]
    client = None if model is None else open_chat(model)
    backend = PatientBackend(found, client=client, config=LLMPatientConfig(guard=guard))
    app = build(backend, api_keys=keys, limits=limits, cors=cors or ())
    run(app, host, port, f"{len(found)} patients", grace=grace, log_format=log_format, log_level=log_level)


def give_memory_back() -> None:
    """Let large buffers go back to the system when they are freed, for a process that lives long.

    glibc otherwise learns to keep them: logits of a full batch are tens of megabytes a step, and what they leave behind
    grows with every size that comes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)


def all_keys(given: list[str] | None, environment: str | None, file: Path | None) -> list[str]:
    """Keys of the command line, or else of M3_API_KEY (a comma between two), and of a file.

    Raises:
        ValueError: keys were asked for, and there are none: then nothing would be locked.
    """
    from m3.serve.security import read_keys

    keys = list(given) if given else [key.strip() for key in (environment or "").split(",") if key.strip()]
    if file is not None:
        keys += read_keys(file)
    if not keys and (given or environment or file is not None):
        raise refuse("serve", "api keys", "one or more where they are asked for", "none")
    return keys


def run(
    app: FastAPI,
    host: str,
    port: int,
    what: str,
    *,
    grace: float = GRACE,
    log_format: Literal["json", "text"] = "json",
    log_level: str = "warning",
) -> None:
    """Serve until a signal (listening.py).

    Raises:
        OSError: nothing can listen there.
    """
    from m3.serve import listening, logs

    def ready(url: str) -> None:
        console.print(DISCLAIMER, highlight=False, soft_wrap=True)
        console.print(f"{what}: {url}", highlight=False, markup=False, soft_wrap=True)
        console.file.flush()

    logs.set_up(log_format, log_level)
    ended = listening.serve(app, host, port, grace=grace, ready=ready)
    if ended == signal.SIGINT:
        raise typer.Exit(130)
    if ended is None:
        raise typer.Exit(1)
