"""An append-only journal: JSON lines with checksums, one writer, whole again after a kill at any moment.

A line is ``{"crc32":"8 hex digits","record":{...}}``, the checksum being that of the record's bytes as they stand. A
record has a ``kind`` and may have an ``id``; an id is written once for each kind. The first record says whose journal
it is, and a run that continues it must say the same.

What a crash can leave: a last line without its end, or, after a loss of power, damaged lines up to the end of the
file. Both are cut when the journal is opened, and said. A damaged line *before* a good one is no crash: it is refused.
"""

from __future__ import annotations

import enum
import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from m3.environment.trajectory import to_line
from m3kernels.checks import refuse

SCHEMA = "m3.journal/v1"
HEADER = "journal"  # kind of the first record
_START, _MIDDLE, _END = b'{"crc32":"', b'","record":', b"}\n"
_RECORD = len(_START) + 8 + len(_MIDDLE)  # where a record begins in its line
_log = logging.getLogger(__name__)


class Sync(enum.StrEnum):
    """When lines are forced to the disk. A killed process loses nothing under any; a loss of power may."""

    each = "each"  # after every record
    on_call = "on_call"  # when ``sync`` is called, and at the end
    never = "never"


def to_journal_line(record: Mapping[str, Any]) -> bytes:
    """A record as its line, the same bytes for the same content."""
    text = to_line(record).encode()
    return _START + b"%08x" % zlib.crc32(text) + _MIDDLE + text + _END


def read_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line with its end; None where the line is damaged."""
    if not (line.startswith(_START) and line.endswith(_END) and line[_RECORD - len(_MIDDLE) : _RECORD] == _MIDDLE):
        return None
    text = line[_RECORD : -len(_END)]
    if line[len(_START) : len(_START) + 8] != b"%08x" % zlib.crc32(text):
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


class Journal:
    """The journal at ``path``, opened for writing; made where there is none.

    Where records lie is kept in memory, records are not. Not to be shared by threads.

    Args:
        path: the file. It is locked until ``close`` or the end of the process.
        run: what a continuing run must have in common with the one that began: JSON.
        sync: when to force lines to the disk.
    Raises:
        ValueError: another writer has it; it is not a journal, is damaged in its middle, or is another run's.
    """

    def __init__(self, path: str | Path, *, run: Mapping[str, Any], sync: Sync = Sync.on_call) -> None:
        self.path = Path(path)
        self.policy = sync
        self.cut_bytes = 0  # of what a crash left unfinished
        self._where: dict[tuple[str, str], tuple[int, int]] = {}  # (kind, id) to (offset, length), in order
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._end = self._recover()
            self._check_run({"kind": HEADER, "id": SCHEMA, "run": dict(run)})
        except BaseException:
            os.close(self._file)
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, whole or not at all.

        Raises:
            ValueError: no kind; or its id is already there.
            OSError: it could not be written (a full disk); the journal is as it was before.
        """
        kind = record.get("kind")
        if not isinstance(kind, str):
            raise refuse("journal.append", "record", "a kind", repr(kind))
        key = (kind, str(record.get("id", len(self._where))))
        if key in self._where:
            raise refuse("journal.append", "id", f"an id written once for {kind!r}", repr(key[1]))
        line = to_journal_line(record)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            if self.policy == Sync.each:
                os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._where[key] = (self._end, len(line))
        self._end += len(line)

    def sync(self) -> None:
        """Force what was written to the disk, under the policies ``each`` and ``on_call``."""
        if self.policy != Sync.never:
            os.fsync(self._file)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._where

    def get(self, kind: str, id: str) -> dict[str, Any] | None:
        """The record, read from the file; None where there is none."""
        where = self._where.get((kind, id))
        return None if where is None else self._read(*where)

    def records(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Records in the order in which they were written, all or of one kind; without the header."""
        for (one, _), where in list(self._where.items()):
            if one != HEADER and kind in (None, one):
                yield self._read(*where)

    def close(self) -> None:
        """Force to the disk, unlock, close. A second time does nothing."""
        if self._file >= 0:
            try:
                self.sync()
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refuse("journal", "path", "a journal that no other run is writing", str(self.path)) from error

    def _read(self, offset: int, length: int) -> dict[str, Any]:
        record = read_line(os.pread(self._file, length, offset))
        if record is None:
            raise refuse("journal", "path", "bytes as they were written", f"a damaged line at byte {offset}")
        return record

    def _recover(self) -> int:
        """Index the good lines, cut a torn end; the length that is left."""
        end = 0
        for offset, length, record in _good_lines(self.path):
            self._where[(record["kind"], str(record.get("id", len(self._where))))] = (offset, length)
            end = offset + length
        size = os.fstat(self._file).st_size
        if end == size:
            return end
        if end == 0 and not self._is_ours():
            raise refuse("journal", "path", f"a journal ({SCHEMA})", str(self.path))
        self.cut_bytes = size - end
        _log.warning("%s: cut %d bytes that an interrupted run left unfinished", self.path, self.cut_bytes)
        os.ftruncate(self._file, end)
        return end

    def _is_ours(self) -> bool:
        """Whether a file without one good line can be the torn beginning of a journal."""
        head = os.pread(self._file, len(_START), 0)
        return _START.startswith(head) and os.pread(self._file, 1 << 16, 0).count(b"\n") <= 1

    def _check_run(self, header: dict[str, Any]) -> None:
        if not self._where:
            self.append(header)
            return
        kind, id = next(iter(self._where))
        if (kind, id) != (HEADER, SCHEMA):
            raise refuse("journal", "path", f"a journal that begins with {SCHEMA!r}", f"{kind!r}, {id!r}")
        before, now = self._read(*self._where[(kind, id)])["run"], json.loads(to_line(header["run"]))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                got = f"{name} = {now.get(name)!r}, where the run that began it had {before.get(name)!r}"
                raise refuse("journal", "run", f"the run that {self.path} belongs to", got)


def read_journal(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the run, the records after it) of a journal, without becoming its writer; an unfinished end is passed over.

    Raises:
        ValueError: no journal, or damaged in its middle.
    """
    records = [record for _, _, record in _good_lines(Path(path))]
    if not records or (records[0]["kind"], records[0].get("id")) != (HEADER, SCHEMA):
        raise refuse("read_journal", "path", f"a journal ({SCHEMA})", str(path))
    return records[0]["run"], records[1:]


def _good_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(offset, length, record) of each line up to a torn end.

    Raises:
        ValueError: a damaged line before a good one.
    """
    offset = torn = 0  # ``torn``: number of the first damaged line
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = read_line(line)
            if record is None:
                torn = torn or number
            elif torn:
                raise ValueError(f"{path}:{torn}: want a line as it was written; got a damaged one, before good ones")
            else:
                yield offset, len(line), record
                offset += len(line)
