"""What the server writes down: a line a request, as JSON or as text. Counts, times, statuses; never what was said.

No text of a request or an answer, no key, no header, no query, no path that the client made up; of an exception its
class and the places it passed, not its words, which may quote the request.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, Literal

LOG = logging.getLogger("m3.serve")
Format = Literal["json", "text"]


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, logger, event, and the fields that were given as ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            row |= failure(record.exc_info[1])
        return json.dumps(row, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """The same for people: time, logger, event, name=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields |= failure(record.exc_info[1])
        told = "".join(f" {name}={value}" for name, value in fields.items() if value is not None)
        return f"{self.formatTime(record)} {record.levelname} {record.name} {record.getMessage()}{told}"


def failure(error: BaseException) -> dict[str, str]:
    """An exception's class and places, without its words."""
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "at": " < ".join(reversed(places))}


def log(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """One line; fields that are None are left out."""
    LOG.log(level, "%s", event, extra={"fields": {name: value for name, value in fields.items() if value is not None}})


class _ToStandardError(logging.Handler):
    """Writes to what sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")
        sys.stderr.flush()


def set_up(form: Format, level: str) -> None:
    """Log to standard error in this form, from this level on."""
    to_error = _ToStandardError()
    to_error.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[to_error], force=True)
