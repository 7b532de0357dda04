"""An append-only file of JSON objects, one a line, whole after a kill at any moment: the file is the state.

The first line is a header that says whose file it is. A line is written at once and flushed to the disk; a last line
that a kill cut short is ignored with a warning, counted, and dropped by the next writer. Damage anywhere else is an
error. One process writes at a time; anyone may read meanwhile (``read_rows``).
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from m3kernels.checks import refuse


class TornLineWarning(UserWarning):
    """The last line of a log was cut short and is ignored."""


class JsonLog:
    """A log open for appending by this process alone. ``rows``: all objects after the header, kept in step.

    Args:
        header: what the first line says; written where there is no file yet, compared where there is.
    Raises:
        ValueError: another header, a broken line (by number), or another process writes.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file: BinaryIO = self.path.open("ab+")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise refuse("JsonLog", str(self.path), "one writer", "another that has it open") from error
            found, self.torn, whole = _read(self.path)
            if self.torn:
                self._file.truncate(whole)
            if not found:
                self.rows: list[dict[str, Any]] = []
                self._write(header)
            elif found[0] != dict(header):
                raise refuse("JsonLog", str(self.path), f"a file begun with {dict(header)}", f"one with {found[0]}")
            else:
                self.rows = found[1:]
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object; on return it is on the disk."""
        with self._lock:
            self._write(row)
            self.rows.append(dict(row))

    def close(self) -> None:
        """Let others write; an append that is under way ends first."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_rows(path: str | Path) -> tuple[list[dict[str, Any]], bool]:
    """(objects, the header first; whether a torn last line was ignored), without becoming a writer."""
    rows, torn, _ = _read(Path(path))
    return rows, torn


def _read(path: Path) -> tuple[list[dict[str, Any]], bool, int]:
    """(objects, whether a torn last line was ignored, bytes of what is whole)."""
    data = path.read_bytes()
    *lines, rest = data.split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise refuse("JsonLog", f"{path}:{number}", "one JSON object", repr(line[:60])) from error
        if not isinstance(row, dict):
            raise refuse("JsonLog", f"{path}:{number}", "one JSON object", repr(line[:60]))
        rows.append(row)
    if rest:
        place = f"{path}:{len(lines) + 1}"
        warnings.warn(f"{place}: the last line was cut short; it is ignored", TornLineWarning, stacklevel=4)
    return rows, bool(rest), len(data) - len(rest)
