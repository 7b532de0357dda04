"""``m3 serve`` and ``m3 clinic patient``: OpenAI-compatible servers of a model, and of the clinic's patients.

m3.cli and m3.environment.cli register the two functions; what they need is imported when they run.
"""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3.terminal import Bar, Debug, Threads, console, one_line_errors, set_threads
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from starlette.applications import Starlette

DISCLAIMER = "Research software: not a medical device, not for the care of patients."
GRACE = 30  # seconds for which requests under way may go on after the signal to end; ours

Host = Annotated[str, typer.Option("--host", help="Address to listen at.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="M3_API_KEY", show_envvar=True, help="What clients must send; default: nothing."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="A line for each request: counts and times, no text.")]


@one_line_errors
def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a model's name, or owner/name on the hub.")],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call it; default: its folder's name.")
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="fp32, bf16, fp16, or int4: rounded here.")] = "fp32",
    draft: Annotated[
        Path | None, typer.Option("--draft", help="A draft of `m3 draft train`: the same text, sooner.")
    ] = None,
    weights_from: Annotated[
        Path | None,
        typer.Option("--weights-from", help="Take weights from checkpoints under this folder, as trainers ask to."),
    ] = None,
    api_key: ApiKey = None,
    threads: Threads = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI clients: /v1/chat/completions (streamed or not), /v1/completions, /v1/models, /health."""
    from m3.engine.engine import AsyncEngine
    from m3.serve.app import build
    from m3.serve.engine_backend import EngineBackend

    set_threads(threads)
    with Bar(f"opening {model}"):
        engine = AsyncEngine.from_model(model, weights=weights, draft=draft)
    called = name or Path(model).name
    backend = EngineBackend(engine, called, weights_from=weights_from)
    run(build(backend, api_key=api_key), host, port, called, verbose=verbose)


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
    api_key: ApiKey = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Serve the patients of cases as models "patient/<case id>": the client's messages are the physician's."""
    from m3.environment.case import own_cases, read_cases
    from m3.environment.llm_patient import LLMPatientConfig
    from m3.rollout.open import open_chat
    from m3.serve.app import build
    from m3.serve.patient_backend import MAX_BODY, PatientBackend

    if guard and model is None:
        raise refuse("patient", "--guard", "a --model whose answers it guards", "none")
    found = own_cases(split) if cases is None else [c for c in read_cases(cases) if split in (None, c.split)]
    client = None if model is None else open_chat(model)
    backend = PatientBackend(found, client=client, config=LLMPatientConfig(guard=guard))
    what = f"{len(found)} patients"
    run(build(backend, api_key=api_key, max_body=MAX_BODY), host, port, what, verbose=verbose)


def run(app: Starlette, host: str, port: int, what: str, *, verbose: bool) -> None:
    """Serve until a signal; requests under way are finished, for GRACE seconds, and the model is shut down.

    Raises:
        OSError: nothing can listen there.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                console.print(DISCLAIMER, highlight=False, soft_wrap=True)
                console.print(f"{what}: {url}", highlight=False, markup=False, soft_wrap=True)
                console.file.flush()

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
        )
        server = Server(config)
        # uvicorn raises a signal again after its shutdown, when all is done: then it means nothing more
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(1)
