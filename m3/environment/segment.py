"""A segment: what was answered in one stage from one context, its reward, and what verifiers said of it.

Contexts and segments form a tree, and their names are paths in it: ``case@epoch`` is the context of an inquiry;
``context/r`` is both the segment of its rollout r and, if the segment passes the gate, the context of the next stage.
So all rollouts of one context share ``group``, which is what advantages are relative to, and a name says where it came
from. Seeds follow from the run's seed and the name alone: whatever runs beside a segment, its draws are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from m3.environment.case import Case, Phase
from m3.environment.modes import PASSIVE_MODE
from m3.environment.trajectory import Action, Message, Trajectory
from m3.rewards.spans import SpanReward, violations
from m3kernels.checks import refuse


def _inquiry_end(messages: Sequence[Message]) -> str:
    """Why the inquiry of a later stage's context ended, as m3.environment.episode.run_inquiry says it."""
    last = [message for message in messages if message.phase == Phase.inquiry][-1]
    if last.role == "user":
        return "patient" if last.meta.get("gone") else ""
    return "closed" if last.action == Action.close else "turns"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """x_k: what a stage starts from. ``id`` is the name of its group."""

    id: str
    case: Case = dataclasses.field(repr=False)
    phase: Phase
    messages: tuple[Message, ...] = dataclasses.field(repr=False)

    def segment(self, rollout: int) -> str:
        """The name of one rollout of it."""
        return f"{self.id}/{rollout}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageScore:
    """What a stage's reward says of one segment.

    ``reward``: G_k of Eq 4. ``quality``: V_k of Eq 6, in [0, 1]; where it is None the reward is taken. ``spans``: see
    m3.rewards.spans. ``outcomes``: of each criterion that was judged, the name of the outcome or its figure.
    """

    reward: float
    quality: float | None = None
    spans: tuple[SpanReward, ...] = ()
    outcomes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("reward", "quality"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):  # nan is on neither side of the gate
                raise refuse("StageScore", name, "a finite number", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A finished segment. ``prompt`` is x_k, ``response`` y_k: in the inquiry both speakers' messages, and only those
    of role "assistant" are the policy's; later one message. ``policy_version``: that of the policy when it began."""

    id: str
    group: str
    rollout: int
    case: str
    case_version: int
    phase: Phase
    prompt: tuple[Message, ...]
    response: tuple[Message, ...]
    reward: float
    quality: float
    spans: tuple[SpanReward, ...] = ()
    outcomes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int
    policy: str
    policy_version: int = 0
    ended: str = ""  # of an inquiry, why it ended

    def trajectory(self) -> Trajectory:
        """The consultation up to the end of this segment; how it began stands in its first messages' side-record."""
        modes = [message.meta["mode"] for message in self.prompt if "mode" in message.meta]
        return Trajectory(
            case=self.case,
            case_version=self.case_version,
            policy=self.policy,
            seed=self.seed,
            rollout=self.rollout,
            mode=modes[0] if modes else PASSIVE_MODE,
            ended=self.ended or _inquiry_end((*self.prompt, *self.response)),
            messages=(*self.prompt, *self.response),
        )

    @property
    def steps(self) -> tuple[int, ...]:
        """Turns of the policy's messages in the response, in order: the steps that have an advantage."""
        return tuple(message.turn for message in self.response if message.role == "assistant")

    def violations(self) -> list[set[str]]:
        """Names of what each step violates: rows of ``m3.algorithms.spar.step_factors``."""
        found = violations(self.spans, 1 + max(self.steps, default=-1))
        return [found[turn] for turn in self.steps]

    def to_json(self) -> dict[str, Any]:
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        row["phase"] = str(self.phase)
        row["prompt"] = [message.to_json() for message in self.prompt]
        row["response"] = [message.to_json() for message in self.response]
        row["spans"] = [dataclasses.asdict(span) for span in self.spans]
        row["outcomes"] = dict(self.outcomes)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Segment:
        """Raises ValueError: a field is missing, unknown or malformed."""
        try:
            fields = dict(row)
            fields["phase"] = Phase(row["phase"])
            fields["prompt"] = tuple(Message.from_json(message) for message in row["prompt"])
            fields["response"] = tuple(Message.from_json(message) for message in row["response"])
            fields["spans"] = tuple(SpanReward(**span) for span in row["spans"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"segment: want the fields of a segment; missing or malformed: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """B_t: finished segments of whole groups, of whatever stages were at work."""

    step: int
    segments: tuple[Segment, ...]

    def groups(self) -> dict[str, tuple[Segment, ...]]:
        """Segments by context, in order of rollouts."""
        found: dict[str, list[Segment]] = {}
        for segment in self.segments:
            found.setdefault(segment.group, []).append(segment)
        return {group: tuple(sorted(rows, key=lambda row: row.rollout)) for group, rows in found.items()}
