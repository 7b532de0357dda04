"""Trajectories of frozen teachers on the disk: append-only, checksummed, whole after a kill at any moment.

    manifest.jsonl               a header, then a line a shard, each with its CRC-32 (m3.draft.store.LineFile)
    inquiry-000000.safetensors   one batch of a teacher's rollouts in a domain: streams end to end, and their facts

A shard is written under another name, forced to the disk and renamed; then comes its line, with its size, its SHA-256
and the state of the source after it. A shard without a line does not exist: the next one takes its name. So the lines
alone say what is there, and rolling out goes on from the last of a domain. Anyone may read while one process writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.draft.store import LineFile
from m3.train.streams import Sample
from m3kernels.checks import refuse

OP = "trajectory store"
FORMAT = "m3 trajectories 1"
MANIFEST = "manifest.jsonl"
DOMAIN = re.compile(r"[a-z0-9][a-z0-9_-]*")
STREAMS = {  # of the file; ids and steps as 32 bits
    "ids": torch.int32, "steps": torch.int32, "mask": torch.float32, "teacher_logprobs": torch.float32,
}  # fmt: skip
FACTS = ("id", "group", "rollout", "reward", "temperature", "note")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A line of the manifest.

    Args:
        number: of the shard within its domain, from 0. teacher: who drew, and whose log-probabilities these are.
        bytes, sha256: of the file. samples, tokens, drawn: counts; ``drawn`` tokens count in the loss.
        state: ``Source.state()`` after it.
    """

    domain: str
    number: int
    teacher: str
    bytes: int
    sha256: str
    samples: int
    tokens: int
    drawn: int
    state: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def file(self) -> str:
        return f"{self.domain}-{self.number:06d}.safetensors"


