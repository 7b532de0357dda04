"""Fact verifiers: agents that search evidence for a claim, decide themselves when it suffices, and label the claim.

Two agents behind one interface: ``ScriptedVerifier`` compares words (m3.rewards.entailment) and rewords its query;
``ChatVerifier`` lets a language model choose between a further search and a verdict. Both look at their evidence
only: a label other than "uncertain" names passages that were found. A verifier runs claims beside one another, under
a timeout a claim and a budget, and asks a cache first where one is given. What goes wrong has a name
(fact_verdicts.Label). Source: Baichuan-M3, arXiv 2602.06570, on the fact verifier.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from m3.rewards import entailment
from m3.rewards.claims import Claim
from m3.rewards.evidence import Evidence, Passage
from m3.rewards.fact_verdicts import LABEL_OF_FAILURE, FactVerdict, Label
from m3.rollout.chat import Budget, ChatClient, ChatError
from m3.rollout.replies import read_object
from m3.text.embed import Embedder
from m3.text.words import content_stems
from m3kernels.checks import refuse


class VerdictCache(Protocol):
    """Who keeps verdicts: answers from what it has, or calls ``verify`` and keeps that, unless it is no verdict.

    m3.rewards.claim_cache.ClaimCache is one; its keys should hold the verifier's name and its corpus_hash.
    """

    async def get_or_verify(self, claim: str, verify: Callable[[], Awaitable[FactVerdict]]) -> FactVerdict: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Numbers of a verifier; the paper gives none."""

    max_searches: int = 5  # SAFE, arXiv 2403.18802: up to 5 a fact
    passages: int = 5  # of a search; FActScore, arXiv 2305.14251: 5
    retries: int = 2  # ours: after a reply that cannot be read
    timeout: float = 120.0  # seconds a claim; ours
    concurrency: int = 16  # claims at once; ours
    max_tokens: int = 512  # of a reply; ours

    def __post_init__(self) -> None:
        for name, least in (
            ("max_searches", 1),
            ("passages", 1),
            ("retries", 0),
            ("concurrency", 1),
            ("max_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise refuse("fact_verifier.Config", name, f"an integer >= {least}", getattr(self, name))
        if not 0 < self.timeout < math.inf:
            raise refuse("fact_verifier.Config", "timeout", "a number > 0", self.timeout)


class FactVerifier(abc.ABC):
    """Verdicts of claims. ``name`` and ``evidence.corpus_hash`` say what a verdict depends on: keys of a cache.

    Args:
        cache: asked first, if given.
        budget: each search of the scripted agent, each call of a model, is a call of it.
    """

    name: str
    scripted: bool

    def __init__(
        self,
        evidence: Evidence,
        config: Config | None = None,
        *,
        cache: VerdictCache | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.evidence, self.config = evidence, config or Config()
        self.cache, self.budget = cache, budget or Budget()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = asyncio.Semaphore(self.config.concurrency)

    async def verify(self, claims: Sequence[str | Claim]) -> list[FactVerdict]:
        """A verdict of each claim, in order; equal claims are verified once."""
        texts = [claim.text if isinstance(claim, Claim) else claim for claim in claims]
        if (loop := asyncio.get_running_loop()) is not self._loop:  # a semaphore belongs to one loop
            self._loop, self._slots = loop, asyncio.Semaphore(self.config.concurrency)
        slots = self._slots
        verdicts: dict[str, FactVerdict] = {}

        async def one(text: str) -> None:
            async with slots:
                verdicts[text] = await self._answer(text)

        async with asyncio.TaskGroup() as group:
            for text in dict.fromkeys(texts):
                group.create_task(one(text))
        return [verdicts[text] for text in texts]

    async def _answer(self, text: str) -> FactVerdict:
        async def verify() -> FactVerdict:
            try:
                async with asyncio.timeout(self.config.timeout):
                    return await self._check(text)
            except TimeoutError:
                return self._verdict(text, Label.timeout, explanation=f"no verdict in {self.config.timeout:g} s")
            except ChatError as error:
                return self._verdict(text, LABEL_OF_FAILURE[error.failure], explanation=str(error))

        verdict = await (verify() if self.cache is None else self.cache.get_or_verify(text, verify))
        return dataclasses.replace(
            verdict, claim=text
        )  # a cache may answer with the verdict of a claim worded otherwise

    def _verdict(self, claim: str, label: Label, **fields: Any) -> FactVerdict:
        return FactVerdict(claim=claim, label=label, verifier=self.name, **fields)

    @abc.abstractmethod
    async def _check(self, claim: str) -> FactVerdict:
        """The verdict of one claim.

        Raises:
            ChatError: no answer, or the budget is spent.
        """


class ScriptedVerifier(FactVerifier):
    """By words alone, deterministic. It searches the claim, then its rarest words, then the claim with the title of
    the best passage so far; it stops at a passage that supports or refutes, when no query finds a new passage, or
    after ``max_searches``. Of passages that disagree the one that says more of the claim decides; if none says more,
    the claim is uncertain. An embedder, if given, hears synonyms; it reads every sentence that is looked at, so
    ``Remembering`` belongs around a slow one.
    """

    scripted = True

    def __init__(
        self,
        evidence: Evidence,
        config: Config | None = None,
        *,
        rules: entailment.Config | None = None,
        embedder: Embedder | None = None,
        cache: VerdictCache | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(evidence, config, cache=cache, budget=budget)
        self.rules = rules or entailment.Config()
        self._embedder = embedder
        heard = embedder.name if embedder else ""
        given = f"{dataclasses.asdict(self.rules)} {self.config.max_searches} {self.config.passages} {heard}"
        self.name = f"scripted-{entailment.VERSION}-{hashlib.sha256(given.encode()).hexdigest()[:8]}"

    async def _check(self, claim: str) -> FactVerdict:
        seen: dict[str, Passage] = {}
        findings: list[tuple[entailment.Finding, str]] = []
        asked: set[str] = set()
        searches = 0
        while searches < self.config.max_searches:
            query = self._query(claim, searches, list(seen.values()))
            if query in asked:
                break
            asked.add(query)
            self.budget.take()
            searches += 1
            findings += await asyncio.to_thread(self._look, claim, query, seen)
            if any(finding.label is not Label.uncertain for finding, _ in findings):
                break
        return self._decide(claim, findings, searches)

    def _look(self, claim: str, query: str, seen: dict[str, Passage]) -> list[tuple[entailment.Finding, str]]:
        """What passages not seen before say of the claim; they are seen now."""
        findings = []
        for one in self.evidence.search(query, self.config.passages):
            if one.id not in seen:
                seen[one.id] = one
                found = entailment.weigh(
                    claim,
                    one.text,
                    context=content_stems(one.title),
                    weight=self.evidence.rarity if self.rules.anchors else None,
                    embedder=self._embedder,
                    config=self.rules,
                )
                findings.append((found, one.id))
        return findings

    def _query(self, claim: str, searches: int, seen: Sequence[Passage]) -> str:
        if searches == 0:
            return claim
        if searches == 1:
            rare = sorted(entailment.content(claim), key=lambda one: -self.evidence.rarity(one))
            return " ".join(rare[:3])
        titles = list(dict.fromkeys(one.title for one in seen if one.title))
        return f"{claim} {titles[searches - 2]}" if searches - 2 < len(titles) else claim

    def _decide(self, claim: str, findings: Sequence[tuple[entailment.Finding, str]], searches: int) -> FactVerdict:
        best = {
            label: max(
                (one for one in findings if one[0].label is label), key=lambda one: one[0].coverage, default=None
            )
            for label in (Label.supported, Label.refuted, Label.uncertain)
        }
        yes, no = best[Label.supported], best[Label.refuted]
        if yes and no and yes[0].coverage == no[0].coverage:
            said = f"passages disagree: {yes[0].quote} | {no[0].quote}"
            return self._verdict(claim, Label.uncertain, evidence=(yes[1], no[1]), explanation=said, searches=searches)
        sure = max((one for one in (yes, no) if one), key=lambda one: one[0].coverage, default=None)
        chosen = sure or best[Label.uncertain]
        if chosen is None:
            return self._verdict(claim, Label.uncertain, explanation="nothing was found", searches=searches)
        finding, id = chosen
        said = f"{finding.reason} ({finding.coverage:.0%} of the claim): {finding.quote}".removesuffix(": ")
        return self._verdict(claim, finding.label, evidence=(id,), explanation=said, searches=searches)


# -- a language model as agent ----------------------------------------------------------------------------------------
PROMPT_VERSION = "verifier-1"
RULES = """You check one medical claim against a library of reference texts. You know nothing but what the library \
says: a claim is not supported because you believe it.

Answer each time with one JSON object and nothing else. Either search:
{"action": "search", "query": "a few words"}
or give your verdict:
{"action": "verdict", "label": "supported", "refuted" or "uncertain", "evidence": ["E1"], "explanation": "one sentence"}

- supported: a passage says what the claim says, its numbers, doses, conditions and population included.
- refuted: a passage says that the claim is wrong, or says something that cannot hold beside it.
- uncertain: the passages that were found do not tell.
- Cite the passages that decide. A verdict of supported or refuted without a passage is not accepted.
- Search again, in other words, while what was found does not tell and searches are left; stop when it suffices."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "action": {"type": "string", "enum": ["search", "verdict"]},
        "query": {"type": "string"},
        "label": {"type": "string", "enum": ["supported", "refuted", "uncertain"]},
        "evidence": {"type": "array", "items": {"type": "string"}},
        "explanation": {"type": "string"},
    },
    "required": ["action"],
}


@dataclasses.dataclass(frozen=True)
class _Search:
    query: str


@dataclasses.dataclass(frozen=True)
class _Verdict:
    label: Label
    evidence: tuple[str, ...]  # as cited: "E1"
    explanation: str


class ChatVerifier(FactVerifier):
    """A language model decides at each step: search in its own words, or label. A reply that is neither, that cites no
    passage it was shown, or that searches when no search is left, is asked for again ``retries`` times in all.
    """

    scripted = False

    def __init__(
        self,
        client: ChatClient,
        evidence: Evidence,
        config: Config | None = None,
        *,
        cache: VerdictCache | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(evidence, config, cache=cache, budget=budget)
        self._client = client
        self.name = f"{client.model}/{PROMPT_VERSION}-{self.config.max_searches}x{self.config.passages}"

    async def _check(self, claim: str) -> FactVerdict:
        messages = [{"role": "system", "content": RULES}, {"role": "user", "content": self._opening(claim)}]
        shown: dict[str, Passage] = {}
        searches = malformed = 0
        while malformed <= self.config.retries:
            self.budget.take()
            reply = await self._client.chat(
                messages,
                temperature=0.0 if malformed == 0 else 0.5,  # the same reply again would not help
                seed=malformed,
                max_tokens=self.config.max_tokens,
                json_schema=SCHEMA,
            )
            self.budget.add(reply.usage)
            step = read_step(reply.text, shown)
            if step is None or (isinstance(step, _Search) and searches == self.config.max_searches):
                malformed += 1
                continue
            if isinstance(step, _Verdict):
                return self._verdict(
                    claim,
                    step.label,
                    evidence=tuple(shown[one].id for one in step.evidence),
                    explanation=step.explanation,
                    searches=searches,
                    malformed=malformed,
                )
            searches += 1
            found = await asyncio.to_thread(self.evidence.search, step.query, self.config.passages)
            messages += [{"role": "assistant", "content": reply.text}, self._results(found, shown, searches)]
        said = f"{malformed} replies that are no step"
        return self._verdict(claim, Label.unparsable, explanation=said, searches=searches, malformed=malformed)

    def _opening(self, claim: str) -> str:
        return f"Claim: {claim}\n\nSearches left: {self.config.max_searches}"

    def _results(self, found: Sequence[Passage], shown: dict[str, Passage], searches: int) -> dict[str, str]:
        """The message that shows what a search found; passages get the names E1, E2, ... at first sight."""
        names = {passage.id: name for name, passage in shown.items()}
        lines = []
        for passage in found:
            if passage.id in names:
                lines.append(f"[{names[passage.id]}] (shown above)")
                continue
            name = f"E{len(shown) + 1}"
            shown[name] = passage
            lines.append(f"[{name}] {passage.title}\n{passage.text}".replace("] \n", "] "))
        left = self.config.max_searches - searches
        lines = lines or ["Nothing was found."]
        ending = f"Searches left: {left}" if left else "No search is left: give your verdict."
        return {"role": "user", "content": "\n\n".join([*lines, ending])}


def read_step(reply: str, shown: Mapping[str, Passage]) -> _Search | _Verdict | None:
    """What a model's reply asks for or says; None where it is neither."""
    row = read_object(reply)
    if row is None:
        return None
    if row.get("action") == "search":
        query = row.get("query")
        return _Search(query.strip()) if isinstance(query, str) and query.strip() else None
    if row.get("action") != "verdict":
        return None
    label, cited = row.get("label"), row.get("evidence", [])
    if not isinstance(label, str) or label.strip().lower() not in ("supported", "refuted", "uncertain"):
        return None
    if not isinstance(cited, list):
        return None
    known = tuple(dict.fromkeys(name for one in cited if (name := str(one).strip("[] ")) in shown))
    found = Label(label.strip().lower())
    if found is not Label.uncertain and not known:
        return None
    return _Verdict(found, known, str(row.get("explanation", "")))
