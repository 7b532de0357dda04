"""Verdicts about claims, verified once: exact keys (L1), then claims that say the same in other words (L2).

L1  sha256 of the normalised claim, verifier with version, hash of the corpus, version of the prompt.
L2  the nearest stored claims by embedding with cosine >= ``threshold``, and of them the first that the guard
    (m3/rewards/claim_guard.py) takes for the same claim. Similarity proposes, the guard decides.

Many may ask at once: a claim, and every claim the guard could take for it, is verified by one of them, and the others
wait and then find it (across processes by a lease of a shared store). What is not a verdict (timeout, unreachable,
unparsable, over budget, an exception) is returned or raised and never kept. A seeded share of L2 hits is verified
again: the audit, whose disagreements estimate the rate of false hits.

Two levels, Redis and the rise of the hit rate to about 80 %: Baichuan-M3, arXiv 2602.06570, on the fact verifier. The
guard, the single flight and the audit are ours: by cosine alone a claim with another dose is the same claim.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
import logging
import random
import secrets
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np

from m3.rewards.claim_guard import normalise, same, signature
from m3.rewards.claim_stores import ClaimStore, Scope, StoredClaim, digest
from m3.rewards.fact_verdicts import FactVerdict
from m3.text.embed import Embedder
from m3kernels.checks import refuse

NEIGHBOURS = 8  # ours: candidates the guard looks at; rewordings of a claim stand among the first few
THRESHOLD = 0.7  # ours, from the tuning set of docs/experiments/claim_cache.md: the guard decides, this spares it work
FIRST_POLL, LAST_POLL = 0.01, 0.1  # ours: seconds between looks at what another process verifies
LEASE_RENEWED = 5.0  # ours: seconds; well inside the 30 s of a lease

_log = logging.getLogger(__name__)
Verify = Callable[[], Awaitable[FactVerdict]]


class Source(enum.StrEnum):
    """Where a verdict came from."""

    verified = "verified"
    l1 = "l1"
    l2 = "l2"
    audited = "audited"  # an L2 hit that was verified again; the verdict is the new one


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedVerdict:
    """A verdict and where it came from. ``matched``: the stored claim of an L2 hit; ``waited``: for another flight."""

    verdict: FactVerdict
    source: Source
    matched: str = ""
    similarity: float = 1.0
    waited: bool = False


@dataclasses.dataclass(kw_only=True)
class CacheStats:
    """Counts since the cache was made. Every claim asked is one of l1_hits, l2_hits, verified, failures."""

    l1_hits: int = 0
    l2_hits: int = 0  # audited ones included
    verified: int = 0
    failures: int = 0  # no verdict, or an exception
    unkept: int = 0  # verdicts the store could not write
    waits: int = 0  # claims that waited for a flight, whatever came of it
    audits: int = 0  # L2 hits verified again, with a verdict
    false_hits: int = 0  # of those, with another label
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by reason of the guard

    @property
    def asked(self) -> int:
        """Claims asked."""
        return self.l1_hits + self.l2_hits + self.verified + self.failures

    @property
    def hit_rate(self) -> float | None:
        """Share of hits; None before the first claim."""
        return (self.l1_hits + self.l2_hits) / self.asked if self.asked else None

    def false_hit_rate(self) -> tuple[float, float, float] | None:
        """(rate, low, high) of false hits among audited L2 hits, Wilson's 95 %; None without an audit."""
        return wilson(self.false_hits, self.audits) if self.audits else None


def wilson(events: int, trials: int, z: float = 1.959964) -> tuple[float, float, float]:
    """(share, low, high): Wilson's score interval (1927) of a share, 95 % by default.

    Raises:
        ValueError: no trial, or more events than trials.
    """
    if trials < 1 or not 0 <= events <= trials:
        raise refuse("wilson", "events, trials", "0 <= events <= trials, trials >= 1", (events, trials))
    share = events / trials
    centre = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    scale = 1 + z * z / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return share, max(0.0, min(share, low)), min(1.0, max(share, high))  # rounding alone can leave the share outside


