"""HealthBench: its arithmetic, exactly, and a run of it that can be resumed.

    score of an example = points of clauses met / sum of the positive points      (may be negative; None without one)
    score of a tag      = the same over the clauses that have it; of an example's tag = the example's score
    reported            = mean over examples, clipped to [0, 1] here and nowhere before, n, and the standard deviation
                          of 1,000 clipped means of bootstrap samples

The public code draws the bootstrap from numpy's global generator; here it is seeded, and equal to what the public code
gives after ``numpy.random.seed(seed)``, metric by metric in its order. Source: openai/simple-evals ee3b031,
healthbench_eval.py; on agreement with physicians healthbench_meta_eval.py.

A score is told only where it means something: never of a scripted judge, never with unjudged clauses, and of a template
other than HealthBench's own it is marked as not comparable. Rows carry a canary: their text is never written or shown.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3.environment.journal import Journal
from m3.rewards.judge import RubricJudge
from m3.rewards.judge_schedule import Plan, Request, Reuse, achieved, plan, together
from m3.rewards.rubric import HealthBenchRow, match_verdicts
from m3.rewards.rubric_templates import template
from m3.rewards.verdict import Outcome, Verdict
from m3.rollout.chat import ChatClient, Usage
from m3kernels.checks import refuse

SCHEMA = "m3.healthbench/v1"
BOOTSTRAPS = 1000  # simple-evals, _compute_clipped_stats
SCRIPTED = "n/a: scripted judge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stat:
    """Of one metric: the clipped mean, the examples that have it, the bootstrap's standard deviation."""

    mean: float
    n: int
    bootstrap_std: float


# -- the arithmetic ---------------------------------------------------------------------------------------------------
def healthbench_score(points: Sequence[float], met: Sequence[bool]) -> float | None:
    """Points of the clauses met, of all positive points; may be negative; None without a positive clause."""
    possible = sum(weight for weight in points if weight > 0)
    if possible == 0:
        return None
    return sum(weight for weight, is_met in zip(points, met, strict=True) if is_met) / possible


def example_metrics(row: HealthBenchRow, met: Sequence[bool]) -> dict[str, float]:
    """Metrics of one answer by name, in the public order: overall_score, tags of the example, tags of clauses.

    A tag of clauses none of which is positive has no score. Where an example and its clauses share a tag, the clauses'
    score stands, as in the public code.

    Raises:
        ValueError: no positive clause at all, or not one verdict a clause.
    """
    items = row.rubric.items
    if len(met) != len(items):
        raise refuse("example_metrics", "met", f"{len(items)} of them, one a clause", f"{len(met)}")
    for is_met in met:
        if is_met not in (False, True):  # the name of an outcome is text, and so "true"
            raise refuse("example_metrics", "met", "true or false of each clause", repr(is_met))
    overall = healthbench_score([item.points for item in items], met)
    if overall is None:
        raise refuse("example_metrics", f"rubric of {row.prompt_id!r}", "a clause with positive points", "none")
    metrics = {"overall_score": overall, **dict.fromkeys(row.example_tags, overall)}
    places: dict[str, list[int]] = collections.defaultdict(list)
    for place, item in enumerate(items):
        for tag in item.tags:
            places[tag].append(place)
    for tag, chosen in places.items():
        score = healthbench_score([items[i].points for i in chosen], [met[i] for i in chosen])
        if score is not None:
            metrics[tag] = score
    return metrics


def aggregate(examples: Iterable[Mapping[str, float]], *, seed: int = 0) -> dict[str, Stat]:
    """Statistics of each metric over examples, and of "score", in the public code's order.

    Args:
        examples: of ``example_metrics``.
        seed: of the bootstrap; equal to the public code's figures after ``numpy.random.seed(seed)``.
    """
    values: dict[str, list[float]] = collections.defaultdict(list)
    for metrics in examples:
        for name, value in metrics.items():
            values[name].append(value)
        values["score"].append(metrics["overall_score"])
    generator = np.random.RandomState(seed)
    return {name: _stat(found, generator) for name, found in values.items()}


def _stat(values: Sequence[float], generator: np.random.RandomState) -> Stat:
    array = np.asarray(values, dtype=np.float64)
    means = [_clipped_mean(generator.choice(array, len(array))) for _ in range(BOOTSTRAPS)]
    return Stat(mean=_clipped_mean(array), n=len(array), bootstrap_std=float(np.std(means)))


def _clipped_mean(values: np.ndarray) -> float:
    return float(min(1.0, max(0.0, np.mean(values))))


def sample_rows(rows: Sequence[HealthBenchRow], num_examples: int | None) -> list[HealthBenchRow]:
    """The public code's choice of so many examples: the same ones each time; all where None or no fewer."""
    if num_examples is None or num_examples >= len(rows):
        return list(rows)
    return random.Random(0).sample(list(rows), num_examples)


