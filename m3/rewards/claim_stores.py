"""Where verdicts about claims are kept: SQLite with a usearch index beside it, in the process.

A store knows claims by their exact key and finds the nearest by embedding. Rows are of one ``Scope`` (verifier, corpus,
prompt, embedder) and never meet those of another. The index is built from SQLite when the store is opened, and takes
in what other processes wrote to the same file before each search. m3/rewards/claim_store_redis.py shares a store
between processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from m3.rewards.fact_verdicts import FactVerdict
from m3kernels.checks import refuse

BUSY_SECONDS = 10.0  # ours: how long a write waits for another process's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What a verdict depends on besides its claim, and the embedder whose rows can be compared."""

    verifier: str  # name and version
    corpus_hash: str
    prompt_version: str
    embedder: str
    dim: int

    @property
    def namespace(self) -> str:
        """Of verifier, corpus and prompt: verdicts hold whatever the embedder."""
        return digest(self.verifier, self.corpus_hash, self.prompt_version)[:24]


def digest(*parts: str) -> str:
    """SHA-256, hexadecimal, of parts that cannot run into each other."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredClaim:
    """A claim with its verdict. ``similarity``: cosine to what was searched, where it was found so."""

    key: str
    claim: str
    verdict: FactVerdict
    similarity: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is written: ``vector`` are fp32 bytes, little end first, of the embedder named."""

    key: str
    claim: str
    verdict: str  # JSON
    embedder: str
    vector: bytes


class ClaimStore(Protocol):
    """Blocking calls, safe from any thread. A lease keeps other processes from verifying the same claim."""

    def attach(self, scope: Scope) -> None:
        """Serve one scope; before anything else, once."""

    def get(self, key: str) -> FactVerdict | None:
        """The verdict of an exact key."""

    def put(self, key: str, claim: str, verdict: FactVerdict, vector: np.ndarray) -> None:
        """Keep a verdict; the first of a key stays."""

    def near(self, vector: np.ndarray, k: int) -> list[StoredClaim]:
        """The k nearest claims, nearest first."""
        ...

    def acquire(self, flight: str, token: str) -> bool:
        """Whether a flight is ours; where nobody shares the store it always is."""
        ...

    def renew(self, flight: str, token: str) -> None:
        """Hold a flight for longer."""

    def release(self, flight: str, token: str) -> None:
        """Give a flight up."""

    def close(self) -> None:
        """Write what is not written, and let go of files and sockets."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    key TEXT NOT NULL,
    claim TEXT NOT NULL,
    verdict TEXT NOT NULL,
    embedder TEXT NOT NULL,
    vector BLOB NOT NULL,
    shared INTEGER NOT NULL DEFAULT 0,
    UNIQUE (namespace, key)
);
CREATE INDEX IF NOT EXISTS unshared ON verdicts (namespace) WHERE shared = 0;
"""


