"""JSON in a chat model's reply. Nothing is guessed: what is no JSON, or not one object, is None and is asked again."""

from __future__ import annotations

import json
from typing import Any

from m3.text.jsonl import parse


def read_json(reply: str) -> Any:
    """The JSON value that a reply is, ``` fences at its ends aside; None where it is none."""
    try:
        return parse(reply.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip())
    except (ValueError, RecursionError):  # not JSON; digits or brackets beyond what the reader takes
        return None


def read_object(reply: str) -> dict[str, Any] | None:
    """The one JSON object in a reply, fences and words around it allowed; None where there is none, or where several
    differ."""
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    at = reply.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(reply, at)
            parse(reply[at:end])
        except json.JSONDecodeError:
            end = at + 1
        except ValueError:  # half a character, or too many digits: what follows is inside that object
            return None
        except RecursionError:
            return None
        else:
            if value not in found:
                found.append(value)
        at = reply.find("{", end)
    return found[0] if len(found) == 1 else None
