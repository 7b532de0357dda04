"""Near-duplicate questions and sentences, by rules: the words that carry a topic, the numbers, and what is asked for.

Two sentences are near duplicates if

- the stems of their topic words agree: Jaccard similarity |A & B| / |A | B| of at least ``threshold``;
- their numbers are the same: "20 mg" is not "40 mg";
- both ask in the same way, where both say how: "when did it start" is not "how did it start".

A sentence without a topic word ("How was that for you?") is compared by all of its words. Ours; no model.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence

from m3.text.words import content_stems, sentences, stems, words
from m3kernels.checks import refuse

THRESHOLD = 0.75  # ours: one word of four may differ, "skin on your face" and "skin on your back" (3 of 5) are two
_ASKING = frozenset("when where why who how".split())


@dataclasses.dataclass(frozen=True)
class Signature:
    """What of a sentence is compared."""

    topic: frozenset[str]
    numbers: frozenset[str]
    asking: str  # "when", "where", "why", "who", "how", or "" where it is none of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Sentence ``later`` says again what ``earlier`` said; both are indices."""

    earlier: int
    later: int
    likeness: float  # in [threshold, 1]


@functools.lru_cache(maxsize=1 << 16)
def signature(sentence: str) -> Signature:
    """Of one sentence."""
    said = [word.lower() for word in words(sentence)]
    topic = frozenset(content_stems(sentence)) or frozenset(stems(sentence))
    asking = next((word for word in said if word in _ASKING), "")
    return Signature(topic, frozenset(word for word in said if word[0].isdigit()), asking)


def likeness(one: Signature, other: Signature) -> float:
    """In [0, 1]: Jaccard similarity of topics; 0 where numbers or ways of asking differ, or nothing is said."""
    if one.numbers != other.numbers or (one.asking and other.asking and one.asking != other.asking):
        return 0.0
    union = len(one.topic | other.topic)
    return len(one.topic & other.topic) / union if union else 0.0


def near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD) -> list[Duplicate]:
    """For each sentence that is a near duplicate of an earlier one: the pair with the likest, the first of equals.

    Args:
        texts: sentences in order.
        threshold: in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise refuse("near_duplicates", "threshold", "a number in (0, 1]", threshold)
    found = []
    holders: dict[str, list[int]] = collections.defaultdict(list)  # from a stem to the sentences that have it
    signatures = [signature(text) for text in texts]
    for later, one in enumerate(signatures):
        shared = collections.Counter(index for stem in one.topic for index in holders[stem])
        near = [(likeness(signatures[index], one), -index) for index in shared]
        if near and max(near)[0] >= threshold:
            value, index = max(near)
            found.append(Duplicate(earlier=-index, later=later, likeness=value))
        for stem in one.topic:
            holders[stem].append(later)
    return found


def duplicate_rate(dialogues: Iterable[Sequence[str]], threshold: float = THRESHOLD) -> float:
    """The share of sentences, over all dialogues, that are near duplicates of an earlier one of their dialogue.

    Raises:
        ValueError: no sentence at all.
    """
    count = duplicates = 0
    for texts in dialogues:
        count += len(texts)
        duplicates += len(near_duplicates(texts, threshold))
    if not count:
        raise refuse("duplicate_rate", "dialogues", "at least one sentence", "none")
    return duplicates / count


def questions(text: str) -> list[str]:
    """Sentences of a message that end in a question mark, in order."""
    return [sentence for sentence in sentences(text) if sentence.rstrip("\"'*_)] ").endswith(("?", "？"))]
