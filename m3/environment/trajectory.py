"""A recorded consultation: OpenAI chat messages, each with a side-record, and what became of its stages.

The physician is the policy, role "assistant"; the patient is role "user". Step j, an exchange, is user turn j and the
assistant's answer to it: both messages carry ``turn`` j, from 0. A trajectory is one line of JSON (schema
``m3.trajectory/v1``); it can be scored and replayed without any model.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3.environment.case import Phase
from m3.text.jsonl import read_objects
from m3kernels.checks import refuse

SCHEMA = "m3.trajectory/v1"


class Action(enum.StrEnum):
    """What a message of the physician does."""

    ask = "ask"
    differential = "differential"
    order = "order"
    diagnose = "diagnose"
    advise = "advise"
    close = "close"  # ends the inquiry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One chat message and its side-record.

    ``facts``: ids of the case's facts that a patient's message tells. ``why``: for each sentence of a scripted
    patient, the reason it was said ("fact p3: keys 'pain arm'", "no fact asked for"). ``token_ids``: what the sampler
    drew, where it is known: never re-tokenised text. ``meta``: anything else that is JSON.
    """

    role: str  # "system", "user", "assistant"
    content: str
    turn: int
    phase: Phase
    action: Action | None = None
    facts: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    token_ids: tuple[int, ...] | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """``{"role", "content", "m3": {...}}``: a chat message with its side-record under one key."""
        side: dict[str, Any] = {"turn": self.turn, "phase": str(self.phase)}
        if self.action is not None:
            side["action"] = str(self.action)
        for name in ("facts", "why"):
            if value := getattr(self, name):
                side[name] = list(value)
        if self.token_ids is not None:
            side["token_ids"] = list(self.token_ids)
        if self.meta:
            side["meta"] = dict(self.meta)
        return {"role": self.role, "content": self.content, "m3": side}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Message:
        side = row.get("m3", {})
        role, content, turn = row["role"], row["content"], side.get("turn", 0)
        if not (isinstance(role, str) and isinstance(content, str)):
            raise refuse("message", "role, content", "text", (role, content))
        if type(turn) is not int or turn < 0:
            raise refuse("message", "turn", "an integer >= 0", turn)
        return cls(
            role=role,
            content=content,
            turn=turn,
            phase=Phase(side.get("phase", Phase.inquiry)),
            action=Action(side["action"]) if "action" in side else None,
            facts=tuple(side.get("facts", ())),
            why=tuple(side.get("why", ())),
            token_ids=tuple(side["token_ids"]) if "token_ids" in side else None,
            meta=side.get("meta", {}),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One consultation from the first word on. ``rollout`` counts rollouts of the same case and seed."""

    case: str
    case_version: int
    policy: str
    seed: int
    messages: tuple[Message, ...]
    rollout: int = 0
    mode: str = "passive"  # or "interruption:end_of_turn", "interruption:mid_turn", "recorded"
    ended: str = ""  # why the inquiry ended: "closed", "turns", "patient", "cancelled"
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, role: str | None = None, phase: Phase | None = None) -> tuple[Message, ...]:
        """Messages of one speaker, of one stage, or of both."""
        return tuple(m for m in self.messages if role in (None, m.role) and phase in (None, m.phase))

    def told(self) -> tuple[str, ...]:
        """Ids of the facts told so far, in order, each once."""
        return tuple(dict.fromkeys(fact for message in self.messages for fact in message.facts))

    @property
    def turns(self) -> int:
        """Exchanges: 1 + the last turn's number; 0 when empty."""
        return 1 + max((m.turn for m in self.messages), default=-1)

    def to_json(self) -> dict[str, Any]:
        row = {
            "schema": SCHEMA,
            "case": self.case,
            "case_version": self.case_version,
            "policy": self.policy,
            "seed": self.seed,
            "rollout": self.rollout,
            "mode": self.mode,
            "ended": self.ended,
            "messages": [m.to_json() for m in self.messages],
        }
        if self.meta:
            row["meta"] = dict(self.meta)
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trajectory:
        """Raises ValueError: not of this schema, or a field is missing; the message says which."""
        schema = row.get("schema") if isinstance(row, Mapping) else None
        if schema != SCHEMA:
            raise ValueError(f"trajectory: schema: want {SCHEMA!r}; got {schema!r}")
        try:
            return cls(
                case=row["case"],
                case_version=row["case_version"],
                policy=row["policy"],
                seed=row["seed"],
                rollout=row.get("rollout", 0),
                mode=row.get("mode", "passive"),
                ended=row.get("ended", ""),
                messages=tuple(Message.from_json(m) for m in row["messages"]),
                meta=row.get("meta", {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"trajectory: want the fields of {SCHEMA}; missing or malformed: {error}") from error


def to_line(row: Mapping[str, Any]) -> str:
    """One line of JSON, the same bytes for the same content."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def write_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> int:
    """Write one a line; how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(to_line(trajectory.to_json()) + "\n")
            count += 1
    return count


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """Raises ValueError: names file and line."""
    for place, row in read_objects(path):
        try:
            yield Trajectory.from_json(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Plain OpenAI chat messages, without side-records."""
    return [{"role": m.role, "content": m.content} for m in messages]
