"""The step verifier: what each step of a consultation violates, as spans of the physician's tokens.

Two forms, one result. ``StepVerifier`` reads by rules (step_criteria.py): deterministic, no model. ``ChatStepVerifier``
asks a language model for quotes and finds them in the text. Both give SpanRewards whose value is lambda of the
violation; m3.rewards.spans makes gamma of them (Eq 7), m3.algorithms.spar advantages (Eq 8).

    gamma_j = 1 if step j violates nothing, else min of lambda_v over its violations v          (Eq 7)

Source: Baichuan-M3, arXiv 2602.06570, on SPAR.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from m3.algorithms.spar import PENALTIES
from m3.environment.case import Case, Phase
from m3.environment.trajectory import Trajectory
from m3.rewards.spans import SpanReward
from m3.rewards.step_criteria import CRITERIA, CriteriaConfig, Dialogue, Finding, token_span
from m3.rewards.verdict import UnjudgedError
from m3.rollout.chat import ChatClient, ChatError
from m3.rollout.replies import read_json
from m3.text.embed import Embedder, LexicalEmbedder
from m3.text.words import word_spans
from m3kernels.checks import refuse

Tokens = Callable[[str], Sequence[tuple[int, int]]]  # (start, end) characters of each token of a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """``penalties``: lambda of each criterion that is judged; those left out are not. Lambdas: m3.algorithms.spar."""

    penalties: Mapping[str, float] = dataclasses.field(default_factory=lambda: PENALTIES)
    criteria: CriteriaConfig = dataclasses.field(default_factory=CriteriaConfig)

    def __post_init__(self) -> None:
        for name, value in self.penalties.items():
            if name not in CRITERIA:
                raise refuse("step_verifier.Config", "penalties", f"names of {sorted(CRITERIA)}", repr(name))
            if not 0 < value < 1:
                raise refuse("step_verifier.Config", f"penalties[{name!r}]", "a number in (0, 1)", value)


class StepVerifier:
    """The verifier by rules.

    Args:
        config: lambdas, and numbers of the criteria.
        embedder: of questions; stems and pairs of stems by default.
        tokens: what spans count; words by default, else a tokenizer's offsets.
    """

    def __init__(
        self, config: Config | None = None, embedder: Embedder | None = None, *, tokens: Tokens = word_spans
    ) -> None:
        self.config = config or Config()
        self._embedder: Embedder = embedder or LexicalEmbedder()
        self._tokens = tokens

    @property
    def name(self) -> str:
        """What it is: rules, a digest of their numbers, and the embedder."""
        numbers = f"{sorted(self.config.penalties.items())} {self.config.criteria}".encode()
        return f"rules {hashlib.blake2b(numbers, digest_size=4).hexdigest()}, {self._embedder.name}"

    def verify(self, case: Case | None, trajectory: Trajectory, phase: Phase | None = None) -> list[SpanReward]:
        """Violations in order of turns; none is a clean consultation. Without a case only words are judged.

        Args:
            case: the trajectory's.
            trajectory: a consultation.
            phase: the one stage whose steps are judged; None: all. What was said before it counts as said.
        """
        dialogue = Dialogue.of(case, trajectory, self._cosines, phase)
        found: list[Finding] = []
        for criterion in self.config.penalties:
            found += CRITERIA[criterion](dialogue, self.config.criteria)
        return to_spans(trajectory, found, self.config.penalties, self._tokens)

    def _cosines(self, texts: Sequence[str]) -> np.ndarray:
        rows = self._embedder(texts)
        return rows @ rows.T


def to_spans(
    trajectory: Trajectory, findings: Sequence[Finding], penalties: Mapping[str, float], tokens: Tokens = word_spans
) -> list[SpanReward]:
    """Findings as spans of tokens with their lambda, each once, in order of turns and tokens."""
    texts = {message.turn: message.content for message in trajectory.messages if message.role == "assistant"}
    spans = []
    for finding in dict.fromkeys(findings):
        first, last = token_span(finding.start, finding.end, tokens(texts[finding.turn]))
        spans.append(
            SpanReward(
                turn=finding.turn,
                token_start=first,
                token_end=last,
                value=penalties[finding.criterion],
                criterion=finding.criterion,
                note=finding.note,
            )
        )
    return sorted(spans, key=lambda span: (span.turn, span.token_start, span.criterion))


# -- a language model as verifier -------------------------------------------------------------------------------------
MEANINGS: Mapping[str, str] = {
    "redundant_question": "asks for what the patient has already told, or repeats an earlier question; "
    "summarising, or confirming a critical fact once, is allowed",
    "safety_risk": "passes over a warning sign, reassures too early, gives harmful advice, or does not escalate "
    "where it must",
    "illogical_order": "diagnoses or orders tests before taking a history, or jumps back and forth between topics",
    "rigid_phrasing": "too many questions at once, a checklist read out, jargon, or no word for the patient's distress",
}
INSTRUCTION = (
    "You review a medical consultation. Find where the physician violates one of these criteria:\n{criteria}\n\n"
    'Reply with JSON alone: {{"violations": [{{"turn": number of the physician\'s message, "quote": its exact words, '
    '"criterion": one of the names above, "why": one short sentence}}]}}. Without any violation: {{"violations": []}}.'
)
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["violations"],
    "properties": {
        "violations": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["turn", "quote", "criterion", "why"],
                "properties": {
                    "turn": {"type": "integer"},
                    "quote": {"type": "string"},
                    "criterion": {"enum": list(MEANINGS)},
                    "why": {"type": "string"},
                },
            },
        }
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepJudgement:
    """``malformed``: entries that were left out, by name: "fields", "criterion", "turn", "quote". ``replies``: how
    many it took; all but the last could not be read."""

    spans: tuple[SpanReward, ...]
    malformed: Mapping[str, int]
    replies: int


class ChatStepVerifier:
    """The verifier that asks a language model.

    Args:
        client: who is asked.
        config: lambdas; which criteria are asked for.
        retries: after a reply that is no JSON of the schema.
        timeout: seconds for each reply.
        max_tokens: of a reply.
    """

    def __init__(
        self,
        client: ChatClient,
        config: Config | None = None,
        *,
        tokens: Tokens = word_spans,
        retries: int = 2,
        timeout: float = 120.0,
        max_tokens: int = 1024,
    ) -> None:
        self.config = config or Config()
        self._client, self._tokens = client, tokens
        self._retries, self._timeout, self._max_tokens = retries, timeout, max_tokens

    @property
    def name(self) -> str:
        """What it is, for reports."""
        return f"chat, {self._client.model}"

    async def verify(self, case: Case | None, trajectory: Trajectory, *, seed: int = 0) -> StepJudgement:
        """Judge one consultation. The model is told nothing of the case but its facts that must not be passed over.

        Raises:
            UnjudgedError: no reply could be read, or none came; says why of each.
        """
        messages = self._ask(case, trajectory)
        failures: collections.Counter[str] = collections.Counter()
        for attempt in range(1 + self._retries):
            try:
                async with asyncio.timeout(self._timeout):
                    reply = await self._client.chat(
                        messages, max_tokens=self._max_tokens, seed=seed + attempt, json_schema=SCHEMA
                    )
            except TimeoutError:
                failures["timeout"] += 1
                continue
            except ChatError as error:
                raise UnjudgedError(f"step verifier: {error.failure}: {error}") from error
            entries = read_violations(reply.text)
            if entries is None:
                failures["unparsable"] += 1
                continue
            findings, malformed = locate(trajectory, entries, self.config.penalties)
            spans = to_spans(trajectory, findings, self.config.penalties, self._tokens)
            return StepJudgement(spans=tuple(spans), malformed=malformed, replies=attempt + 1)
        raise UnjudgedError("step verifier: " + ", ".join(f"{count} {name}" for name, count in failures.items()))

    def _ask(self, case: Case | None, trajectory: Trajectory) -> list[dict[str, str]]:
        criteria = "\n".join(f"- {name}: {MEANINGS[name]}" for name in self.config.penalties)
        lines = [_line(m.role, m.turn, m.content) for m in trajectory.messages if m.role in ("user", "assistant")]
        if case is not None and "safety_risk" in self.config.penalties:
            flags = "; ".join(f.text for f in case.facts if f.red_flag and f.polarity == "present") or "none"
            must = {True: "yes", False: "no", None: "unknown"}[case.safety.must_escalate]
            lines.append(f"(Warning signs of this patient: {flags}. Must be escalated: {must}.)")
        return [
            {"role": "system", "content": INSTRUCTION.format(criteria=criteria)},
            {"role": "user", "content": "\n".join(lines)},
        ]


def _line(role: str, turn: int, content: str) -> str:
    return f"[{turn}] {'physician' if role == 'assistant' else 'patient'}: {content}"


def read_violations(text: str) -> list[Any] | None:
    """The list of a reply, a fence around it taken off; None where the reply is not such JSON."""
    row = read_json(text)
    found = row.get("violations") if isinstance(row, dict) else row
    return found if isinstance(found, list) else None


def locate(
    trajectory: Trajectory, entries: Sequence[Any], penalties: Mapping[str, float]
) -> tuple[list[Finding], Mapping[str, int]]:
    """Entries found in the text, and counts by name of those that are not: nothing is guessed.

    A quote is found if its words stand in the physician's message of that turn, in any case and spacing.
    """
    texts = {
        message.turn: message.content
        for message in trajectory.messages
        if message.role == "assistant" and not message.meta.get("snippet")
    }
    found: list[Finding] = []
    malformed: collections.Counter[str] = collections.Counter()
    for entry in entries:
        if not isinstance(entry, dict):
            malformed["fields"] += 1
            continue
        turn, quote, criterion, why = (entry.get(name) for name in ("turn", "quote", "criterion", "why"))
        if type(turn) is not int or not isinstance(quote, str) or not isinstance(why, str | None) or not quote.split():
            malformed["fields"] += 1
        elif criterion not in penalties:
            malformed["criterion"] += 1
        elif turn not in texts:
            malformed["turn"] += 1
        else:
            pattern = r"\s+".join(re.escape(word) for word in quote.split())
            match = re.search(pattern, texts[turn], re.IGNORECASE)
            if match is None:
                malformed["quote"] += 1
            else:
                found.append(Finding(str(criterion), turn, match.start(), match.end(), why or ""))
    return found, dict(malformed)
