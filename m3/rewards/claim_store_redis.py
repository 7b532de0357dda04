"""Verdicts shared between processes by a plain Redis server; a local SQLite store goes on where the server does not.

Every verdict is written locally first and then to Redis, and what others wrote is mirrored locally, so a search never
leaves the process. In Redis, under ``m3:claims:<namespace>:``

    v:<key>     one verdict: JSON with its claim, embedder and vector (the first writer's stays)
    log         list of the keys in the order they came; each process remembers how far it has read
    epoch       a random text: another one, or another run of the server (one that was killed comes back with its
                last snapshot), means that data may be lost: the log is read again, and what it lacks is pushed again
    f:<flight>  who is verifying a claim now (SET NX PX; renewed while it lasts)

A failed call marks the server as down, is logged once an outage, and is not tried again before a wait that doubles from
``first_wait`` to ``last_wait``; meanwhile everything is answered locally and no call waits. No call takes longer than
``timeout`` because of the server. When it is back, verdicts it does not have are pushed, ``BATCH`` a call.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from m3.rewards.claim_stores import ClaimStore, Row, Scope, SqliteStore, StoredClaim
from m3.rewards.fact_verdicts import FactVerdict
from m3kernels.checks import refuse

BATCH = 128  # ours: verdicts of one exchange, about 0.3 MiB
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_RENEW = (
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) else return 0 end"
)
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) else return 0 end"


class RedisStore:
    """A store as in m3/rewards/claim_stores.py, shared.

    Args:
        url: of the server: "redis://127.0.0.1:6379/0".
        local: where verdicts go first; in memory by default. With a file, verdicts that Redis did not get outlive
            the process too.
        timeout: seconds for one exchange with the server.
        lease: seconds after which a flight whose process died is free again.
    """

    def __init__(
        self,
        url: str,
        *,
        local: SqliteStore | None = None,
        timeout: float = 0.05,
        lease: float = 30.0,
        first_wait: float = 0.1,
        last_wait: float = 5.0,
    ) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        if not timeout > 0:
            raise refuse("RedisStore", "timeout", "seconds > 0", timeout)
        self.local = SqliteStore() if local is None else local
        self.lease = lease
        self.first_wait, self.last_wait = first_wait, last_wait
        self.up = True
        self.outages = 0
        self._error = redis.RedisError  # also of a server that is there and refuses: out of memory, read only
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._lock = threading.Lock()  # of the state below; never held during an exchange
        self._moving = threading.Lock()  # one thread at a time reads the log and pushes
        self._wait = first_wait
        self._again = 0.0
        self._read = 0
        self._epoch = b""

    def attach(self, scope: Scope) -> None:
        """Serve one scope; reads all that others wrote, if the server is there."""
        self.local.attach(scope)
        self._prefix = f"m3:claims:{scope.namespace}:"
        self._exchange()

    def get(self, key: str) -> FactVerdict | None:
        """The verdict of an exact key: the local one, else the server's."""
        found = self.local.get(key)
        if found is not None:
            return found
        value = self._try(lambda: self._redis.get(self._prefix + "v:" + key))
        if not value:
            return None
        row = self._sound(key, value)
        if row is None:
            return None
        self.local.put_row(row, shared=True)
        return FactVerdict.from_json(json.loads(row.verdict))

    def put(self, key: str, claim: str, verdict: FactVerdict, vector: np.ndarray) -> None:
        """Keep a verdict, locally at once and on the server as soon as it can be had."""
        self.local.put(key, claim, verdict, vector)
        self._exchange()

    def near(self, vector: np.ndarray, k: int) -> list[StoredClaim]:
        """The k nearest claims, those of other processes included."""
        self._exchange()
        return self.local.near(vector, k)

    def acquire(self, flight: str, token: str) -> bool:
        """Whether a flight is ours. Without the server it is: better verified twice than not at all."""
        name = self._prefix + "f:" + flight
        taken = self._try(lambda: [self._redis.set(name, token, nx=True, px=int(self.lease * 1000))])
        return taken is None or bool(taken[0])

    def renew(self, flight: str, token: str) -> None:
        """Hold a flight for longer."""
        self._try(lambda: self._redis.eval(_RENEW, 1, self._prefix + "f:" + flight, token, int(self.lease * 1000)))

    def release(self, flight: str, token: str) -> None:
        """Give a flight up, if it is still ours."""
        self._try(lambda: self._redis.eval(_RELEASE, 1, self._prefix + "f:" + flight, token))

    def flush(self) -> int:
        """Push what the server lacks; how many verdicts it still does not have."""
        while self.local.unshared(1) and self._exchange():
            pass
        return len(self.local.unshared(1_000_000))

    def close(self) -> None:
        """Push what the server lacks if it is there, and close. What is left stays in the local file."""
        with self._lock:
            self._again = 0.0
        if left := self.flush():
            _log.warning("claim cache: closed with %d verdicts that Redis does not have", left)
        self._redis.close()
        self.local.close()

    # -- the server -------------------------------------------------------------------------------------------------
    def _try(self, call: Callable[[], _T]) -> _T | None:
        """The server's answer; None while it is down."""
        with self._lock:
            if not self.up and time.monotonic() < self._again:
                return None
            self._again = time.monotonic() + self._wait  # while one call tries, others do not
        try:
            answer = call()
        except self._error as error:
            self._went(error)
            return None
        self._came()
        return answer

    def _went(self, error: Exception) -> None:
        with self._lock:
            first, self.up = self.up, False
            self._wait = self.first_wait if first else min(2 * self._wait, self.last_wait)
            self._again = time.monotonic() + self._wait
            self.outages += first
        if first:
            _log.warning("claim cache: Redis does not answer (%s); going on with the local store", error)

    def _came(self) -> None:
        with self._lock:
            back, self.up = not self.up, True
            self._wait = self.first_wait
        if back:
            _log.info("claim cache: Redis answers again")

    def _exchange(self) -> bool:
        """Read what others wrote, push what they lack; whether the server answered and took something."""
        with self._moving:
            if self._pull() is None:
                return False
            rows = self.local.unshared(BATCH)
            if not rows or self._try(lambda: self._push(rows)) is None:
                return False
            self.local.set_shared([row.key for row in rows], True)
            return True

    def _pull(self) -> bool | None:
        """Mirror the log; None if the server is down."""
        while True:
            seen = self._try(self._read_log)
            if seen is None:
                return None
            epoch, keys = seen
            if (
                epoch != self._epoch
            ):  # the first sight of the server, or it lost its data: only its log tells what it has
                self._epoch, again = epoch, self._read > 0
                self._read = 0
                self.local.set_shared(None, False)
                if again:
                    continue
            known = self.local.known(keys)
            lacking = [key for key in keys if key not in known]
            if lacking:
                values = self._try(functools.partial(self._redis.mget, [self._prefix + "v:" + one for one in lacking]))
                if values is None:
                    return None
                for key, value in zip(lacking, values, strict=True):
                    if value and (row := self._sound(key, value)):
                        self.local.put_row(row, shared=True)
            self.local.set_shared(keys, True)
            self._read += len(keys)
            if len(keys) < BATCH:
                return True

    def _sound(self, key: str, value: bytes) -> Row | None:
        """The row of a value; None, and said, where it cannot be read: others may write what this program cannot."""
        try:
            row = _read_row(value)
            FactVerdict.from_json(json.loads(row.verdict))
            if row.key != key or (
                row.embedder == self.local.scope.embedder and len(row.vector) != 4 * self.local.scope.dim
            ):
                raise ValueError(f"another key or length: {row.key}, {len(row.vector)} bytes")
        except (ValueError, TypeError) as error:
            _log.warning("claim cache: a verdict in Redis cannot be read (%s: %s)", key, error)
            return None
        return row

    def _read_log(self) -> tuple[bytes, list[str]]:
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._prefix + "epoch", secrets.token_hex(8), nx=True)
            pipe.get(self._prefix + "epoch")
            pipe.info("server")
            pipe.lrange(self._prefix + "log", self._read, self._read + BATCH - 1)
            _, epoch, server, keys = pipe.execute()
        return epoch + b"|" + str(server["run_id"]).encode(), [key.decode() for key in keys]

    def _push(self, rows: list[Row]) -> list[Any]:
        with self._redis.pipeline(transaction=True) as pipe:
            for row in rows:
                pipe.set(self._prefix + "v:" + row.key, _write_row(row), nx=True)
                pipe.rpush(self._prefix + "log", row.key)
            return list(pipe.execute())


def open_store(where: str | Path | None = None, local: str | Path | None = None) -> ClaimStore:
    """The store of a place: in memory (None), a SQLite file, or a server ("redis://host:port/0") with a local file."""
    if where is not None and str(where).startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(str(where), local=SqliteStore(local))
    if local is not None:
        raise refuse("open_store", "local", "no local file without a server", local)
    return SqliteStore(where)


def _write_row(row: Row) -> str:
    vector = base64.b64encode(row.vector).decode()
    return json.dumps([row.key, row.claim, row.verdict, row.embedder, vector], ensure_ascii=False)


def _read_row(value: bytes) -> Row:
    key, claim, verdict, embedder, vector = json.loads(value)
    return Row(key=key, claim=claim, verdict=verdict, embedder=embedder, vector=base64.b64decode(vector))
