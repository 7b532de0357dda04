"""What a draft is trained and measured on: topics x templates, whole topics held out, and free questions beside them.

The built-in set lies in m3/data/draft_prompts.toml. A file of the user's own is either of the same form (a table per
kind with ``topics``, ``held_out`` and ``templates``, and ``[free]`` with lists of questions), or plain text with one
prompt a line, of which every twentieth is held out. The order is shuffled once and for all, so that any first part of
it is a fair sample.
"""

from __future__ import annotations

import dataclasses
import random
import tomllib
from pathlib import Path
from typing import Any

from m3kernels.checks import refuse

BUILT_IN = Path(__file__).parent.parent / "data" / "draft_prompts.toml"
HOLD_OUT_EVERY = 20  # lines of a plain text file
ORDER_SEED = 5
FREE, SLOT = "free", "{topic}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts to train on, prompts with topics that no training prompt has, and prompts of no template."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    out_of_template: tuple[str, ...]


def read_prompts(path: str | Path | None = None) -> PromptSet:
    """The prompts of a file, or the built-in ones.

    Raises:
        ValueError: no such file, not of the form above, or nothing to train on.
    """
    path = BUILT_IN if path is None else Path(path)
    if not path.is_file():
        raise refuse("prompts", "FILE", "a .toml or a text file with one prompt a line", str(path))
    try:
        text = path.read_text(encoding="utf-8")
        prompts = _from_toml(tomllib.loads(text)) if path.suffix == ".toml" else _from_lines(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise refuse("prompts", str(path), "UTF-8 text, TOML if it is named so", f"{error}") from error
    if not prompts.train:
        raise refuse("prompts", str(path), "a prompt or more to train on", "none")
    return prompts


def _from_lines(text: str) -> PromptSet:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    held_out = lines[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    train = [line for line in lines if line not in set(held_out)]
    return PromptSet(train=_shuffled(train), held_out=_shuffled(held_out), out_of_template=())


def _from_toml(tables: dict[str, Any]) -> PromptSet:
    train, held_out, free = [], [], []
    for kind, table in tables.items():
        if kind == FREE:
            free = [question for name in table for question in _strings(kind, table, name)]
            continue
        templates = _strings(kind, table, "templates")
        unfit = [template for template in templates if template.count(SLOT) != 1]
        if unfit:
            raise refuse("prompts", f"[{kind}] templates", f"{SLOT} once in each", repr(unfit[0]))
        train += [form.replace(SLOT, topic) for form in templates for topic in _strings(kind, table, "topics")]
        held_out += [form.replace(SLOT, topic) for form in templates for topic in _strings(kind, table, "held_out")]
    return PromptSet(train=_shuffled(train), held_out=_shuffled(held_out), out_of_template=_shuffled(free))


def _strings(kind: str, table: Any, name: str) -> list[str]:
    found = table.get(name) if isinstance(table, dict) else None
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        raise refuse("prompts", f"[{kind}] {name}", "a list of texts", repr(found)[:100])
    return found


def _shuffled(prompts: list[str]) -> tuple[str, ...]:
    distinct = list(dict.fromkeys(prompts))
    random.Random(ORDER_SEED).shuffle(distinct)
    return tuple(distinct)
