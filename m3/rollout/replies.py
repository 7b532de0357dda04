"""JSON in a chat model's reply. Nothing is guessed: what is no JSON, or not one object, is None and is asked again."""

from __future__ import annotations

import json
import re
from typing import Any


def read_json(reply: str) -> Any:
    """The JSON value that a reply is, ``` fences at its ends aside; None where it is none."""
    try:
        return json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", reply.strip()))
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
        except ValueError:
            end = at + 1
        except RecursionError:
            return None
        else:
            if value not in found:
                found.append(value)
        at = reply.find("{", end)
    return found[0] if len(found) == 1 else None