class _Flight:
    """Those who ask for one group of claims at one time: one after another, the first verifies."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.members = 0
        self.unkept: dict[str, FactVerdict] = {}  # by exact key: what the store would not take
        self.failed: dict[str, FactVerdict | Exception] = {}  # by exact key: what those who wait for it get too


class ClaimCache:
    """The two levels over one store.

    Args:
        store: attached by the cache; one cache a store.
        embedder: of claims; blocking, called in a thread.
        verifier_id, corpus_hash, prompt_version: another value of any of them is another verdict.
        threshold: least cosine of an L2 candidate.
        guard: False is the unguarded baseline: nearest claim above the threshold.
        audit_rate: share of L2 hits verified again, drawn by claim from ``seed``.
    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        store: ClaimStore,
        embedder: Embedder,
        *,
        verifier_id: str,
        corpus_hash: str,
        prompt_version: str,
        threshold: float = THRESHOLD,
        guard: bool = True,
        audit_rate: float = 0.02,  # ours
        seed: int = 0,
    ) -> None:
        if not -1 <= threshold <= 1:
            raise refuse("ClaimCache", "threshold", "a cosine in [-1, 1]", threshold)
        if not 0 <= audit_rate <= 1:
            raise refuse("ClaimCache", "audit_rate", "a share in [0, 1]", audit_rate)
        self.scope = Scope(
            verifier=verifier_id,
            corpus_hash=corpus_hash,
            prompt_version=prompt_version,
            embedder=embedder.name,
            dim=embedder.dim,
        )
        self.threshold, self.guard, self.audit_rate, self.seed = threshold, guard, audit_rate, seed
        self.stats = CacheStats()
        self._embedder = embedder
        self._embedding = threading.Lock()  # an embedder need not be safe in several threads
        self._flights: dict[str, _Flight] = {}
        self._store = store
        store.attach(self.scope)

    def key(self, claim: str) -> str:
        """The exact key."""
        return digest(normalise(claim), self.scope.verifier, self.scope.corpus_hash, self.scope.prompt_version)

    async def get_or_verify(self, claim: str, verify: Verify) -> FactVerdict:
        """The verdict of a claim, as ``ask``."""
        return (await self.ask(claim, verify)).verdict

    async def ask(self, claim: str, verify: Verify) -> CachedVerdict:
        """The verdict of a claim, and where it came from: a stored one, or what ``verify`` says of it.

        Raises:
            ValueError: an empty claim.
            Exception: whatever ``verify`` raises; those who waited for the same claim get it too.
        """
        if not claim.strip():
            raise refuse("ClaimCache.ask", "claim", "a text", repr(claim))
        key = self.key(claim)
        if (found := await asyncio.to_thread(self._store.get, key)) is not None:
            return self._exact(claim, found, waited=False)
        vector = await asyncio.to_thread(self._embed, claim)
        near = await asyncio.to_thread(self._near, claim, vector, self.stats.refused)
        if near is not None and not self._audited(key):
            return self._equivalent(claim, near, waited=False)
        async with self._flight(claim, key) as (flight, waited):
            return await self._in_flight(claim, key, vector, verify, flight, waited)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    # -- one at a time ----------------------------------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def _flight(self, claim: str, key: str) -> AsyncIterator[tuple[_Flight, bool]]:
        name = signature(claim).flight_key if self.guard else key
        flight = self._flights.setdefault(name, _Flight())
        waited = flight.lock.locked()
        flight.members += 1
        try:
            async with flight.lock:
                yield flight, waited
        finally:
            flight.members -= 1
            if not flight.members:
                del self._flights[name]

    async def _in_flight(
        self, claim: str, key: str, vector: np.ndarray, verify: Verify, flight: _Flight, waited: bool
    ) -> CachedVerdict:
        """With the flight's lock: wait for other processes, look again, verify."""
        if (failed := flight.failed.get(key)) is not None and waited:
            return self._failed(claim, failed, waited=True)
        if (unkept := flight.unkept.get(key)) is not None:
            return self._exact(claim, unkept, waited=waited)
        name = digest(signature(claim).flight_key if self.guard else key)
        token = secrets.token_hex(8)
        poll = FIRST_POLL
        while True:
            asking = asyncio.ensure_future(asyncio.to_thread(self._store.acquire, name, token))
            try:
                ours = await asyncio.shield(asking)
            except asyncio.CancelledError:  # the thread goes on, and what it gets must be given back
                asking.add_done_callback(
                    lambda _: threading.Thread(target=self._store.release, args=(name, token)).start()
                )
                raise
            try:
                found = await asyncio.to_thread(self._store.get, key)
                if found is not None:
                    return self._exact(claim, found, waited=waited)
                near = await asyncio.to_thread(self._near, claim, vector)
                audit = near is not None and self._audited(key)
                if near is not None and not audit:
                    return self._equivalent(claim, near, waited=waited)
                if ours:
                    return await self._verify(claim, key, vector, verify, flight, near, name, token, waited)
            finally:
                if ours:
                    await asyncio.to_thread(self._store.release, name, token)
            waited = True
            await asyncio.sleep(poll)
            poll = min(2 * poll, LAST_POLL)

    async def _verify(
        self,
        claim: str,
        key: str,
        vector: np.ndarray,
        verify: Verify,
        flight: _Flight,
        near: StoredClaim | None,
        name: str,
        token: str,
        waited: bool,
    ) -> CachedVerdict:
        renewing = asyncio.create_task(self._renew(name, token))
        try:
            verdict = await verify()
        except Exception as error:
            if near is not None:
                _log.warning("claim cache: the audit of a hit failed: %s", error)
                return self._equivalent(claim, near, waited=waited)
            flight.failed[key] = error
            self._count(waited, failures=1)
            raise
        finally:
            renewing.cancel()
        if not verdict.label.judged:
            if near is not None:
                return self._equivalent(claim, near, waited=waited)
            flight.failed[key] = verdict
            return self._failed(claim, verdict, waited=waited)
        try:
            await asyncio.to_thread(self._store.put, key, claim, verdict, vector)
        except sqlite3.Error as error:  # disk full, locked: the verdict was paid for, and those who wait need it
            flight.unkept[key] = verdict
            self.stats.unkept += 1
            _log.log(
                logging.WARNING if self.stats.unkept == 1 else logging.DEBUG,
                "claim cache: a verdict cannot be kept (%s); going on without",
                error,
            )
        if near is None:
            self._count(waited, verified=1)
            return CachedVerdict(verdict=verdict, source=Source.verified, waited=waited)
        self._count(waited, l2_hits=1, audits=1, false_hits=int(verdict.label != near.verdict.label))
        return CachedVerdict(
            verdict=verdict, source=Source.audited, matched=near.claim, similarity=near.similarity, waited=waited
        )

    async def _renew(self, name: str, token: str) -> None:
        while True:
            await asyncio.sleep(LEASE_RENEWED)
            await asyncio.to_thread(self._store.renew, name, token)

    # -- what was found ---------------------------------------------------------------------------------------------
    def _embed(self, claim: str) -> np.ndarray:
        with self._embedding:
            return np.asarray(self._embedder([claim])[0], np.float32)

    def _near(
        self, claim: str, vector: np.ndarray, refused: collections.Counter[str] | None = None
    ) -> StoredClaim | None:
        for candidate in self._store.near(vector, NEIGHBOURS if self.guard else 1):
            if candidate.similarity < self.threshold:
                break
            why_not = same(claim, candidate.claim) if self.guard else ""
            if not why_not:
                return candidate
            if refused is not None:
                refused[why_not.partition(":")[0]] += 1
        return None

    def _audited(self, key: str) -> bool:
        return random.Random(f"{self.seed}|{key}").random() < self.audit_rate

    def _exact(self, claim: str, verdict: FactVerdict, *, waited: bool) -> CachedVerdict:
        self._count(waited, l1_hits=1)
        return CachedVerdict(verdict=_again(claim, verdict), source=Source.l1, waited=waited)

    def _equivalent(self, claim: str, near: StoredClaim, *, waited: bool) -> CachedVerdict:
        self._count(waited, l2_hits=1)
        return CachedVerdict(
            verdict=_again(claim, near.verdict),
            source=Source.l2,
            matched=near.claim,
            similarity=near.similarity,
            waited=waited,
        )

    def _failed(self, claim: str, what: FactVerdict | Exception, *, waited: bool) -> CachedVerdict:
        self._count(waited, failures=1)
        if isinstance(what, Exception):
            raise what
        return CachedVerdict(verdict=dataclasses.replace(what, claim=claim), source=Source.verified, waited=waited)

    def _count(self, waited: bool, **counts: int) -> None:
        self.stats.waits += waited
        for name, count in counts.items():
            setattr(self.stats, name, getattr(self.stats, name) + count)


def _again(claim: str, verdict: FactVerdict) -> FactVerdict:
    """A stored verdict, for this asking: nothing was searched."""
    return dataclasses.replace(verdict, claim=claim, searches=0, malformed=0, cached=True)
