"""Hallucination rate of recorded responses: claims, verdicts, summary; each stage a file, each file resumable.

    H = sum_i w_i / number of claims,  w = 1 refuted, 0.5 uncertain, 0 supported                         (Eq 15)

over all claims of all responses (pooled; this is H), and per response, whose mean is reported beside it. Claims without
a verdict are in neither sum: they are counted by name, and above ``max_unjudged`` of all claims H is not told. A rate
goes with its interval: bootstrap over responses, seeded. Source: Baichuan-M3, arXiv 2602.06570, on HealthBench-Hallu.

A run writes into its folder, a line at a time, and goes on where it was:

    run.json         what the run depends on; another one is refused in the same folder
    claims.jsonl     of each response
    verdicts.jsonl   of each response; responses with failures are verified again by the next run
    summary.json     H; ``"scripted": true`` where rules extracted or verified: it then compares to nothing published
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3.rewards.claims import Claim, Extraction, Extractor
from m3.rewards.fact_verdicts import FactVerdict, Label, count_labels
from m3.rewards.fact_verifier import FactVerifier
from m3.rewards.verdict import UnjudgedError
from m3.text.jsonl import read_objects
from m3kernels.checks import refuse

WEIGHTS: Mapping[Label, float] = {Label.refuted: 1.0, Label.uncertain: 0.5, Label.supported: 0.0}  # Eq 15
CARD, CLAIMS, VERDICTS, SUMMARY = "run.json", "claims.jsonl", "verdicts.jsonl", "summary.json"
Progress = Callable[[str, int, int], None]  # (stage, done, in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """A recorded answer of a model, and what it answers."""

    id: str
    text: str
    question: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and the 2.5 and 97.5 percentiles of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hallucination:
    """Of a set of responses. Rates are shares of judged claims, pooled."""

    rate: Interval  # H
    refuted: Interval
    uncertain: Interval
    mean_of_responses: float | None  # of H per response, over responses with a judged claim
    responses: int
    without_claims: int
    not_extracted: Mapping[str, int]  # responses whose claims could not be had, by failure
    claims: int
    labels: Mapping[str, int]  # claims by label and by failure


def response_rate(verdicts: Sequence[FactVerdict]) -> float | None:
    """H of one response (Eq 15); None without a judged claim."""
    weights = [WEIGHTS[one.label] for one in verdicts if one.label.judged]
    return sum(weights) / len(weights) if weights else None


def hallucination_rate(
    verdicts: Sequence[Sequence[FactVerdict]],
    *,
    not_extracted: Mapping[str, int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    max_unjudged: float = 0.05,
) -> Hallucination:
    """H over responses (Eq 15) and what it is made of.

    Args:
        verdicts: of each response's claims.
        not_extracted: responses beside these whose claims could not be had, by failure.
        resamples: of the bootstrap over responses.
        max_unjudged: largest share of claims without a verdict, and of responses without extraction; ours.
    Raises:
        UnjudgedError: more than that; failures by name.
        ValueError: no judged claim at all, or resamples < 1.
    """
    if resamples < 1:
        raise refuse("hallucination_rate", "resamples", "an integer >= 1", resamples)
    failed = dict(not_extracted or {})
    labels = count_labels(one for row in verdicts for one in row)
    claims = sum(labels.values())
    judged = sum(labels[str(label)] for label in WEIGHTS)
    if claims - judged > max_unjudged * claims or sum(failed.values()) > max_unjudged * (
        len(verdicts) + sum(failed.values())
    ):
        named = {name: n for name, n in labels.items() if n and not Label(name).judged}
        told = f"{claims - judged} of {claims} claims have no verdict {named}"
        raise UnjudgedError(f"hallucination_rate: {told}; {sum(failed.values())} responses have no claims {failed}")
    if not judged:
        raise refuse("hallucination_rate", "verdicts", "a judged claim", f"none in {len(verdicts)} responses")
    counts = np.array([[sum(one.label is label for one in row) for label in WEIGHTS] for row in verdicts], np.float64)
    per_response = [rate for row in verdicts if (rate := response_rate(row)) is not None]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(counts), (resamples, len(counts)))
    sums = np.stack([counts[rows].sum(0) for rows in drawn])
    sums = sums[sums.sum(1) > 0]
    weights = np.array(list(WEIGHTS.values()))

    def interval(weight: np.ndarray) -> Interval:
        value = float(counts.sum(0) @ weight / counts.sum())
        low, high = np.percentile(sums @ weight / sums.sum(1), [2.5, 97.5])
        return Interval(value=value, low=float(low), high=float(high))

    return Hallucination(
        rate=interval(weights),
        refuted=interval(np.array([1.0, 0.0, 0.0])),
        uncertain=interval(np.array([0.0, 1.0, 0.0])),
        mean_of_responses=sum(per_response) / len(per_response) if per_response else None,
        responses=len(verdicts) + sum(failed.values()),
        without_claims=sum(not row for row in verdicts),
        not_extracted=failed,
        claims=claims,
        labels=labels,
    )


# -- a run over recorded responses ------------------------------------------------------------------------------------
def read_responses(path: str | Path) -> list[Response]:
    """Responses of a .jsonl: "response" (or "completion", "answer"), and perhaps "id" (or "prompt_id") and "question".

    Raises:
        ValueError: a row without a response, an id twice, by file and line.
    """
    out: list[Response] = []
    seen: set[str] = set()
    for place, row in read_objects(path):
        text = next((row[key] for key in ("response", "completion", "answer") if isinstance(row.get(key), str)), None)
        if text is None:
            raise ValueError(f'{place}: want "response", "completion" or "answer"; got {sorted(row)}')
        id = str(row.get("id", row.get("prompt_id", place.rpartition(":")[2])))
        if id in seen:
            raise ValueError(f"{place}: id: want one used once; got {id!r} again")
        seen.add(id)
        out.append(Response(id=id, text=text, question=str(row.get("question", ""))))
    return out


async def run(
    responses: Sequence[Response],
    extractor: Extractor,
    verifier: FactVerifier,
    out: str | Path,
    *,
    concurrency: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    max_unjudged: float = 0.05,
    progress: Progress | None = None,
) -> Hallucination:
    """Extract, verify, sum up; what the folder ``out`` already holds is not done again.

    Args:
        concurrency: responses at once.
    Raises:
        ValueError: the folder holds a run of something else, an id occurs twice, or concurrency < 1.
        UnjudgedError: too many failures; files stay, and the same call tries the failed ones again.
    """
    if concurrency < 1:
        raise refuse("hallucination.run", "concurrency", "an integer >= 1", concurrency)
    if len({one.id for one in responses}) < len(responses):
        raise refuse("hallucination.run", "responses", "ids used once", f"{len(responses)} responses with fewer ids")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_card(folder, responses, extractor, verifier)
    tell = progress or (lambda stage, done, total: None)
    slots = asyncio.Semaphore(concurrency)

    async def stage(name: str, todo: Sequence[Response], work: Callable[[Response], Awaitable[dict[str, Any]]]) -> None:
        done = len(responses) - len(todo)

        async def one(response: Response) -> None:
            nonlocal done
            async with slots:
                row = await work(response)
            with (folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            done += 1
            tell(name.removesuffix(".jsonl"), done, len(responses))

        async with asyncio.TaskGroup() as group:
            for response in todo:
                group.create_task(one(response))

    async def extract(response: Response) -> dict[str, Any]:
        return _claims_row(response.id, await extractor.extract(response.text, response.question))

    claims = _latest(folder / CLAIMS)
    missing = [one for one in responses if one.id not in claims or claims[one.id]["failure"]]
    await stage(CLAIMS, missing, extract)
    claims = _latest(folder / CLAIMS)

    async def verify(response: Response) -> dict[str, Any]:
        before = {row["claim"]: FactVerdict.from_json(row) for row in verdicts.get(response.id, {}).get("verdicts", ())}
        wanted = [row["text"] for row in claims[response.id]["claims"]]
        again = [one for one in wanted if one not in before or not before[one].label.judged]
        before.update((one.claim, one) for one in await verifier.verify(again))
        return {"id": response.id, "verdicts": [before[one].to_json() for one in wanted]}

    verdicts = _latest(folder / VERDICTS)
    extracted = [one for one in responses if not claims[one.id]["failure"]]
    await stage(VERDICTS, [one for one in extracted if not _complete(claims[one.id], verdicts.get(one.id))], verify)
    verdicts = _latest(folder / VERDICTS)
    found = hallucination_rate(
        [[FactVerdict.from_json(row) for row in verdicts[one.id]["verdicts"]] for one in extracted],
        not_extracted=Counter(claims[one.id]["failure"] for one in responses if claims[one.id]["failure"]),
        resamples=resamples,
        seed=seed,
        max_unjudged=max_unjudged,
    )
    summary = {
        "scripted": extractor.scripted or verifier.scripted,
        "extractor": extractor.name,
        "verifier": verifier.name,
        "corpus_hash": verifier.evidence.corpus_hash,
        **dataclasses.asdict(found),
    }
    _replace(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return found


def _claims_row(id: str, extraction: Extraction) -> dict[str, Any]:
    return {
        "id": id,
        "claims": [dataclasses.asdict(claim) for claim in extraction.claims],
        "failure": None if extraction.failure is None else str(extraction.failure),
        "malformed": extraction.malformed,
        "explanation": extraction.explanation,
    }


def read_claims(folder: str | Path) -> dict[str, list[Claim]]:
    """Claims of each response of a run."""
    rows = _latest(Path(folder) / CLAIMS)
    return {id: [Claim(**claim) for claim in row["claims"]] for id, row in rows.items()}


def _complete(claims: Mapping[str, Any], verdicts: Mapping[str, Any] | None) -> bool:
    """Whether every claim has a verdict that is one."""
    if verdicts is None:
        return False
    labels = {row["claim"]: Label(row["label"]) for row in verdicts["verdicts"]}
    return all(row["text"] in labels and labels[row["text"]].judged for row in claims["claims"])


def _check_card(folder: Path, responses: Sequence[Response], extractor: Extractor, verifier: FactVerifier) -> None:
    digest = hashlib.sha256()
    for one in responses:
        digest.update(json.dumps([one.id, one.question, one.text], ensure_ascii=False).encode() + b"\n")
    card = {
        "responses": digest.hexdigest(),
        "extractor": extractor.name,
        "verifier": verifier.name,
        "corpus_hash": verifier.evidence.corpus_hash,
    }
    path = folder / CARD
    if not path.is_file():
        _replace(path, json.dumps(card, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in card.items():
        if before.get(name) != value:
            raise refuse(
                "hallucination.run", "out", f"a folder of the same {name}, {value}", f"{before.get(name)} there"
            )


def _latest(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each id. A last line that a kill cut off is removed."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    return {row["id"]: row for _, row in read_objects(path)}


def _replace(path: Path, text: str) -> None:
    made = path.with_name(f".{path.name}.part")
    made.write_text(text, encoding="utf-8")
    made.replace(path)
