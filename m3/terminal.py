"""What every command of ``m3`` shares: the two consoles, a progress line, errors in one line, opening a model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from m3.models.decoder import Decoder
    from m3.models.tokenizer import Tokenizer

console = Console()
errors = Console(stderr=True)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of torch and the kernels; default: all cores.")
]

ERRORS = {  # of ours that a user can cause: class by module
    "m3.environment.pipeline": "PipelineError",
    "m3.models.hub": "FetchError",
    "m3.rewards.rubric_evolution": "MiningError",
    "m3.rewards.verdict": "UnjudgedError",
    "m3.rollout.chat": "ChatError",
    "m3.train.stage": "NonFiniteError",
    "m3kernels": "BackendError",
}


def told() -> tuple[type[Exception], ...]:
    """ValueError, OSError and ERRORS, but for classes of modules that are not loaded: nobody can have raised them."""
    found = (ValueError, OSError)
    return found + tuple(
        getattr(sys.modules[module], name) for module, name in ERRORS.items() if hasattr(sys.modules.get(module), name)
    )


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can cause into one line and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except told() as error:
            if debug:
                raise
            errors.print(
                "error: " + " ".join(str(error).split()), style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error

    return run


class Bar:
    """One progress line: shown while it is entered, told by calls of (what, done, total) or (done, total)."""

    def __init__(self, what: str) -> None:
        self.what = what
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
        self.task: TaskID | None = None

    def __enter__(self) -> Bar:
        self.progress.__enter__()
        self.task = self.progress.add_task(self.what, total=None)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)

    def step(self, done: int, total: int) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=done, total=total)

    def fetch(self, what: str, done: int, total: int) -> None:
        if self.task is not None:
            unit = 1_000_000 if what == "downloading" else 1
            text = f"{self.what}: {what}{' (MB)' if unit > 1 else ''}"
            self.progress.update(self.task, description=text, completed=done // unit, total=total // unit)


def set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def open_model(name: str, activations: str = "auto") -> tuple[Path, Decoder, Tokenizer]:
    """(folder, model, tokenizer) of a model by name, with progress."""
    from m3.models.hub import resolve
    from m3.models.loader import load_model
    from m3.models.tokenizer import Tokenizer

    with Bar(name) as bar:
        folder = resolve(name, bar.fetch)
    with Bar("reading the weights") as bar:
        model = load_model(folder, activations=activations, progress=bar.step)
    return folder, model, Tokenizer(folder)


def say(pieces: Iterable[str]) -> str:
    """Print text as it comes."""
    text = ""
    for piece in pieces:
        text += piece
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.file.flush()
    console.print()
    return text
