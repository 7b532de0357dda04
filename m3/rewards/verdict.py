"""What a judge said, or why it said nothing: an outcome has a name, and "cannot tell" is never a score."""

from __future__ import annotations

import dataclasses
import enum

from m3.rollout.chat import Usage


class Outcome(enum.StrEnum):
    """Of one question put to a judge."""

    met = "met"
    not_met = "not_met"
    unparsable = "unparsable"  # it answered, and the answer is no verdict, after every retry
    timeout = "timeout"
    unreachable = "unreachable"  # no connection, or the server failed, after every retry
    over_budget = "over_budget"  # not asked: the budget of calls, tokens or seconds was spent

    @property
    def judged(self) -> bool:
        """Whether this is a verdict."""
        return self in (Outcome.met, Outcome.not_met)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one criterion. ``cached``: no judge was asked this time."""

    criterion: str
    outcome: Outcome
    explanation: str = ""
    judge: str = ""
    template: str = ""
    cached: bool = False
    usage: Usage | None = None


class UnjudgedError(RuntimeError):
    """A reward cannot be told because a judge did not judge; the message counts outcomes by name."""