def completion_id(prompt_id: str, response: str) -> str:
    """The public name of an answer: sha256 of the prompt's id and the answer."""
    return hashlib.sha256((prompt_id + response).encode()).hexdigest()


def dry_run(
    rows: Iterable[HealthBenchRow],
    encode: Callable[[str], Sequence[int]],
    template_name: str,
    *,
    answers: Mapping[str, str] | None = None,
    endpoints: int = 1,
) -> Plan:
    """What judging will take, before anything is spent.

    Args:
        encode: text to token ids: the judge's tokenizer.
        answers: by prompt_id; a row without one counts with its ideal completion, or an empty answer.
    """
    requests = []
    for row in rows:
        ideal = (row.rest.get("ideal_completions_data") or {}).get("ideal_completion") or ""
        answer = (answers or {}).get(row.prompt_id, ideal)
        conversation = [*row.prompt, {"role": "assistant", "content": answer}]
        requests.append(Request(conversation=conversation, items=row.rubric.items))
    return plan(requests, encode, template(template_name), endpoints=endpoints)


# -- a run ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of a run."""

    n_repeats: int = 1  # simple-evals
    max_concurrency: int = 8  # answers sampled and judged at once; ours
    max_tokens: int = 2048  # of an answer; ours
    temperature: float = 0.5  # of an answer: simple-evals' sampler
    seed: int = 0  # of the answers and of the bootstrap; repeat r has seed + r

    def __post_init__(self) -> None:
        for name in ("n_repeats", "max_concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise refuse("healthbench.Config", name, "1 or more", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
    """One answer and what became of its clauses; of the row no more than its id."""

    prompt_id: str
    repeat: int
    completion_id: str
    response: str
    outcomes: tuple[Outcome, ...]  # in the order of the row's clauses
    usage: tuple[Usage, ...] = ()  # of the judge's calls

    @property
    def judged(self) -> bool:
        """Whether every clause has a verdict."""
        return all(outcome.judged for outcome in self.outcomes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a run may say. ``metrics`` is empty where no score may be told; ``reason`` then says why."""

    answers: int
    unjudged_answers: int
    outcomes: Mapping[Outcome, int]
    reuse: Reuse
    metrics: Mapping[str, Stat]
    reason: str
    comparable: bool

    @property
    def headline(self) -> str:
        """The score, or why there is none."""
        if not self.metrics:
            return self.reason
        score = self.metrics["score"]
        text = f"{score.mean:.4f} (bootstrap std {score.bootstrap_std:.4f}, n {score.n})"
        return text if self.comparable else f"{text}, not comparable: {self.reason}"


async def evaluate(
    rows: Sequence[HealthBenchRow],
    client: ChatClient | Mapping[str, str],
    judge: RubricJudge,
    path: str | Path,
    config: Config | None = None,
) -> Report:
    """Sample an answer to each row, have it judged, write each down as it is done, and report.

    A run that was stopped goes on where it was: answers fully judged are kept, those with unjudged clauses are judged
    again, nothing is sampled twice.

    Args:
        client: whoever answers, or recorded answers by prompt_id.
        path: a journal (m3/environment/journal.py), new or of a run with the same settings.
    Raises:
        ValueError: the file is of another run, a recorded answer is missing, an id occurs twice, or as
            ``example_metrics``.
        ChatError: the client gave no answer; what is done is kept.
    """
    config = config or Config()
    by_id = {row.prompt_id: row for row in rows}
    if len(by_id) != len(rows):
        raise refuse("evaluate", "rows", "each prompt_id once", f"{len(rows)} rows, {len(by_id)} ids")
    for row in rows:  # before anything is spent on them
        if not any(item.wanted for item in row.rubric.items):
            raise refuse("evaluate", f"rubric of {row.prompt_id!r}", "a clause with positive points", "none")
    if isinstance(client, Mapping):
        missing = [row.prompt_id for row in rows if row.prompt_id not in client]
        if missing:
            raise refuse("evaluate", "client", "a recorded answer to each row", f"none to {missing[0]!r}")
    header = {
        "schema": SCHEMA,
        "model": "recorded" if isinstance(client, Mapping) else client.model,
        "judge": judge.name,
        "template": judge.template,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
    }
    wanted = [(row.prompt_id, repeat) for repeat in range(config.n_repeats) for row in rows]
    with Journal(path, run=header) as journal:
        graded = (_from_json(record["answer"]) for record in journal.records())
        done = {(one.prompt_id, one.repeat): one for one in graded}
        if isinstance(client, Mapping):
            other = [key[0] for key in wanted if key in done and done[key].response != client[key[0]]]
            if other:
                raise refuse("evaluate", str(path), "the answers it was begun with", f"another to {other[0]!r}")
        queue = iter([key for key in wanted if key not in done or not done[key].judged])

        async def work() -> None:
            for key in queue:
                response = done[key].response if key in done else await answer(*key)
                done[key] = await _grade(by_id[key[0]], key[1], response, judge)
                journal.append({"kind": "answer", "answer": _to_json(done[key])})
                await asyncio.to_thread(journal.sync)

        async def answer(prompt_id: str, repeat: int) -> str:
            if isinstance(client, Mapping):
                return client[prompt_id]
            reply = await client.chat(
                by_id[prompt_id].prompt,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                seed=config.seed + repeat,
            )
            return reply.text

        await together([work] * config.max_concurrency)
    return report(by_id, [done[key] for key in wanted], judge, seed=config.seed)


def report(rows: Mapping[str, HealthBenchRow], graded: Sequence[Graded], judge: RubricJudge, *, seed: int) -> Report:
    """What may be told of graded answers, by the rules above."""
    outcomes = collections.Counter(outcome for one in graded for outcome in one.outcomes)
    unjudged = sum(not one.judged for one in graded)
    reason = "" if judge.comparable else f"template {judge.template}"
    metrics: Mapping[str, Stat] = {}
    if judge.scripted:
        reason = SCRIPTED
    elif not graded:
        reason = "n/a: no answers"
    elif unjudged:
        counts = ", ".join(f"{outcome} {n}" for outcome, n in sorted(outcomes.items()) if not outcome.judged)
        reason = f"n/a: {unjudged} of {len(graded)} answers have unjudged clauses ({counts})"
    else:
        met = ([outcome is Outcome.met for outcome in one.outcomes] for one in graded)
        metrics = aggregate(
            [example_metrics(rows[one.prompt_id], bits) for one, bits in zip(graded, met, strict=True)], seed=seed
        )
    used = [Verdict(criterion="", outcome=Outcome.met, usage=usage) for one in graded for usage in one.usage]
    return Report(
        answers=len(graded),
        unjudged_answers=unjudged,
        outcomes=dict(outcomes),
        reuse=achieved(used),
        metrics=metrics,
        reason=reason,
        comparable=judge.comparable and not judge.scripted,
    )


async def _grade(row: HealthBenchRow, repeat: int, response: str, judge: RubricJudge) -> Graded:
    verdicts = await judge.judge([*row.prompt, {"role": "assistant", "content": response}], row.rubric.items)
    return Graded(
        prompt_id=row.prompt_id,
        repeat=repeat,
        completion_id=completion_id(row.prompt_id, response),
        response=response,
        outcomes=tuple(match_verdicts(row.rubric.items, verdicts)),
        usage=tuple(verdict.usage for verdict in verdicts if verdict.usage is not None),
    )


def _to_json(one: Graded) -> dict[str, Any]:
    fields = dataclasses.asdict(one)
    fields["outcomes"] = [str(outcome) for outcome in one.outcomes]
    return fields


def _from_json(row: Mapping[str, Any]) -> Graded:
    fields = dict(row)
    fields["outcomes"] = tuple(Outcome(outcome) for outcome in row["outcomes"])
    fields["usage"] = tuple(Usage(**usage) for usage in row["usage"])
    return Graded(**fields)


# -- a judge beside physicians ----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """One (answer, clause) with physicians' labels, and the judge's."""

    met: bool
    physicians: tuple[bool, ...]
    category: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """With every single label of physicians, by class (True: met). None where a class has no such label.

    ``f1_balanced``, the mean of both classes' F1, is the public headline.
    """

    pairs: int
    precision: Mapping[bool, float | None]
    recall: Mapping[bool, float | None]
    f1: Mapping[bool, float | None]
    f1_balanced: float | None


def agreement(rows: Iterable[Labelled]) -> Agreement:
    """Pairwise agreement of a judge with physicians (healthbench_meta_eval.py)."""
    pairs = collections.Counter((row.met, label) for row in rows for label in row.physicians)
    precision, recall, f1 = {}, {}, {}
    for one in (True, False):
        both = pairs[one, one]
        said, true = both + pairs[one, not one], both + pairs[not one, one]
        p, r = (both / said if said else None), (both / true if true else None)
        precision[one], recall[one] = p, r
        f1[one] = None if p is None or r is None else 2 * p * r / (p + r) if p + r else 0.0
    pos, neg = f1[True], f1[False]
    return Agreement(
        pairs=pairs.total(),
        precision=precision,
        recall=recall,
        f1=f1,
        f1_balanced=None if pos is None or neg is None else (pos + neg) / 2,
    )


def agreement_by_category(rows: Sequence[Labelled]) -> dict[str, Agreement]:
    """``agreement`` of each category, by name."""
    names = sorted({row.category for row in rows})
    return {name: agreement(row for row in rows if row.category == name) for name in names}
