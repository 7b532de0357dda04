"""How good is a fact verifier: against physicians' labels (K-QA), and against claims made from its own evidence.

``audit_kqa``: of 399 statements about answers of chat models, three physicians each said whether the answer entails,
contradicts or does neither (K-QA, arXiv 2401.14493). The verifier's evidence is the answer, so retrieval is trivial and
only reading is measured. Supported, refuted and uncertain stand for the three labels; a claim without a verdict is
counted apart. The physicians agree among themselves on 78 % of all, and 12 contradictions say little about one class.

``audit_corpus``: sentences of the corpus as they stand, which must be supported, and with a subject swapped, a number
changed or a negation put in, which must not be. It measures what a careless verifier gets wrong, and nothing more: the
truth of a changed sentence is assumed.
"""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from m3.rewards.evidence import Evidence, cut
from m3.rewards.fact_verdicts import Label, count_labels
from m3.rewards.fact_verifier import FactVerifier
from m3.text.words import STOP_WORDS, is_negated, sentences, stem, words
from m3kernels.checks import refuse

JUDGED = (Label.supported, Label.refuted, Label.uncertain)
KQA_LABELS = {"Entailment": Label.supported, "Contradiction": Label.refuted, "Neutral": Label.uncertain}
Make = Callable[[Evidence], FactVerifier]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of a verifier with the majority of physicians. ``confusion[physicians][verifier]`` counts judged claims."""

    verifier: str
    scripted: bool
    split: str
    claims: int
    judged: int
    accuracy: float
    macro_f1: float  # over the labels that physicians used
    kappa: float  # Cohen's
    f1: Mapping[str, float]
    confusion: Mapping[str, Mapping[str, int]]
    failures: Mapping[str, int]
    majority_share: float  # accuracy of always saying the most frequent label
    unanimous: float  # share of claims on which the three physicians agree


async def audit_kqa(path: str | Path, make: Make, *, split: str = "all", concurrency: int = 8) -> Agreement:
    """Agreement of a verifier with K-QA's physicians.

    Args:
        path: NLI_medical_annotator.csv.
        make: a verifier over the evidence it is given, an answer.
        split: "all", or one half of the questions: "tuning" (on which the rules' thresholds were set) or "test".
        concurrency: answers at once.
    Raises:
        ValueError: an unknown split or label, or no claim that was judged.
    """
    if split not in ("all", "tuning", "test"):
        raise refuse("audit_kqa", "split", "'all', 'tuning' or 'test'", repr(split))
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if split in ("all", _half(row["Question"]))]
    for row in rows:
        if row["majority_label"] not in KQA_LABELS:
            raise refuse("audit_kqa", "majority_label", f"of {sorted(KQA_LABELS)}", row["majority_label"])
    answers = dict.fromkeys(row["answer"] for row in rows)
    slots = asyncio.Semaphore(concurrency)
    found: dict[tuple[str, str], Label] = {}
    names: set[tuple[str, bool]] = set()

    async def one(answer: str) -> None:
        async with slots:
            verifier = make(Evidence(cut("answer", answer.replace("\n", " "))))
            names.add((verifier.name, verifier.scripted))
            claims = [row["claim"] for row in rows if row["answer"] == answer]
            for verdict in await verifier.verify(claims):
                found[answer, verdict.claim] = verdict.label

    async with asyncio.TaskGroup() as group:
        for answer in answers:
            group.create_task(one(answer))
    name, scripted = min(names, default=("", False))
    labels = [(KQA_LABELS[row["majority_label"]], found[row["answer"], row["claim"]]) for row in rows]
    unanimous = [len({row[f"label_{i}"] for i in range(3)}) == 1 for row in rows]
    return agreement(labels, verifier=name, scripted=scripted, split=split, unanimous=unanimous)


def agreement(
    labels: Sequence[tuple[Label, Label]],
    *,
    verifier: str = "",
    scripted: bool = False,
    split: str = "all",
    unanimous: Sequence[bool] = (),
) -> Agreement:
    """Of pairs (truth, verifier's label); pairs without a verdict are counted apart."""
    judged = [(truth, said) for truth, said in labels if said.judged]
    if not judged:
        raise refuse("agreement", "labels", "a claim that was judged", f"none of {len(labels)}")
    confusion = {str(one): {str(other): 0 for other in JUDGED} for one in JUDGED}
    for truth, said in judged:
        confusion[str(truth)][str(said)] += 1
    true, said_as = Counter(truth for truth, _ in judged), Counter(said for _, said in judged)
    total = len(judged)
    right = sum(truth == said for truth, said in judged)
    chance = sum(true[one] * said_as[one] for one in JUDGED) / total**2
    f1 = {str(one): 2 * confusion[str(one)][str(one)] / (true[one] + said_as[one]) for one in JUDGED if true[one]}
    return Agreement(
        verifier=verifier,
        scripted=scripted,
        split=split,
        claims=len(labels),
        judged=total,
        accuracy=right / total,
        macro_f1=sum(f1.values()) / len(f1),
        kappa=(right / total - chance) / (1 - chance) if chance < 1 else 1.0,
        f1=f1,
        confusion=confusion,
        failures=dict(Counter(str(said) for _, said in labels if not said.judged)),
        majority_share=max(Counter(truth for truth, _ in labels).values()) / len(labels),
        unanimous=sum(unanimous) / len(unanimous) if unanimous else float("nan"),
    )


def _half(question: str) -> str:
    return ("tuning", "test")[zlib.crc32(question.encode()) % 2]


# -- claims made from the evidence ------------------------------------------------------------------------------------
async def audit_corpus(verifier: FactVerifier, *, n: int = 200, seed: int = 0) -> dict[str, dict[str, int]]:
    """How often each label was given, by what was done to a sentence: as_is, subject, number, negation.

    Args:
        n: claims of each kind, or as many as the corpus yields.
        seed: of the choice of passages, sentences and swaps.
    """
    made = make_claims(verifier.evidence, n=n, seed=seed)
    flat = [claim for claims in made.values() for claim in claims]
    verdicts = iter(await verifier.verify(flat))
    return {kind: count_labels([next(verdicts) for _ in claims]) for kind, claims in made.items()}


def make_claims(evidence: Evidence, *, n: int, seed: int) -> dict[str, list[str]]:
    """Claims of each kind, at most n of a kind, from distinct passages in a seeded order."""
    rng = random.Random(seed)
    order = list(range(len(evidence)))
    rng.shuffle(order)
    subjects = [_subject(evidence, i) for i in order]
    pool = [subject for subject in subjects if subject]
    made: dict[str, list[str]] = {"as_is": [], "subject": [], "number": [], "negation": []}
    for place, subject in zip(order, subjects, strict=False):
        if not subject or all(len(claims) >= n for claims in made.values()):
            continue
        usable = [one for one in sentences(evidence.passages[place].text) if _usable(one, subject)]
        if not usable:
            continue
        sentence = rng.choice(usable)
        other = rng.choice(pool)
        changes = {
            "as_is": sentence,
            "subject": re.sub(rf"\b{re.escape(subject)}\b", other, sentence, flags=re.IGNORECASE),
            "number": _other_number(sentence, rng),
            "negation": "" if is_negated(sentence) else _VERB.sub(r"\1 not", sentence, count=1),
        }
        for kind, claim in changes.items():
            if claim and (claim != sentence or kind == "as_is") and len(made[kind]) < n:
                made[kind].append(claim)
    return made


_VERB = re.compile(r"\b(is|are|may|should|was|were|will|must)\b(?! not)")
_NUMBER = re.compile(r"(?<![\w.,-])([2-9]|[1-9]\d{1,2})(?=\s+[a-z%])")


def _subject(evidence: Evidence, place: int) -> str:
    """The rarest word of a passage's title, if no more than one in a hundred passages have it; else ""."""
    found = [word for word in words(evidence.passages[place].title) if len(word) > 4 and word.lower() not in STOP_WORDS]
    rarest = max(found, key=lambda word: evidence.rarity(stem(word)), default="")
    return rarest if rarest and evidence.rarity(stem(rarest)) > math.log(100) else ""


def _usable(sentence: str, subject: str) -> bool:
    return 6 <= len(sentence.split()) <= 30 and not sentence.endswith("?") and subject.lower() in sentence.lower()


def _other_number(sentence: str, rng: random.Random) -> str:
    match = _NUMBER.search(sentence)
    if match is None:
        return ""
    value = int(match.group(1))
    return f"{sentence[: match.start()]}{value * rng.choice((2, 3))}{sentence[match.end(1) :]}"