class TrajectoryStore:
    """The trajectories in ``folder``; an empty store where there is none yet.

    A shard is compared with its checksum when it is first read.

    Raises:
        ValueError: no such store, another version's, a damaged manifest, a missing or cut shard; names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lines = LineFile(self.folder / MANIFEST, {"format": FORMAT})
        self.shards: list[Shard] = []
        self._open: dict[str, _Reader] = {}
        for place, fields in enumerate(self._lines.lines, 2):
            try:
                shard = Shard(**fields)
            except TypeError as error:
                raise refuse(OP, f"{self._lines.path}: line {place}", "a shard", str(error)) from error
            if shard.number != len(self.of(shard.domain)):
                want = f"shard {len(self.of(shard.domain))} of {shard.domain!r}"
                raise refuse(OP, f"{self._lines.path}: line {place}", want, f"{shard.number}")
            self._check_size(shard)
            self.shards.append(shard)

    # -- what is there ------------------------------------------------------------------------------------------------
    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted({shard.domain for shard in self.shards}))

    def of(self, domain: str) -> list[Shard]:
        """A domain's shards, in order."""
        return [shard for shard in self.shards if shard.domain == domain]

    def count(self, domain: str) -> int:
        """Samples of a domain."""
        return sum(shard.samples for shard in self.of(domain))

    def digest(self) -> str:
        """SHA-256 of what is stored: of every shard's, in the order of domains and numbers."""
        shards = sorted(self.shards, key=lambda one: (one.domain, one.number))
        return hashlib.sha256("".join(f"{one.file} {one.sha256}\n" for one in shards).encode()).hexdigest()

    def sample(self, shard: Shard, row: int) -> Sample:
        """One sample, with its teacher's log-probabilities.

        Raises:
            ValueError: the shard is not what was written; names it.
        """
        reader = self._open.get(shard.file)
        if reader is None:
            self.verify(shard)
            reader = self._open[shard.file] = _Reader(self.folder / shard.file, shard.domain)
        return reader.sample(row)

    def verify(self, shard: Shard | None = None) -> None:
        """Compare a shard, or all of them, with its checksum.

        Raises:
            ValueError: it is not what was written; names it.
        """
        for one in self.shards if shard is None else (shard,):
            self._check_size(one)
            path = self.folder / one.file
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != one.sha256:
                raise refuse(OP, str(path), f"SHA-256 {one.sha256[:12]}..., as it was written", f"{found[:12]}...")

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.file
        got = f"{path.stat().st_size}" if path.is_file() else "no file"
        if got != f"{shard.bytes}":
            raise refuse(OP, str(path), f"{shard.bytes} bytes", got)

    # -- more of it ---------------------------------------------------------------------------------------------------
    def append(self, domain: str, samples: Sequence[Sample], *, teacher: str, state: Mapping[str, Any]) -> Shard:
        """A batch as the domain's next shard. It outlives the machine when this returns.

        Raises:
            ValueError: no sample, or one without log-probabilities of its teacher; another teacher than the domain's;
                another process writes to the store.
            OSError: the disk is full, or worse; the store on the disk is as it was. Open it anew.
        """
        from safetensors.torch import save

        if not DOMAIN.fullmatch(domain):
            raise refuse(OP, "domain", f"a name like {DOMAIN.pattern}", repr(domain))
        before = self.of(domain)
        if before and before[0].teacher != teacher:
            raise refuse(OP, "teacher", f"{before[0].teacher}, as in all of {domain!r}", teacher)
        self._lines.claim()
        data = save(_tensors(samples))
        shard = Shard(
            domain=domain, number=len(before), teacher=teacher, bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(), samples=len(samples),
            tokens=sum(sample.tokens for sample in samples), drawn=sum(sample.drawn for sample in samples),
            state=json.loads(json.dumps(state)),
        )  # fmt: skip
        part = self.folder / f".writing-{shard.file}"
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        part.rename(self.folder / shard.file)
        self._sync_folder()
        try:
            self._lines.append(dataclasses.asdict(shard))
            self._lines.sync()
        except BaseException:
            self._lines.close()  # half a line may be there: whoever opens the store anew cuts it off
            raise
        self.shards.append(shard)
        return shard

    def _sync_folder(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        self._lines.close()
        self._open.clear()

    def __enter__(self) -> TrajectoryStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Reader:
    """An open shard: rows are read from the mapped file."""

    def __init__(self, path: Path, domain: str) -> None:
        from safetensors import safe_open

        self._file: Any = safe_open(path, framework="pt")
        self._bounds = self._file.get_tensor("cu_seqlens").tolist()
        self._facts = json.loads(bytes(self._file.get_tensor("facts").numpy()))
        self._domain = domain

    def sample(self, row: int) -> Sample:
        begin, end = self._bounds[row : row + 2]
        streams = {name: self._file.get_slice(name)[begin:end] for name in STREAMS}
        facts = dict(self._facts[row])
        gammas = {int(step): gamma for step, gamma in facts.pop("gammas").items()}
        return Sample(
            ids=streams["ids"].long(), steps=streams["steps"].long(), mask=streams["mask"],
            teacher_logprobs=streams["teacher_logprobs"], domain=self._domain, gammas=gammas, **facts,
        )  # fmt: skip


def _tensors(samples: Sequence[Sample]) -> dict[str, Tensor]:
    if not samples:
        raise refuse(OP, "samples", "at least one", "none")
    for sample in samples:
        if sample.teacher_logprobs is None:
            raise refuse(OP, "teacher_logprobs", "a stream of every sample", f"none of sample {sample.id!r}")
        told = sample.teacher_logprobs[sample.mask > 0]
        if not bool((told.isfinite() & (told < 1e-3)).all()):  # a sum in fp32 may end a little above 0
            want = "finite numbers, at most 0, where mask > 0"
            raise refuse(OP, "teacher_logprobs", want, f"others, in sample {sample.id!r}")
    facts = [
        {**{name: getattr(sample, name) for name in FACTS}, "gammas": sample.gammas, "note": dict(sample.note)}
        for sample in samples
    ]
    found = {name: torch.cat([getattr(sample, name) for sample in samples]).to(kind) for name, kind in STREAMS.items()}
    found["cu_seqlens"] = torch.tensor([0, *(sample.tokens for sample in samples)]).cumsum(0)
    found["facts"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    return found
