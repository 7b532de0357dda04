"""The command line: ``m3 quickstart``, and its parts and siblings.

What a user can get wrong ends in one line on standard error and exit code 1; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from m3.draft.cli import app as draft_app
from m3.environment.cli import app as clinic_app
from m3.evaluate.cli import app as evaluate_app
from m3.quantize.cli import quantize
from m3.serve.cli import serve
from m3.terminal import Bar, Debug, Threads, console, one_line_errors, open_model, say, set_threads
from m3.train.cli import app as train_app
from m3.train.cli import pipeline_app

if TYPE_CHECKING:
    from m3.models.decoder import Decoder
    from m3.models.tokenizer import Tokenizer
    from m3.quantize.round_to_nearest import RoundConfig

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
)
app.add_typer(draft_app, name="draft")
app.add_typer(clinic_app, name="clinic")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(train_app, name="train")
app.add_typer(pipeline_app, name="pipeline")
app.command()(serve)
app.command()(quantize)

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What are the warning signs of a heart attack, and what should I do if I notice them?"
GROUP_SIZE = 128
ANSWER_TOKENS = 160
DRAFT_MINUTES = 2.0
MB = 1e6


Model = Annotated[str, typer.Argument(help=f"A checkpoint folder, {MODEL}, or owner/name on the Hugging Face hub.")]
GroupSize = Annotated[
    int, typer.Option("--group-size", help="Columns that share a scale: 32, 64, 128, ... or -1 for a whole row.")
]


def rounded(model: Decoder, config: RoundConfig) -> Decoder:
    from m3.quantize.round_to_nearest import quantize_model

    with Bar(f"rounding to INT4 ({config.method}, group {config.group_size})") as bar:
        return quantize_model(model, config, bar.step)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The prompt in the model's chat template, or as it is."""
    if raw or tokenizer.template is None:
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.chat([*messages, {"role": "user", "content": prompt}])


@app.command()
@one_line_errors
def quickstart(
    model: Annotated[str, typer.Option("--model", help="What to start with.")] = MODEL,
    question: Annotated[str, typer.Option("--question", help="What to ask.")] = QUESTION,
    group_size: GroupSize = GROUP_SIZE,
    draft_minutes: Annotated[
        float, typer.Option("--draft-minutes", min=0, help="Train a draft so long, and say whether it pays; 0: do not.")
    ] = DRAFT_MINUTES,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Fetch a small model, make it INT4, compare, let it answer a clinical question, and try to speed it up."""
    from m3.engine.batch_engine import Engine
    from m3.engine.core import EngineCore
    from m3.engine.request import SamplingParams
    from m3.quantize.compare import compare
    from m3.quantize.round_to_nearest import RoundConfig

    set_threads(threads)
    started = time.monotonic()
    _, full, tokenizer = open_model(model)
    configs = [RoundConfig(group_size=group_size, method=method) for method in ("minmax", "weighted")]
    int4 = [rounded(full, config) for config in configs]
    with Bar("measuring") as bar:
        rows = compare(full, int4, tokenizer, bar.step)
    names = ["bf16", "INT4 nearest", "INT4 searched"]
    table = Table(title=f"{model} before and after INT4, group {group_size}")
    for column in ("weights", "linears MB", "of bf16", "rest MB", "perplexity", "tokens/s"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, row in zip(names, rows, strict=True):
        size = row.sizes
        table.add_row(
            name,
            f"{size.linears / MB:.1f}",
            f"{100 * size.ratio:.1f}%",
            f"{size.rest_bf16 / MB:.1f}",
            f"{row.perplexity:.2f}",
            f"{row.tokens_per_second:.1f}",
        )
    console.print(table)
    console.print(
        "linears: q, k, v, o, gate, up, down of every layer, with scales and padding. rest: embedding (tied to the "
        "head) and norms, not quantised, counted in bf16. perplexity: on the text in m3/data, our own. "
        "tokens/s: one sequence, greedy, after 64 tokens.",
        style="dim",
        highlight=False,
    )
    console.print(f"\n[bold]{question}[/bold]\n", highlight=False)
    prompt = prompt_tokens(tokenizer, question, None, False)
    say(Engine(EngineCore(int4[-1]), tokenizer).stream(prompt, SamplingParams(max_tokens=ANSWER_TOKENS)))
    if draft_minutes:
        from m3.draft.trial import trial

        with Bar("trying a draft") as bar:
            tried = trial(full, int4[-1], tokenizer, minutes=draft_minutes, progress=bar.fetch)
        console.print(tried.table())
        console.print(tried.verdict(), highlight=False)
    console.print(
        f"\nThe answer of a very small model: a demonstration, not medical advice. {time.monotonic() - started:.0f} s.",
        style="dim",
        highlight=False,
    )


@app.command(name="generate")
@one_line_errors
def generate_text(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say to the model.")],
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens that hold p.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Drop tokens below p times the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    weights: Annotated[str, typer.Option("--weights", help="fp32, bf16, fp16, or int4: rounded here.")] = "fp32",
    draft: Annotated[
        Path | None, typer.Option("--draft", help="A draft of `m3 draft train`: the same text, sooner.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say how fast it went.")] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Stream the answer of a model, dense or INT4. The same seed gives the same text, with a draft and without."""
    from m3.engine.batch_engine import Engine
    from m3.engine.core import EngineCore
    from m3.engine.open import open_draft, open_target
    from m3.engine.request import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    set_threads(threads)
    with Bar(f"opening {model}") as bar:
        decoder, tokenizer = open_target(model, weights=weights, progress=bar.step)
    core = EngineCore(decoder, draft=None if draft is None else open_draft(draft, decoder))
    started = time.monotonic()
    say(Engine(core, tokenizer).stream(prompt_tokens(tokenizer, prompt, system, raw), params))
    if stats:
        seconds, counts = time.monotonic() - started, core.stats
        console.print(
            f"{counts.drawn} tokens in {seconds:.2f} s with the prompt, {counts.steps} passes, {counts.accepted} of "
            f"{counts.drafted} drafted tokens accepted",
            style="dim",
            highlight=False,
        )


@app.command()
@one_line_errors
def doctor(debug: Debug = False) -> None:
    """Say what is built, what this machine can run, and what is in the cache."""
    from m3.models.hub import BUILT_IN, built_in_path, cache_dir
    from m3kernels.__main__ import report

    console.print(report(), markup=False, highlight=False, soft_wrap=True)
    table = Table(title="\nm3", title_justify="left", show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # a path is told whole
    table.add_row("cores", str(os.cpu_count()))
    table.add_row("cache", f"{cache_dir()}{' (M3_CACHE)' if os.environ.get('M3_CACHE') else ''}")
    for name, entry in BUILT_IN.items():
        here = (built_in_path(name) / "config.json").is_file()
        wheel = (cache_dir() / "wheels" / entry.wheel).is_file()
        absent = "downloaded, not converted yet" if wheel else f"not fetched ({entry.nbytes / MB:.0f} MB from PyPI)"
        state = "ready" if here else absent
        table.add_row(name, f"{state}; {entry.license}")
    console.print(table)
