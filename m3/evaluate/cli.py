"""``m3 evaluate``: stations of a consultation (ScanBench), HealthBench, hallucination. A scripted judge gets no score.

m3.cli adds ``app``; what a command needs is imported when it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from m3.environment.cli import SPEAKERS, find_cases
from m3.terminal import Bar, Debug, console, one_line_errors
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from m3.rewards.claim_cache import ClaimCache
    from m3.rewards.fact_verifier import FactVerifier

PROMPT_VERSION = "1"  # of a verifier's prompts: a cached verdict is of one version

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)

Judged = Annotated[str | None, typer.Option("--judge", help=f"A chat model as judge: {SPEAKERS}; default: rules.")]
JudgeTemplate = Annotated[str, typer.Option("--template", help="healthbench-exact or prefix-first.")]


def say_disclaimer() -> None:
    from m3.evaluate.report import DISCLAIMER

    console.print(DISCLAIMER, style="dim", soft_wrap=True)


@app.command()
@one_line_errors
def scanbench(
    trajectories: Annotated[Path, typer.Argument(help="Consultations: a .jsonl of m3.trajectory/v1.")],
    cases: Annotated[Path | None, typer.Option("--cases", help="Their cases; default: our own.")] = None,
    judge: Judged = None,
    template: JudgeTemplate = "prefix-first",
    plot: Annotated[Path | None, typer.Option("--plot", help="Score against turns: .png or .svg.")] = None,
    debug: Debug = False,
) -> None:
    """Three stations: inquiry coverage by level and dimension, weighted F1 of tests, hierarchical ICD-10."""
    from m3.environment.trajectory import read_trajectories
    from m3.evaluate import scanbench as stations
    from m3.evaluate.judged import judge_inquiries
    from m3.rewards.judge import Config, Judge
    from m3.rollout.open import open_chat

    found = find_cases(cases, None)
    recorded = list(read_trajectories(trajectories))
    who: Any = stations.ScriptedJudge()
    if judge is not None:

        async def ask() -> Any:
            async with open_chat(judge) as client:
                return await judge_inquiries(found, recorded, Judge(client, Config(template=template)))

        with Bar("judging"):
            who = asyncio.run(ask())
        console.print(f"verdicts: {who.outcomes}", markup=False)
    report = stations.evaluate(found, recorded, judge=who)
    for line in report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if plot is not None:
        stations.plot_turns(report, plot)
        console.print(str(plot), markup=False)
    say_disclaimer()


@app.command()
@one_line_errors
def healthbench(
    rows: Annotated[Path, typer.Argument(help="HealthBench's .jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .jsonl of graded answers; a stopped run goes on.")],
    policy: Annotated[str | None, typer.Option("--policy", help=f"Who answers: {SPEAKERS}.")] = None,
    answers: Annotated[
        Path | None, typer.Option("--answers", help='Recorded answers, a .jsonl of {"prompt_id", "response"}.')
    ] = None,
    judge: Judged = None,
    template: JudgeTemplate = "healthbench-exact",
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, help="Sub-sample as the public code does.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Answers to each row.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of answers and of the bootstrap.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what judging would take.")] = False,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="With --dry-run: the judge's model, for its tokenizer.")
    ] = "SmolLM2-135M-Instruct",
    debug: Debug = False,
) -> None:
    """HealthBench's arithmetic, exactly; a score only from a judge that is a language model."""
    from m3.evaluate import healthbench as bench
    from m3.rewards.judge import Config, Judge, ScriptedJudge
    from m3.rewards.rubric import read_healthbench
    from m3.rollout.open import open_chat

    chosen = bench.sample_rows(list(read_healthbench(rows)), examples)
    if not chosen:
        raise refuse("evaluate healthbench", "rows", "at least one row", f"none in {rows}")
    recorded = None if answers is None else read_answers(answers)
    if dry_run:
        plan = bench.dry_run(chosen, encoder(tokenizer), template, answers=recorded)
        console.print(
            f"{plan.calls} calls, {plan.prompt_tokens} prompt tokens, of which {plan.share:.1%} can come from a "
            f"prefix cache and {plan.computed_tokens} must be computed ({template}, {tokenizer})",
            soft_wrap=True,
        )
        return
    if (policy is None) == (recorded is None):
        raise refuse("evaluate healthbench", "--policy", "either --policy or --answers", "both" if policy else "none")

    async def evaluate() -> bench.Report:
        async with contextlib.AsyncExitStack() as stack:
            speaker: Any = recorded
            if policy is not None:
                speaker = await stack.enter_async_context(open_chat(policy))
            grader: Any = ScriptedJudge({}, overlap=0.6)
            if judge is not None:
                client = await stack.enter_async_context(open_chat(judge))
                grader = Judge(client, Config(template=template))
            return await bench.evaluate(chosen, speaker, grader, out, bench.Config(n_repeats=repeats, seed=seed))

    with Bar("answers"):
        report = asyncio.run(evaluate())
    console.print(f"HealthBench: {report.headline}", markup=False, soft_wrap=True)
    counts = {str(outcome): count for outcome, count in report.outcomes.items()}
    console.print(f"{report.answers} answers, {report.unjudged_answers} not judged; verdicts {counts}", markup=False)
    cached = report.reuse.share
    console.print(f"prompt tokens from a prefix cache: {'unknown' if cached is None else f'{cached:.1%}'}")
    table = Table("metric", "mean", "bootstrap std", "n")
    for name, stat in report.metrics.items():
        table.add_row(name, f"{stat.mean:.4f}", f"{stat.bootstrap_std:.4f}", str(stat.n))
    if report.metrics:
        console.print(table)
    say_disclaimer()


