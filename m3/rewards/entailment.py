"""Does a text bear a claim out, by its words alone: no model, deterministic, explained.

A claim is set against stretches of one or two sentences. What both say is counted in content stems, weighted where
weights are given; numbers with units are compared as quantities ("24 hours" is "one day"); a negation counts where it
stands beside the words that match; listed antonyms count as the word with the other polarity.

    supported   coverage >= support (or, with an embedder, cosine >= alike), every quantity of the claim is said,
                same polarity
    refuted     coverage >= refute, and a quantity of the same unit differs, or the polarity does
    uncertain   else

What it cannot see: synonyms (unless an embedder hears them), inference, who does what to whom. It is a floor to compare
verifiers with and a stand-in where no model is at hand; docs/experiments/fact_verifier.md says how far it agrees with
physicians.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping

from m3.rewards.fact_verdicts import Label
from m3.text.embed import Embedder
from m3.text.quantities import Quantity, find_quantities
from m3.text.words import NEGATIONS, STOP_WORDS, sentences, stem, words
from m3kernels.checks import refuse

VERSION = 1  # part of a verifier's name: raised when a rule below changes
NEGATION_REACH = 3  # words before the first matched word in which a negation belongs to it; ours
_ANTONYMS = """
increase decrease, increase reduce, increase lower, raise lower, raise reduce, high low, higher lower, more less, more
fewer, cause prevent, cause cure, worsen improve, worsen relieve, aggravate relieve, safe unsafe, safe dangerous, safe
harmful, effective ineffective, benign malignant, acute chronic, contagious noncontagious, common rare, common
uncommon, likely unlikely, start stop, begin stop, allow forbid, avoid recommend, contraindicated recommended,
activate inhibit, stimulate inhibit, expand narrow, dilate constrict, hot cold, left right, before after, always
never, mild severe, temporary permanent, reversible irreversible, gain lose, gain loss, early late, hypertension
hypotension, hyperglycemia hypoglycemia, hyperthyroidism hypothyroidism, positive negative, present absent, viral
bacterial, upper lower, possible impossible, same different, associated unrelated, necessary unnecessary, strengthen
weaken, systolic diastolic, male female, men women, adults children
"""


@functools.cache
def _antonyms() -> Mapping[str, frozenset[str]]:
    table: dict[str, set[str]] = {}
    for pair in _ANTONYMS.split(","):
        left, right = (stem(word) for word in pair.split())
        table.setdefault(left, set()).add(right)
        table.setdefault(right, set()).add(left)
    return {one: frozenset(others) for one, others in table.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of the comparison; all ours (docs/experiments/fact_verifier.md). As they stand they are for an open
    corpus, where other subjects are spoken of in the same words; ``GIVEN`` is for a text on the claim's own subject."""

    support: float = 0.75
    refute: float = 0.75
    stretch: int = 2  # sentences that are read together
    alike: float = 0.8  # cosine from which a stretch that says less counts too, where there is an embedder
    anchors: int = 3  # the rarest stems of the claim, which a text that supports it must say, itself or in its context

    def __post_init__(self) -> None:
        if self.anchors < 0:
            raise refuse("entailment.Config", "anchors", "an integer >= 0", self.anchors)
        for name in ("support", "refute", "alike"):
            if not 0 < getattr(self, name) <= 1:
                raise refuse("entailment.Config", name, "a number in (0, 1]", getattr(self, name))
        if self.stretch < 1:
            raise refuse("entailment.Config", "stretch", "an integer >= 1", self.stretch)


GIVEN = Config(support=0.55, refute=0.9, stretch=3, anchors=0)  # set on one half of K-QA's questions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a text says of a claim. ``coverage``: share of the claim's content that ``quote`` says too."""

    label: Label
    coverage: float
    quote: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Read:
    """A text taken apart: words and stems by place (quantities cut out), quantities, places of negations."""

    stems: tuple[str, ...]
    content: tuple[bool, ...]
    quantities: tuple[Quantity, ...]
    negations: tuple[int, ...]


@functools.lru_cache(maxsize=65536)
def _read(text: str) -> _Read:
    found = find_quantities(text)
    plain = text
    for one in reversed(found):
        plain = plain[: one.start] + " " + plain[one.end :]
    lower = [word.lower().replace("’", "'") for word in words(plain)]
    return _Read(
        stems=tuple(stem(word) for word in lower),
        content=tuple(word not in STOP_WORDS and word not in NEGATIONS and word[0].isalnum() for word in lower),
        quantities=tuple(one.quantity for one in found),
        negations=tuple(i for i, word in enumerate(lower) if word in NEGATIONS),
    )