class SqliteStore:
    """Verdicts in one SQLite file (WAL), or in memory without a path.

    Killed at any moment it keeps every verdict whose ``put`` returned; only a crash of the machine can lose the last.

    Raises:
        ValueError: used before ``attach``, or attached twice; a vector of another length.
        sqlite3.Error: the file cannot be opened or written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            ":memory:" if self.path is None else self.path,
            timeout=BUSY_SECONDS,
            check_same_thread=False,
            isolation_level=None,
        )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)
        self._scope: Scope | None = None
        self._seen = 0

    @property
    def scope(self) -> Scope:
        """The scope served."""
        if self._scope is None:
            raise refuse("SqliteStore", "scope", "attach(scope) first", None)
        return self._scope

    def attach(self, scope: Scope) -> None:
        """Serve one scope: its rows go into the index."""
        from usearch.index import Index

        if self._scope is not None:
            raise refuse("SqliteStore.attach", "scope", "one scope a store", f"{scope} after {self._scope}")
        self._index = Index(ndim=scope.dim, metric="cos", dtype="f32")
        self._scope = scope
        with self._lock:
            self._sync()

    def get(self, key: str) -> FactVerdict | None:
        """The verdict of an exact key."""
        with self._lock:
            row = self._db.execute(
                "SELECT verdict FROM verdicts WHERE namespace = ? AND key = ?", (self.scope.namespace, key)
            ).fetchone()
        return None if row is None else FactVerdict.from_json(json.loads(row[0]))

    def put(self, key: str, claim: str, verdict: FactVerdict, vector: np.ndarray) -> None:
        """Keep a verdict; the first of a key stays."""
        self.put_row(self.row(key, claim, verdict, vector), shared=False)

    def near(self, vector: np.ndarray, k: int) -> list[StoredClaim]:
        """The k nearest claims by cosine, nearest first."""
        self._check(vector)
        with self._lock:
            self._sync()
            if not len(self._index):
                return []
            found = self._index.search(np.ascontiguousarray(vector, np.float32), k)
            pairs = list(zip(found.keys.tolist(), found.distances.tolist(), strict=True))
            marks = ",".join("?" * len(pairs))
            rows = self._db.execute(
                f"SELECT id, key, claim, verdict FROM verdicts WHERE id IN ({marks})", [row for row, _ in pairs]
            ).fetchall()
        by_id = {row[0]: row[1:] for row in rows}
        return [
            StoredClaim(
                key=by_id[row][0],
                claim=by_id[row][1],
                verdict=FactVerdict.from_json(json.loads(by_id[row][2])),
                similarity=1.0 - distance,
            )
            for row, distance in pairs
        ]

    def acquire(self, flight: str, token: str) -> bool:
        """True: the cache itself keeps order within a process, and processes are not told apart here."""
        return True

    def renew(self, flight: str, token: str) -> None:
        """Nothing to do."""

    def release(self, flight: str, token: str) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def count(self) -> int:
        """Verdicts of the scope."""
        with self._lock:
            query = "SELECT COUNT(*) FROM verdicts WHERE namespace = ?"
            return int(self._db.execute(query, (self.scope.namespace,)).fetchone()[0])

    # -- rows, for a store that shares them -------------------------------------------------------------------------
    def row(self, key: str, claim: str, verdict: FactVerdict, vector: np.ndarray) -> Row:
        """A verdict as it is written."""
        self._check(vector)
        return Row(
            key=key,
            claim=claim,
            verdict=json.dumps(verdict.to_json(), ensure_ascii=False),
            embedder=self.scope.embedder,
            vector=np.ascontiguousarray(vector, "<f4").tobytes(),
        )

    def put_row(self, row: Row, *, shared: bool) -> None:
        """Write a row unless its key is there. ``shared``: others have it already."""
        with self._lock:
            self._db.execute(
                "INSERT INTO verdicts (namespace, key, claim, verdict, embedder, vector, shared) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (namespace, key) DO NOTHING",
                (self.scope.namespace, row.key, row.claim, row.verdict, row.embedder, row.vector, int(shared)),
            )

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those keys that are here."""
        with self._lock:
            query = "SELECT 1 FROM verdicts WHERE namespace = ? AND key = ?"
            return {key for key in keys if self._db.execute(query, (self.scope.namespace, key)).fetchone()}

    def unshared(self, limit: int) -> list[Row]:
        """The oldest rows that others do not have."""
        with self._lock:
            rows = self._db.execute(
                "SELECT key, claim, verdict, embedder, vector FROM verdicts "
                "WHERE namespace = ? AND shared = 0 ORDER BY id LIMIT ?",
                (self.scope.namespace, limit),
            ).fetchall()
        return [Row(key=row[0], claim=row[1], verdict=row[2], embedder=row[3], vector=row[4]) for row in rows]

    def set_shared(self, keys: Sequence[str] | None, shared: bool) -> None:
        """Mark rows, or all, as had by others or not."""
        with self._lock:
            if keys is None:
                self._db.execute(
                    "UPDATE verdicts SET shared = ? WHERE namespace = ?", (int(shared), self.scope.namespace)
                )
            else:
                query = "UPDATE verdicts SET shared = ? WHERE namespace = ? AND key = ?"
                self._db.executemany(query, [(int(shared), self.scope.namespace, key) for key in keys])

    def claims(self) -> Iterator[tuple[str, FactVerdict]]:
        """Every claim with its verdict, in the order they came."""
        with self._lock:
            query = "SELECT claim, verdict FROM verdicts WHERE namespace = ? ORDER BY id"
            rows = self._db.execute(query, (self.scope.namespace,)).fetchall()
        for claim, verdict in rows:
            yield claim, FactVerdict.from_json(json.loads(verdict))

    def _sync(self) -> None:
        """Rows written since, by whichever process, into the index."""
        scope = self.scope
        rows = self._db.execute(
            "SELECT id, vector FROM verdicts WHERE namespace = ? AND embedder = ? AND id > ? ORDER BY id",
            (scope.namespace, scope.embedder, self._seen),
        ).fetchall()
        if not rows:
            return
        keys = np.array([row[0] for row in rows], np.uint64)
        self._index.add(keys, np.frombuffer(b"".join(row[1] for row in rows), "<f4").reshape(len(rows), scope.dim))
        self._seen = rows[-1][0]

    def _check(self, vector: np.ndarray) -> None:
        if vector.shape != (self.scope.dim,):
            raise refuse("SqliteStore", "vector", f"({self.scope.dim},)", vector.shape)