def read_answers(path: Path) -> Mapping[str, str]:
    """Raises ValueError: a row without prompt_id and response, by line."""
    from m3.text.jsonl import read_objects

    found: dict[str, str] = {}
    for place, row in read_objects(path):
        if "prompt_id" not in row or "response" not in row:
            raise ValueError(f'{place}: want "prompt_id" and "response"; got {sorted(row)}')
        found[row["prompt_id"]] = row["response"]
    return found


def encoder(model: str) -> Callable[[str], Sequence[int]]:
    """The tokenizer of a model, by name."""
    from m3.models.hub import resolve
    from m3.models.tokenizer import Tokenizer

    with Bar(model) as bar:
        found = Tokenizer(resolve(model, bar.fetch))
    return lambda text: found.encode(text, special_tokens=False)


@app.command()
@one_line_errors
def hallucination(
    responses: Annotated[Path, typer.Argument(help='A .jsonl of {"id", "question", "response"}.')],
    corpus: Annotated[Path, typer.Option("--corpus", help="Evidence: .jsonl[.gz], a .txt, or a folder of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same command goes on.")],
    model: Annotated[
        str | None, typer.Option("--model", help=f"Who extracts and verifies: {SPEAKERS}; default: rules.")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="A claim cache to use and fill (SQLite).")] = None,
    redis: Annotated[str | None, typer.Option("--redis", help="redis://host:port/0, beside --cache.")] = None,
    max_unjudged: Annotated[
        float, typer.Option("--max-unjudged", help="Share of claims that may stay unjudged.")
    ] = 0.05,
    debug: Debug = False,
) -> None:
    """Hallucination rate H (Eq 15): claims, evidence, verdicts; resumable."""
    from m3.evaluate import hallucination as rates
    from m3.rewards.claims import ChatExtractor, ScriptedExtractor
    from m3.rewards.evidence import open_evidence
    from m3.rewards.fact_verifier import ChatVerifier, ScriptedVerifier
    from m3.rollout.open import open_chat

    with Bar("indexing the corpus"):
        evidence = open_evidence(corpus, out / "index")

    if redis is not None and cache is None:
        raise refuse("evaluate hallucination", "--cache", "a file beside --redis: verdicts go there first", "none")

    async def measure() -> rates.Hallucination:
        async with contextlib.AsyncExitStack() as stack:
            extractor: Any = ScriptedExtractor()
            verifier: Any = None
            if model is not None:
                client = await stack.enter_async_context(open_chat(model))
                extractor, verifier = ChatExtractor(client), ChatVerifier(client, evidence)
            else:
                verifier = ScriptedVerifier(evidence)
            if cache is not None:
                opened = open_cache(cache, redis, verifier)
                stack.callback(opened.close)
                verifier.cache = opened
            with Bar("responses") as bar:
                return await rates.run(
                    rates.read_responses(responses),
                    extractor,
                    verifier,
                    out,
                    max_unjudged=max_unjudged,
                    progress=lambda stage, done, total: bar.step(done, total),
                )

    found = asyncio.run(measure())
    console.print((out / rates.SUMMARY).read_text(), markup=False, highlight=False)
    if model is None:
        console.print(f"H {found.rate}: by rules, not HealthBench-Hallu", markup=False)
    say_disclaimer()


def open_cache(path: Path, redis: str | None, verifier: FactVerifier) -> ClaimCache:
    """A claim cache of a verifier: SQLite, with Redis behind it where an address is given."""
    from m3.rewards.claim_cache import ClaimCache
    from m3.rewards.claim_store_redis import RedisStore
    from m3.rewards.claim_stores import ClaimStore, SqliteStore
    from m3.text.embed import LexicalEmbedder

    local = SqliteStore(path)
    store: ClaimStore = local if redis is None else RedisStore(redis, local=local)
    return ClaimCache(
        store,
        LexicalEmbedder(),
        verifier_id=verifier.name,
        corpus_hash=verifier.evidence.corpus_hash,
        prompt_version=PROMPT_VERSION,
    )
