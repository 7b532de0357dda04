"""Fragments: a simulated dialogue is cut at a turn, and only the next reply is drawn anew, rewarded and reinforced.

The context of a group is the beginning of an inquiry that the policy itself had with the patient; each rollout is one
reply to the patient's last message. It is the multi-turn stage of Baichuan-M2 (arXiv 2509.02208), whose rubrics are
made for the context; here rewards are whatever the pipeline has for the inquiry.

The cut is drawn by seed, evenly over the physician's sound messages. From the first that is not sound on, the dialogue
is left out: a message said before (repetition), one that fills its budget of tokens (over-length), one in which the
physician speaks for the patient (role inversion). What counts as sound is ours.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from m3.environment.case import Case, Phase
from m3.environment.consultation import SimulatedConsultation
from m3.environment.episode import Said
from m3.environment.pipeline import Answer
from m3.environment.seeds import derive_seed
from m3.environment.segment import Context
from m3.environment.trajectory import Message
from m3kernels.checks import refuse

_SPEAKS_FOR_THE_PATIENT = re.compile(r"^\s*(?:patient|user)\s*:", re.IGNORECASE | re.MULTILINE)


class FragmentConsultation(SimulatedConsultation):
    """The ``Consultation`` of fragments, of the inquiry alone; arguments as of SimulatedConsultation."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.name += ", fragments"

    async def open(self, case: Case, *, seed: int) -> tuple[Message, ...]:
        """The beginning of a dialogue, up to the patient's message that is to be answered."""
        opened = await super().open(case, seed=seed)
        context = Context(id=case.id, case=case, phase=Phase.inquiry, messages=opened)
        whole = await super().answer(context, seed=derive_seed(seed, "dialogue"), rollout=0)
        places = cuts(whole.messages)
        return (*opened, *whole.messages[: random.Random(derive_seed(seed, "cut")).choice(places)])

    async def answer(self, context: Context, *, seed: int, rollout: int) -> Answer:
        """One reply. ``ended`` is "closed" or "turns"."""
        if context.phase != Phase.inquiry:
            raise refuse("FragmentConsultation", "context", "of the inquiry", str(context.phase))
        return await self._inquire(context, seed=seed, rollout=rollout, snippet=context.messages[1:], max_turns=1)


def cuts(dialogue: Sequence[Message]) -> list[int]:
    """Places of the physician's messages before which a dialogue may be cut; the first message at least.

    Args:
        dialogue: begins with the physician's first message.
    """
    places: list[int] = []
    heard: set[str] = set()
    for place, message in enumerate(dialogue):
        if message.role != "assistant":
            continue
        places.append(place)
        words = " ".join(message.content.casefold().split())
        said = Said.of(message)
        cut_short = said is not None and said.finish == "length"
        if words in heard or cut_short or _SPEAKS_FOR_THE_PATIENT.search(message.content):
            break
        heard.add(words)
    return places
