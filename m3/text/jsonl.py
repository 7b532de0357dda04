"""Files with one JSON value a line, plain (.jsonl) or gzipped (.jsonl.gz), and where in them something is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_values(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line that is not blank; a place is "file:line" and begins an error.

    Only line breaks end a line, not the other separators that JSON leaves bare in a string (U+2028).

    Raises:
        ValueError: a line that is no JSON, by its place. Bytes that are no UTF-8, half characters ("\\ud83d": they
            cannot be written down again), and more digits or brackets than the reader takes are none.
    """
    path = Path(path)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = parse(line.decode())
            except (ValueError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{place}: want JSON; {said}") from error
            yield place, value


def parse(text: str) -> Any:
    """The value of a JSON text that can be written down again.

    Raises:
        ValueError: no JSON, half a character, too many digits.
        RecursionError: too many brackets.
    """
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same where each value must be an object.

    Raises:
        ValueError: a line that is no JSON object, by its place.
    """
    for place, value in read_values(path):
        if not isinstance(value, dict):
            raise ValueError(f"{place}: want a JSON object; got {type(value).__name__}")
        yield place, value
