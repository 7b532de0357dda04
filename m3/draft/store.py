"""A file of responses that a target model gave: append-only, checksummed, whole after a kill at any moment.

Every line is a CRC-32 (8 hexadecimal digits), a space and a JSON object. The first says whose responses these are; each
other one is a response. A last line that a kill cut short is dropped by the next writer; damage anywhere else is
refused, and so are the responses of another model. Anyone may read while one process writes; a second writer may not.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from m3kernels.checks import refuse

FORMAT = "m3 draft responses 1"
TRAIN, HELD_OUT, OUT_OF_TEMPLATE = GROUPS = ("train", "held_out", "out_of_template")
EDGE_BYTES = 1 << 20  # of a file of weights, at either end, that go into a fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """What the target said to one prompt. ``response`` ends with an end-of-sequence token unless it was cut."""

    group: str
    index: int  # number of the request within its group
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    temperature: float
    seed: int


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of a checkpoint's config.json, and of names, sizes and both ends of its files of weights."""
    digest = hashlib.sha256()
    folder = Path(folder)
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()


class LineFile:
    """An append-only file of checksummed lines, the first of which is a header. The first ``append`` makes it ours.

    Args:
        header: what the first line says; written by the first ``append`` where there is no file yet.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path, self.header = Path(path), header
        self.found: dict[str, Any] | None = None  # the header of the file
        self.lines: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data.split(b"\n")[:-1]  # what follows the last newline was cut short, or is empty
        for number, line in enumerate(whole, 1):
            fields = decode_line(line)
            if fields is None:
                wanted = "a line whose checksum holds" if number > 1 else f"a file of {header['format']!r}"
                raise refuse("store", f"{self.path}: line {number}", wanted, repr(line[:60]))
            if number == 1:
                self.found = fields
                if fields.get("format") != header["format"]:
                    raise refuse("store", str(self.path), f"a file of {header['format']!r}", repr(fields.get("format")))
            else:
                self.lines.append(fields)
        self._size, self._whole = len(data), sum(len(line) + 1 for line in whole)

    def claim(self) -> BinaryIO:
        """The file, open for appending by this process alone; a torn last line is gone."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                raise refuse("store", str(self.path), "no other process that writes to it", "one that does") from error
            if file.seek(0, os.SEEK_END) != self._size:
                file.close()
                raise refuse("store", str(self.path), "the file that was read", "more of it: start again")
            file.truncate(self._whole)
            self._file = file
            if not self._whole:
                file.write(encode_line(self.header))
                file.flush()
        return self._file

    def append(self, fields: dict[str, Any]) -> None:
        """Add one line. It outlives this process at once, and the machine after ``sync``."""
        file = self.claim()
        file.write(encode_line(fields))
        file.flush()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Store:
    """The responses in ``path``.

    Args:
        target, fingerprint: name and fingerprint of the model whose responses these are.
    Raises:
        ValueError: not such a file, a damaged one, or another model's.
    """

    def __init__(self, path: str | Path, *, target: str, fingerprint: str) -> None:
        self._file = LineFile(path, {"format": FORMAT, "target": target, "fingerprint": fingerprint})
        self.responses: list[Response] = []
        self._have: set[tuple[str, int]] = set()
        found = self._file.found
        if found is not None and found.get("fingerprint") != fingerprint:
            got = f"those of {found.get('target')} ({str(found.get('fingerprint'))[:12]})"
            raise refuse("store", str(path), f"responses of {target} ({fingerprint[:12]})", got)
        for fields in self._file.lines:
            prompt, response = tuple(fields.pop("prompt")), tuple(fields.pop("response"))
            self._keep(Response(prompt=prompt, response=response, **fields))

    def _keep(self, response: Response) -> None:
        self.responses.append(response)
        self._have.add((response.group, response.index))

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether there is a response to request ``index`` of ``group``."""
        return key in self._have

    def append(self, response: Response) -> None:
        """Add one response. It outlives this process at once, and the machine after ``sync``."""
        if response.group not in GROUPS:
            raise refuse("store", "group", " or ".join(GROUPS), repr(response.group))
        self._file.append(dataclasses.asdict(response))
        self._keep(response)

    def sync(self) -> None:
        self._file.sync()

    def group(self, name: str) -> list[Response]:
        """Responses of one group, in the order of their requests."""
        return sorted((one for one in self.responses if one.group == name), key=lambda one: one.index)

    def first(self, group: str, tokens: int) -> list[Response]:
        """Responses of one group in the order of the file, until they hold ``tokens`` response tokens."""
        found, count = [], 0
        for one in self.responses:
            if one.group == group and count < tokens:
                found.append(one)
                count += len(one.response)
        return found

    def tokens(self, group: str) -> int:
        """Response tokens of one group."""
        return sum(len(one.response) for one in self.responses if one.group == group)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def encode_line(fields: dict[str, Any]) -> bytes:
    """A line with its checksum."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """What a line (without its newline) says; None if its checksum does not hold."""
    digits, space, text = line[:8], line[8:9], line[9:]
    if space != b" " or digits != b"%08x" % zlib.crc32(text):
        return None
    fields = json.loads(text)
    return fields if isinstance(fields, dict) else None
