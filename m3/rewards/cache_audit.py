"""How safe and how useful the claim cache is, measured offline: perturbed claims, rewordings, claims of real groups.

Perturbed claims: real sentences are stored, what m3/rewards/claim_perturbation.py makes of them is asked. A hit on a
changed claim is a false hit, a hit on a rewording is what the cache is for. K-QA statements with the tuning rules are
what the guard was written with; sentences of MedQuAD with the test rules are what counts. Beside it, on the same
pairs, a cache without guard: the nearest claim at cosine 0.90 and 0.95.

Groups: five recorded consultations of one case with one doctor model (CRAFT-MD) are asked as five rollouts of one
prompt, sentence by sentence, through the real cache; then all again, as a second epoch would.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3.rewards.claim_cache import NEIGHBOURS, THRESHOLD, ClaimCache, wilson
from m3.rewards.claim_guard import same
from m3.rewards.claim_perturbation import Pair, make_pairs
from m3.rewards.claim_stores import SqliteStore
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.text.embed import Embedder
from m3.text.words import sentences, words

BASELINES = (0.90, 0.95)  # RedisVL's default distance of 0.1, and a stricter one
PROMPT = "You are an AI doctor"  # three doctors' instructions are recorded as what the patient says first
SHORTEST_CLAIM = 4  # ours: words; shorter sentences ("No.") say nothing alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindRow:
    """One kind of one set. ``unguarded``: hits of the nearest claim at each of BASELINES."""

    which: str
    kind: str
    pairs: int
    hits: int
    unguarded: tuple[int, ...]

    @property
    def harmless(self) -> bool:
        """Whether a hit is right."""
        return self.kind == "rewording"

    @property
    def rate(self) -> tuple[float, float, float]:
        """(share, low, high) of hits, Wilson's 95 %."""
        return wilson(self.hits, self.pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadRow:
    """Claims of one trial of every group in one epoch, and which level had them."""

    epoch: int
    trial: int
    claims: int
    l1: int
    l2: int

    @property
    def hit_rate(self) -> float:
        """Share of claims that needed no verifier."""
        return (self.l1 + self.l2) / self.claims if self.claims else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheAudit:
    """A whole audit. ``examples``: (pair, "false hit" | "missed") to read, a few of each."""

    embedder: str
    threshold: float
    seed: int
    kinds: tuple[KindRow, ...]
    rules: tuple[tuple[str, str, int, int], ...]  # rewordings of the test set: (kind, rule, pairs, hits)
    workload: tuple[WorkloadRow, ...]
    groups: int
    stored: int  # claims verified by the end of the workload
    examples: tuple[tuple[str, Pair], ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self)

    def markdown(self) -> str:
        """The tables of docs/experiments/claim_cache.md."""
        lines = [
            f"Embedder {self.embedder}, threshold {self.threshold:g}, seed {self.seed}.",
            "",
            "| set | kind | pairs | guarded hits | share [95 %] | unguarded 0.90 | unguarded 0.95 |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.kinds:
            share, low, high = row.rate
            shown = f"{share:.1%} [{low:.1%}, {high:.2%}]"
            loose = " | ".join(f"{hits / row.pairs:.1%}" for hits in row.unguarded)
            lines.append(f"| {row.which} | {row.kind} | {row.pairs} | {row.hits} | {shown} | {loose} |")
        lines += ["", f"{self.groups} groups, {self.stored} claims verified.", ""]
        lines += ["| epoch | trial | claims | L1 | L2 | hits |", "|---|---|---|---|---|---|"]
        for one in self.workload:
            cells = (one.epoch, one.trial, one.claims, f"{one.l1 / one.claims:.1%}", f"{one.l2 / one.claims:.1%}")
            lines.append("| " + " | ".join(map(str, cells)) + f" | {one.hit_rate:.1%} |")
        return "\n".join(lines) + "\n"


def run_cache_audit(
    kqa: str | Path,
    medquad: str | Path,
    craft_md: str | Path,
    embedder: Embedder,
    *,
    threshold: float = THRESHOLD,
    per_kind: int = 600,
    groups: int | None = 100,
    seed: int = 0,
) -> CacheAudit:
    """The whole audit.

    Args:
        kqa, medquad, craft_md: folders with questions_w_answers.jsonl, medquad_nih_core.jsonl.gz, replay_dev.jsonl.gz.
        per_kind: pairs of each kind, or what the sentences give.
        groups: of five trials, the first in order of the file; None is all.
    Raises:
        OSError: a file is not there.
        ValueError: as ClaimCache.
    """
    sets = {"tuning": kqa_statements(kqa), "test": medquad_sentences(medquad)}
    kinds: list[KindRow] = []
    rules: list[tuple[str, str, int, int]] = []
    examples: list[tuple[str, Pair]] = []
    for which, found in sets.items():
        pairs = list(make_pairs(found, which, per_kind, seed))
        outcomes = audit_pairs(pairs, embedder, threshold)
        for kind in dict.fromkeys(pair.kind for pair in pairs):
            rows = [outcome for pair, outcome in zip(pairs, outcomes, strict=True) if pair.kind == kind]
            loose = tuple(sum(row[1] >= cut for row in rows) for cut in BASELINES)
            hits = sum(row[0] for row in rows)
            kinds.append(KindRow(which=which, kind=kind, pairs=len(rows), hits=hits, unguarded=loose))
        if which == "test":
            for rule in dict.fromkeys(pair.rule for pair in pairs if pair.kind == "rewording"):
                hits_of = [
                    hit
                    for pair, (hit, _) in zip(pairs, outcomes, strict=True)
                    if (pair.kind, pair.rule) == ("rewording", rule)
                ]
                rules.append(("rewording", rule, len(hits_of), sum(hits_of)))
            wrong = [
                (pair, hit) for pair, (hit, _) in zip(pairs, outcomes, strict=True) if hit != (pair.kind == "rewording")
            ]
            examples += [("false hit" if hit else "missed", pair) for pair, hit in wrong]
    trials = list(trial_groups(craft_md))[:groups]
    workload, stored = asyncio.run(_workload(trials, embedder, threshold, seed))
    return CacheAudit(
        embedder=embedder.name,
        threshold=threshold,
        seed=seed,
        kinds=tuple(kinds),
        rules=tuple(rules),
        workload=tuple(workload),
        groups=len(trials),
        stored=stored,
        examples=tuple(examples[:40]),
    )


def audit_pairs(pairs: Sequence[Pair], embedder: Embedder, threshold: float) -> list[tuple[bool, float]]:
    """(guarded hit, cosine of the nearest stored claim) of each changed claim; every claim of ``pairs`` is stored."""
    stored = list(dict.fromkeys(pair.claim for pair in pairs))
    asked = list(dict.fromkeys(pair.changed for pair in pairs))
    rows = embedder(stored)
    outcome: dict[str, tuple[bool, float]] = {}
    for start in range(0, len(asked), 512):
        part = asked[start : start + 512]
        cosines = embedder(part) @ rows.T
        k = min(NEIGHBOURS, len(stored))
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        for i, text in enumerate(part):
            near = [j for j in nearest[i] if cosines[i, j] >= threshold]
            outcome[text] = (any(not same(text, stored[j]) for j in near), float(cosines[i].max()))
    return [outcome[pair.changed] for pair in pairs]


def kqa_statements(folder: str | Path) -> list[str]:
    """Statements of physicians' answers, each once, sorted."""
    with (Path(folder) / "questions_w_answers.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = {text.strip() for row in rows for text in (*row["Must_have"], *row["Nice_to_have"])}
    return sorted(text for text in found if len(text.split()) >= SHORTEST_CLAIM)


def medquad_sentences(folder: str | Path, every: int = 1) -> list[str]:
    """Whole sentences of 6 to 28 words of all answers, or of one in ``every``, each once, sorted."""
    with gzip.open(Path(folder) / "medquad_nih_core.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = itertools.islice(file, 0, None, every)
        found = {text for line in lines for text in sentences(json.loads(line)["answer"])}
    return sorted(text for text in found if 6 <= len(text.split()) <= 28 and text[-1] == "." and text[0].isupper())


def trial_groups(folder: str | Path) -> Iterator[list[list[str]]]:
    """Claims of each trial of each (case, doctor): statements of the patient, the doctor's last; once a trial."""
    groups: dict[tuple[str, str], list[tuple[int, list[str]]]] = collections.defaultdict(list)
    with gzip.open(Path(folder) / "replay_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            groups[row["case_id"], row["doctor"]].append((row["trial"], list(_claims(row["turns"]))))
    for trials in groups.values():
        yield [claims for _, claims in sorted(trials)]


def _claims(turns: Iterable[dict[str, str]]) -> Iterator[str]:
    turns = list(turns)
    said = [turn["text"] for turn in turns if turn["role"] == "patient" and not turn["text"].startswith(PROMPT)]
    said += [turn["text"] for turn in turns[-1:] if turn["role"] == "doctor"]
    found = (sentence for text in said for sentence in sentences(text))
    yield from dict.fromkeys(text for text in found if "?" not in text and len(words(text)) >= SHORTEST_CLAIM)


class _Embedded:
    """Rows made beforehand, in batches."""

    def __init__(self, embedder: Embedder, texts: Sequence[str]) -> None:
        self.name, self.dim = embedder.name, embedder.dim
        self._rows = dict(zip(texts, embedder(texts), strict=True))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._rows[text] for text in texts])


async def _workload(
    groups: Sequence[Sequence[Sequence[str]]], embedder: Embedder, threshold: float, seed: int
) -> tuple[list[WorkloadRow], int]:
    texts = list(dict.fromkeys(text for trials in groups for claims in trials for text in claims))
    store = SqliteStore()
    cache = ClaimCache(
        store,
        _Embedded(embedder, texts),
        verifier_id="none",
        corpus_hash="none",
        prompt_version="none",
        threshold=threshold,
        audit_rate=0.0,
        seed=seed,
    )

    async def supported() -> FactVerdict:
        return FactVerdict(claim="", label=Label.supported)

    rows = []
    for epoch in (1, 2):
        for trial in range(max(map(len, groups), default=0)):
            before = dataclasses.replace(cache.stats)
            for trials in groups:
                for claim in trials[trial] if trial < len(trials) else ():
                    await cache.ask(claim, supported)
            after = cache.stats
            rows.append(
                WorkloadRow(
                    epoch=epoch,
                    trial=trial,
                    claims=after.asked - before.asked,
                    l1=after.l1_hits - before.l1_hits,
                    l2=after.l2_hits - before.l2_hits,
                )
            )
    stored = store.count()
    cache.close()
    return rows, stored