def content(text: str) -> list[str]:
    """Content stems of a text without quantities and negations, in order, none twice."""
    read = _read(text)
    return list(dict.fromkeys(one for one, kept in zip(read.stems, read.content, strict=True) if kept))


def weigh(
    claim: str,
    text: str,
    *,
    context: Collection[str] = (),
    weight: Callable[[str], float] | None = None,
    embedder: Embedder | None = None,
    config: Config | None = None,
) -> Finding:
    """What a text says of a claim: of its stretches of sentences the one that says most of it and tells, the shorter of
    equals.

    Args:
        context: content stems that hold for the whole text, as those of its title; at most half of a claim's coverage
            may come from there.
        weight: of a stem, > 0 (an inverse document frequency); None weighs all alike.
        embedder: hears synonyms; quantities, polarity and anchors are as strict as without it.
    """
    config = config or Config()
    said = sentences(text)
    stretches = [" ".join(said[i : i + n]) for n in range(1, config.stretch + 1) for i in range(len(said) - n + 1)]
    cosines = [0.0] * len(stretches)
    if embedder is not None and stretches:
        rows = embedder([claim, *stretches])
        cosines = (rows[1:] @ rows[0]).tolist()
    findings = [
        _weigh(claim, one, frozenset(context), weight, cosine, config)
        for one, cosine in zip(stretches, cosines, strict=True)
    ]
    nothing = Finding(label=Label.uncertain, coverage=0.0, reason="nothing alike is said")
    told = [one for one in findings if one.label is not Label.uncertain]
    return max(told or findings, key=lambda one: one.coverage, default=nothing)  # the shortest, the first of equals


def _weigh(
    claim: str,
    text: str,
    context: frozenset[str],
    weight: Callable[[str], float] | None,
    cosine: float,
    config: Config,
) -> Finding:
    wanted, read = content(claim), _read(text)
    own, other = _read(claim), frozenset(read.stems)
    if not wanted:
        return Finding(label=Label.uncertain, coverage=0.0, reason="the claim has no content")
    against = other - frozenset(own.stems)
    opposite = {one: _antonyms().get(one, frozenset()) & against for one in wanted if one not in other}
    turned = {one for one, found in opposite.items() if found}
    spoken = {one for one in wanted if one in other} | turned
    mass = {one: weight(one) if weight else 1.0 for one in wanted}
    rarest = sorted(wanted, key=lambda one: -mass[one])[: config.anchors] if weight else []
    unsaid = [one for one in rarest if one not in spoken and one not in context]
    inside = sum(mass[one] for one in spoken)
    outside = sum(mass[one] for one in wanted if one in context and one not in spoken)
    coverage = (inside + min(outside, inside)) / sum(mass.values())
    matched = set(spoken) | set(itertools.chain.from_iterable(opposite.values()))
    at = [i for i, one in enumerate(read.stems) if one in matched]
    near = range(at[0] - NEGATION_REACH, at[-1] + 1) if at else range(len(read.stems))
    negations = sum(i in near for i in read.negations)
    flips = len(turned) + negations + len(own.negations)
    missing = [one for one in own.quantities if one not in read.quantities]
    differing = [one for one in missing if any(_rival(one, said) for said in read.quantities)]
    quoted = text if len(text) <= 300 else text[:297] + "..."
    if unsaid:
        reason = f"nothing is said of {', '.join(unsaid)}"
        return Finding(label=Label.uncertain, coverage=coverage, quote=quoted, reason=reason)
    if coverage >= config.refute and differing:
        reason = "another quantity is said"
        return Finding(label=Label.refuted, coverage=coverage, quote=quoted, reason=reason)
    if coverage >= config.refute and flips % 2 and not missing:
        reason = "the opposite is said" + (f": {', '.join(sorted(turned))}" if turned else "")
        return Finding(label=Label.refuted, coverage=coverage, quote=quoted, reason=reason)
    if (coverage >= config.support or cosine >= config.alike) and not missing and flips % 2 == 0:
        reason = "the same is said" if coverage >= config.support else "the like is said"
        return Finding(label=Label.supported, coverage=coverage, quote=quoted, reason=reason)
    reason = "a quantity is not said" if missing and coverage >= config.support else "too little of it is said"
    return Finding(label=Label.uncertain, coverage=coverage, quote=quoted, reason=reason)


def _rival(one: Quantity, said: Quantity) -> bool:
    """Whether two quantities measure the same and cannot both hold."""
    return one.unit == said.unit and one.unit != "" and one.comparator == said.comparator and one != said
