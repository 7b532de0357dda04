"""The claim cache over a real Redis server: shared levels, one flight across processes, and a server that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import redis

from m3.rewards.claim_cache import ClaimCache, Source
from m3.rewards.claim_guard import signature
from m3.rewards.claim_store_redis import RedisStore, open_store
from m3.rewards.claim_stores import SqliteStore, digest
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.text.embed import LexicalEmbedder

PATIENT = dict(timeout=1.0, first_wait=0.02, last_wait=0.1)  # a machine under load must not look like an outage


class Server:
    """A redis-server on loopback that writes to disk only what SAVE says, and reads that when it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            ["redis-server", *options, "--dir", str(self.folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.ConnectionError), redis.Redis.from_url(self.url) as client:
                client.ping()
                return
            time.sleep(0.02)
        raise RuntimeError("redis-server did not start in 20 s")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def claims(self) -> set[str]:
        """Keys of the verdicts it has."""
        with redis.Redis.from_url(self.url) as client:
            return {key.decode().rpartition(":")[2] for key in client.scan_iter("m3:claims:*:v:*")}


@pytest.fixture
def server(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on the path (Debian: apt-get install redis-server)")
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def make_cache(server: Server, local: SqliteStore | None = None, **changes) -> ClaimCache:
    store = RedisStore(server.url, local=local, **{**PATIENT, **changes})
    scope = dict(verifier_id="v1", corpus_hash="c1", prompt_version="p1", audit_rate=0.0, threshold=0.3)
    return ClaimCache(store, LexicalEmbedder(), **scope)


class Verifier:
    def __init__(self, seconds: float = 0.005) -> None:
        self.seconds = seconds
        self.asked: Counter[str] = Counter()

    def of(self, claim: str):
        async def verify() -> FactVerdict:
            self.asked[claim] += 1
            await asyncio.sleep(self.seconds)
            return FactVerdict(claim=claim, label=Label.supported)

        return verify


def ask(cache: ClaimCache, verifier: Verifier, *claims: str) -> list[Source]:
    async def run():
        return [(await cache.ask(claim, verifier.of(claim))).source for claim in claims]

    return asyncio.run(run())


def dose(i: int) -> str:
    return f"Aspirin {i} mg may cause bleeding"


def test_what_one_verified_the_other_has_at_both_levels(server):
    one, other, verifier = make_cache(server), make_cache(server), Verifier()
    assert ask(one, verifier, dose(5)) == [Source.verified]
    assert ask(other, verifier, "Aspirin 5 mg can cause bleeding.", dose(5), dose(6)) == ["l2", "l1", "verified"]
    assert ask(one, verifier, dose(6)) == [Source.l1]


def test_a_late_process_reads_everything(server):
    one, verifier = make_cache(server), Verifier(seconds=0.0)
    ask(one, verifier, *map(dose, range(150)))
    late = RedisStore(server.url, **PATIENT)
    late.attach(one.scope)
    assert late.local.count() == 150, "more than one batch of the log"


def test_scopes_do_not_meet(server):
    one, verifier = make_cache(server), Verifier()
    ask(one, verifier, dose(5))
    store = RedisStore(server.url, **PATIENT)
    other = ClaimCache(store, LexicalEmbedder(), verifier_id="v1", corpus_hash="c2", prompt_version="p1")
    assert ask(other, verifier, dose(5)) == [Source.verified]


def test_32_workers_of_two_caches_verify_each_claim_once(server):
    """Two caches are two processes as far as the store can tell: they share the server alone."""
    caches, verifier = [make_cache(server), make_cache(server)], Verifier()
    texts = [dose(i) for i in range(20)] + [f"Aspirin {i} mg can cause bleeding." for i in range(20)]

    async def worker(number: int):
        for text in (texts * 2)[number // 2 :: 16]:
            await caches[number % 2].ask(text, verifier.of(text))

    async def run():
        await asyncio.gather(*(worker(number) for number in range(32)))

    asyncio.run(run())
    assert verifier.asked.total() == 20
    assert sum(cache.stats.verified for cache in caches) == 20
    assert sum(cache.stats.asked for cache in caches) == 160


def ask_all(url: str, log: Path, go: Path) -> None:
    """What a process of its own does: 15 claims, each asked twice at once, each verification a line of a file."""

    def verify_of(claim: str):
        async def verify() -> FactVerdict:
            with log.open("a") as file:
                file.write(claim + "\n")
            await asyncio.sleep(0.02)
            return FactVerdict(claim=claim, label=Label.supported)

        return verify

    async def run():
        await asyncio.gather(*(cache.ask(claim, verify_of(claim)) for claim in [*map(dose, range(15))] * 2))

    store = RedisStore(url, **PATIENT)
    cache = ClaimCache(store, LexicalEmbedder(), verifier_id="v1", corpus_hash="c1", prompt_version="p1")
    while not go.exists():
        time.sleep(0.005)
    asyncio.run(run())
    cache.close()


def test_two_processes_verify_each_claim_once(server, tmp_path):
    log, go = tmp_path / "verified", tmp_path / "go"
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=ask_all, args=(server.url, log, go)) for _ in range(2)]
    for worker in workers:
        worker.start()
    time.sleep(0.1)
    go.touch()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert Counter(log.read_text().split("\n")[:-1]) == Counter(map(dose, range(15)))


def test_a_dead_process_holds_a_claim_no_longer_than_its_lease(server):
    one, other, verifier = make_cache(server), make_cache(server, lease=0.3), Verifier()
    dead = RedisStore(server.url, lease=0.3, **PATIENT)
    dead.attach(one.scope)
    assert dead.acquire(digest(signature(dose(5)).flight_key), "token of one that died")
    start = time.monotonic()
    assert ask(other, verifier, dose(5)) == [Source.verified]
    assert 0.2 < time.monotonic() - start < 5
    assert other.stats.waits == 1


def test_only_the_holder_releases_and_renews(server):
    store = RedisStore(server.url, lease=0.2, **PATIENT)
    store.attach(make_cache(server).scope)
    assert store.acquire("f", "mine")
    store.release("f", "of another")
    assert not store.acquire("f", "of another")
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        store.renew("f", "mine")
        assert not store.acquire("f", "of another")
        time.sleep(0.02)
    store.release("f", "mine")
    assert store.acquire("f", "of another")


def test_killed_in_the_middle_and_started_again(server, caplog, tmp_path):
    """The run goes on, says so once, loses no verdict; the server that comes back empty gets all of them."""
    caplog.set_level(logging.INFO)
    cache, verifier = make_cache(server, SqliteStore(tmp_path / "local.sqlite")), Verifier()

    async def run():
        for i in range(60):
            if i == 20:
                server.kill()
            if i == 40:
                await asyncio.to_thread(server.start)
                await asyncio.sleep(0.25)  # longer than the longest wait
            group = (dose(i), dose(i), dose(max(0, i - 15)), f"Aspirin {i} mg can cause bleeding.")
            await asyncio.gather(*(cache.ask(claim, verifier.of(claim)) for claim in group))

    asyncio.run(run())
    doses = Counter(int(claim.split()[1]) for claim in verifier.asked.elements())
    assert doses == Counter(range(60)), "every claim once, in one of its two wordings, whatever happened to the server"
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "going on with the local store" in warnings[0]
    assert [record.message for record in caplog.records if "answers again" in record.message] != []
    assert server.claims() == {cache.key(claim) for claim in verifier.asked}
    assert ask(make_cache(server), verifier, *list(verifier.asked)[::10]) == [Source.l1] * 6


def test_verdicts_of_an_outage_outlive_the_process(server, tmp_path):
    verifier, path = Verifier(), tmp_path / "local.sqlite"
    server.kill()
    cache = make_cache(server, SqliteStore(path))
    ask(cache, verifier, dose(1), dose(2))
    cache.close()
    server.start()
    make_cache(server, SqliteStore(path)).close()
    assert server.claims() == {cache.key(dose(1)), cache.key(dose(2))}
    assert verifier.asked.total() == 2


def test_no_call_waits_for_a_server_that_does_not_answer(server):
    """A stopped process accepts connections and says nothing: the worst outage."""
    cache = make_cache(server, timeout=0.05, first_wait=5.0, last_wait=5.0)
    store, row = cache._store, np.eye(1, cache.scope.dim, dtype=np.float32)[0]
    verdict = FactVerdict(claim="x", label=Label.supported)
    server.process.send_signal(signal.SIGSTOP)
    took = []
    for call in (
        lambda: store.put("k", "x", verdict, row),
        lambda: store.get("k"),
        lambda: store.get("absent"),
        lambda: store.near(row, 3),
        lambda: store.acquire("f", "t"),
    ):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    server.process.send_signal(signal.SIGCONT)
    assert store.outages == 1
    assert sum(sorted(took)[:-1]) < 0.1, "one call pays one timeout, the others nothing"
    assert max(took) < 0.3
    assert store.get("k") == verdict


def test_starts_without_a_server(server, caplog):
    server.kill()
    cache, verifier = make_cache(server), Verifier()
    assert ask(cache, verifier, dose(1), dose(1)) == [Source.verified, Source.l1]
    assert sum("going on with the local store" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("where", ["redis://127.0.0.1:1/0", "claims.sqlite", None])
def test_store_of_a_place(where, tmp_path):
    shared = str(where).startswith("redis")
    path = tmp_path / "local.sqlite" if shared else where and tmp_path / where
    store = open_store(where, path) if shared else open_store(path)
    assert isinstance(store, RedisStore if shared else SqliteStore)
    assert (store.local if shared else store).path == path


def test_a_local_file_needs_a_server(tmp_path):
    with pytest.raises(ValueError, match="local: want no local file without a server"):
        open_store(tmp_path / "a", tmp_path / "b")


def test_timeout_out_of_range():
    with pytest.raises(ValueError, match="timeout: want seconds > 0"):
        RedisStore("redis://127.0.0.1:1/0", timeout=0)


def test_a_server_that_comes_back_with_an_old_snapshot_gets_the_rest_again(server):
    cache, other, verifier = make_cache(server), make_cache(server), Verifier()
    ask(cache, verifier, dose(0))
    with redis.Redis.from_url(server.url) as client:
        client.save()
    ask(cache, verifier, *map(dose, range(1, 6)))
    ask(other, verifier, *map(dose, range(6)))
    server.kill()
    server.start()
    time.sleep(0.2)
    ask(cache, verifier, *map(dose, range(6, 8)))
    assert cache._store.flush() == 0
    assert server.claims() == {cache.key(dose(i)) for i in range(8)}
    other._store.near(np.ones(LexicalEmbedder().dim, np.float32), 1)
    assert other._store.local.count() == 8


def test_what_cannot_be_read_is_left_out_and_said(server, caplog):
    cache, verifier = make_cache(server), Verifier()
    ask(cache, verifier, dose(0))
    prefix = cache._store._prefix
    with redis.Redis.from_url(server.url) as client, caplog.at_level(logging.WARNING):
        client.set(prefix + "v:bad", "{not json")
        client.rpush(prefix + "log", "bad")
        assert ask(cache, verifier, dose(1)) == [Source.verified]
    assert ask(make_cache(server), verifier, dose(0), dose(1)) == [Source.l1, Source.l1]
    assert "cannot be read" in caplog.text


def test_a_cancelled_worker_gives_its_lease_back(server):
    cache, verifier = make_cache(server), Verifier(seconds=0.01)
    acquire = cache._store.acquire

    def late(flight: str, token: str) -> bool:
        taken = acquire(flight, token)
        time.sleep(0.2)
        return taken

    async def run():
        cache._store.acquire = late
        asking = asyncio.create_task(cache.ask(dose(0), verifier.of(dose(0))))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.wait([asking])
        cache._store.acquire = acquire
        await asyncio.sleep(0.4)
        return await asyncio.wait_for(cache.ask(dose(0), verifier.of(dose(0))), 5)

    assert asyncio.run(run()).source == Source.verified
