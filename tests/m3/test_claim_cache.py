"""The claim cache in one process: levels, keys, failures, single flight, audit, persistence."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from m3.rewards.claim_cache import ClaimCache, Source, wilson
from m3.rewards.claim_stores import Scope, SqliteStore
from m3.rewards.fact_verdicts import FactVerdict, Label
from m3.text.embed import LexicalEmbedder

CLAIM = "Aspirin 500 mg may cause bleeding in adults."
REWORDED = "In adults, aspirin 0.5 g can cause haemorrhage"
OTHER = "Aspirin 50 mg may cause bleeding in adults."


def make_cache(store: SqliteStore | None = None, **changes) -> ClaimCache:
    fields = dict(verifier_id="v1", corpus_hash="c1", prompt_version="p1", audit_rate=0.0, threshold=0.3)
    return ClaimCache(SqliteStore() if store is None else store, LexicalEmbedder(), **{**fields, **changes})


class Verifier:
    """Counts what it was asked, after a moment in which others can ask."""

    def __init__(self, label: Label | Callable[[str], Label] = Label.supported, seconds: float = 0.005) -> None:
        self.label, self.seconds = label, seconds
        self.asked: Counter[str] = Counter()

    def of(self, claim: str):
        async def verify() -> FactVerdict:
            self.asked[claim] += 1
            await asyncio.sleep(self.seconds)
            label = self.label if isinstance(self.label, Label) else self.label(claim)
            return FactVerdict(claim=claim, label=label, evidence=("doc-1",), verifier="v1", searches=3)

        return verify


def ask(cache: ClaimCache, verifier: Verifier, *claims: str):
    async def run():
        return [await cache.ask(claim, verifier.of(claim)) for claim in claims]

    return asyncio.run(run())


# -- levels -----------------------------------------------------------------------------------------------------------
def test_first_verified_then_exact_then_equivalent():
    cache, verifier = make_cache(), Verifier(Label.refuted)
    first, exact, near, other = ask(cache, verifier, CLAIM, CLAIM.lower() + " ", REWORDED, OTHER)
    assert [one.source for one in (first, exact, near, other)] == ["verified", "l1", "l2", "verified"]
    assert near.matched == CLAIM and 0.3 <= near.similarity < 1
    assert near.verdict == FactVerdict(
        claim=REWORDED, label=Label.refuted, evidence=("doc-1",), verifier="v1", searches=0, cached=True
    )
    assert not first.verdict.cached and first.verdict.searches == 3
    assert (cache.stats.l1_hits, cache.stats.l2_hits, cache.stats.verified) == (1, 1, 2)
    assert cache.stats.hit_rate == 0.5
    assert cache.stats.refused == {"quantity": 1}


def test_without_guard_another_dose_is_a_hit():
    found = ask(make_cache(guard=False, threshold=0.7), Verifier(), CLAIM, OTHER)
    assert [one.source for one in found] == [Source.verified, Source.l2]


def test_nothing_below_the_threshold():
    found = ask(make_cache(threshold=0.99), Verifier(), CLAIM, REWORDED)
    assert [one.source for one in found] == [Source.verified, Source.verified]


def test_a_verifier_gets_a_plain_verdict():
    cache, verifier = make_cache(), Verifier()
    verdict = asyncio.run(cache.get_or_verify(CLAIM, verifier.of(CLAIM)))
    assert verdict == FactVerdict(claim=CLAIM, label=Label.supported, evidence=("doc-1",), verifier="v1", searches=3)


@pytest.mark.parametrize("changes", [{"verifier_id": "v2"}, {"corpus_hash": "c2"}, {"prompt_version": "p2"}])
def test_another_verifier_corpus_or_prompt_shares_nothing(tmp_path, changes):
    verifier = Verifier()
    one = make_cache(SqliteStore(tmp_path / "claims.sqlite"))
    ask(one, verifier, CLAIM)
    other = make_cache(SqliteStore(tmp_path / "claims.sqlite"), **changes)
    assert one.key(CLAIM) != other.key(CLAIM)
    assert [found.source for found in ask(other, verifier, CLAIM, REWORDED)] == [Source.verified, Source.l2]
    assert verifier.asked == {CLAIM: 2}


def test_parts_of_the_key_do_not_run_together():
    keys = {make_cache(verifier_id=a, corpus_hash=b).key(CLAIM) for a, b in (("ab", "c"), ("a", "bc"), ("abc", ""))}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"threshold": 1.5}, "threshold: want a cosine"), ({"audit_rate": -0.1}, "audit_rate: want a share")],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        make_cache(**changes)


def test_empty_claim():
    with pytest.raises(ValueError, match="claim: want a text"):
        ask(make_cache(), Verifier(), "  ")


# -- failures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [Label.timeout, Label.unreachable, Label.unparsable, Label.over_budget])
def test_what_is_no_verdict_is_not_kept(label):
    cache, verifier = make_cache(), Verifier(label)
    found = ask(cache, verifier, CLAIM, CLAIM)
    assert [one.verdict.label for one in found] == [label, label]
    assert verifier.asked[CLAIM] == 2 and cache.stats.failures == 2


def test_an_exception_is_raised_and_not_kept():
    cache = make_cache()

    async def broken() -> FactVerdict:
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        asyncio.run(cache.ask(CLAIM, broken))
    assert ask(cache, Verifier(), CLAIM)[0].source == Source.verified


def test_who_waited_for_a_failure_gets_it_too():
    """32 who wait for a verifier that times out do not wait 32 times."""
    cache, verifier = make_cache(), Verifier(Label.timeout)

    async def run():
        return await asyncio.gather(*(cache.ask(CLAIM, verifier.of(CLAIM)) for _ in range(32)))

    assert {one.verdict.label for one in asyncio.run(run())} == {Label.timeout}
    assert verifier.asked[CLAIM] == 1 and cache.stats.failures == 32


# -- one flight -------------------------------------------------------------------------------------------------------
def test_32_workers_verify_each_claim_once():
    """40 facts, each in two wordings, each asked four times, by 32 workers."""
    facts = range(40)
    texts = [f"Aspirin {i} mg may cause bleeding" for i in facts] + [
        f"Aspirin {i} mg can cause bleeding." for i in facts
    ]
    cache, verifier = make_cache(), Verifier()
    queue = texts * 4

    async def worker(number: int):
        for text in queue[number::32]:
            await cache.ask(text, verifier.of(text))

    async def run():
        await asyncio.gather(*(worker(number) for number in range(32)))

    asyncio.run(run())
    assert verifier.asked.total() == 40
    stats = cache.stats
    assert (stats.verified, stats.asked, stats.failures) == (40, 320, 0)
    assert stats.waits > 0


def test_cancelled_leader_leaves_the_claim_to_the_next():
    cache, verifier = make_cache(), Verifier(seconds=0.05)

    async def run():
        leader = asyncio.create_task(cache.ask(CLAIM, verifier.of(CLAIM)))
        await asyncio.sleep(0.02)
        follower = asyncio.create_task(cache.ask(CLAIM, verifier.of(CLAIM)))
        await asyncio.sleep(0.01)
        leader.cancel()
        return await follower

    found = asyncio.run(run())
    assert (found.source, found.waited, verifier.asked[CLAIM]) == (Source.verified, True, 2)


# -- audit ------------------------------------------------------------------------------------------------------------
def test_audit_counts_disagreements_and_keeps_the_new_verdict():
    verifier = Verifier(lambda claim: Label.refuted if claim == REWORDED else Label.supported)
    cache = make_cache(audit_rate=1.0)
    _, audited, again = ask(cache, verifier, CLAIM, REWORDED, REWORDED)
    assert (audited.source, audited.verdict.label, audited.matched) == (Source.audited, Label.refuted, CLAIM)
    assert (again.source, again.verdict.label) == (Source.l1, Label.refuted)
    assert (cache.stats.audits, cache.stats.false_hits, cache.stats.l2_hits) == (1, 1, 1)
    assert cache.stats.false_hit_rate() == wilson(1, 1)


def test_audited_share_is_seeded():
    def audits(seed: int) -> list[int]:
        cache, verifier = make_cache(audit_rate=0.3, seed=seed), Verifier(seconds=0)
        pairs = [text for i in range(60) for text in (f"Drug {i} mg may help", f"Drug {i} mg can help")]
        return [i for i, one in enumerate(ask(cache, verifier, *pairs)) if one.source == Source.audited]

    first = audits(1)
    assert 8 <= len(first) <= 30
    assert first == audits(1) != audits(2)


@pytest.mark.parametrize(
    ("events", "trials", "wanted"),
    [(0, 10, (0.0, 0.0, 0.27753)), (1, 10, (0.1, 0.01788, 0.40415)), (10, 10, (1.0, 0.72247, 1.0))],
)
def test_wilson(events, trials, wanted):
    """Against the table of Newcombe (1998) and the closed forms n / (n + z^2)."""
    assert wilson(events, trials) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize(("events", "trials"), [(0, 3), (7, 7), (0, 10**18), (10**18, 10**18)])
def test_wilson_holds_the_share_itself(events, trials):
    share, low, high = wilson(events, trials, z=1.0)
    assert 0 <= low <= share <= high <= 1


def test_wilson_of_nothing():
    with pytest.raises(ValueError, match="trials"):
        wilson(0, 0)


# -- store ------------------------------------------------------------------------------------------------------------
def test_reopened_store_knows_both_levels(tmp_path):
    path = tmp_path / "deep" / "claims.sqlite"
    cache, verifier = make_cache(SqliteStore(path)), Verifier()
    ask(cache, verifier, CLAIM)
    cache.close()
    found = ask(make_cache(SqliteStore(path)), verifier, CLAIM, REWORDED)
    assert [one.source for one in found] == [Source.l1, Source.l2]
    assert verifier.asked == {CLAIM: 1}


def test_store_sees_what_another_wrote_to_the_file(tmp_path):
    one, other = (make_cache(SqliteStore(tmp_path / "claims.sqlite")) for _ in range(2))
    ask(one, Verifier(), CLAIM)
    assert [found.source for found in ask(other, Verifier(), REWORDED, CLAIM)] == [Source.l2, Source.l1]


def test_rows_of_another_embedder_are_not_searched(tmp_path):
    ask(make_cache(SqliteStore(tmp_path / "claims.sqlite")), Verifier(), CLAIM)
    store = SqliteStore(tmp_path / "claims.sqlite")
    other = ClaimCache(store, LexicalEmbedder(dim=64), verifier_id="v1", corpus_hash="c1", prompt_version="p1")
    assert [one.source for one in ask(other, Verifier(), REWORDED, CLAIM)] == [Source.verified, Source.l1]


def test_nearest_are_those_of_a_full_search():
    store, rng = SqliteStore(), np.random.default_rng(3)
    scope = Scope(verifier="v", corpus_hash="c", prompt_version="p", embedder="e", dim=16)
    store.attach(scope)
    rows = rng.normal(size=(300, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for i, row in enumerate(rows):
        store.put(f"k{i}", f"claim {i}", FactVerdict(claim=f"claim {i}", label=Label.supported), row)
    found = store.near(rows[7], 5)
    wanted = np.argsort(-(rows @ rows[7]))[:5]
    assert [one.claim for one in found] == [f"claim {i}" for i in wanted]
    assert [one.similarity for one in found] == pytest.approx((rows @ rows[7])[wanted].tolist(), abs=1e-5)
    assert store.count() == 300


def test_the_first_verdict_of_a_key_stays():
    store = SqliteStore()
    store.attach(Scope(verifier="v", corpus_hash="c", prompt_version="p", embedder="e", dim=2))
    first = FactVerdict(claim="x", label=Label.supported)
    for verdict in (first, dataclasses.replace(first, label=Label.refuted)):
        store.put("k", "x", verdict, np.array([1.0, 0.0], np.float32))
    assert store.get("k") == first


def test_store_refuses_what_it_cannot_serve():
    store = SqliteStore()
    with pytest.raises(ValueError, match="attach"):
        store.get("k")
    scope = Scope(verifier="v", corpus_hash="c", prompt_version="p", embedder="e", dim=2)
    store.attach(scope)
    with pytest.raises(ValueError, match="one scope a store"):
        store.attach(scope)
    with pytest.raises(ValueError, match=r"vector: want \(2,\)"):
        store.near(np.zeros(3, np.float32), 1)


def test_an_unwritable_store_is_an_error(tmp_path):
    (tmp_path / "claims.sqlite").write_text("this is no database, and long enough to be one by its size alone" * 20)
    with pytest.raises(sqlite3.DatabaseError):
        SqliteStore(tmp_path / "claims.sqlite")


def test_a_full_disk_costs_no_verdict(tmp_path):
    store = SqliteStore(tmp_path / "claims.db")
    cache, verifier = make_cache(store), Verifier(seconds=0.05)
    ask(cache, verifier, CLAIM)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    long = "Ibuprofen " + "may cause nausea in adults " * 400

    async def run():
        return await asyncio.gather(*(cache.ask(long, verifier.of(long)) for _ in range(32)))

    assert {found.verdict.label for found in asyncio.run(run())} == {Label.supported}
    assert verifier.asked[long] == 1
    assert cache.stats.unkept == 1 and cache.stats.asked == 33


@pytest.mark.parametrize("label", [Label.timeout, None])
def test_a_failed_audit_leaves_the_hit(label):
    cache = make_cache(audit_rate=1.0)
    ask(cache, Verifier(Label.refuted), CLAIM)

    async def broken() -> FactVerdict:
        if label is None:
            raise RuntimeError("down")
        return FactVerdict(claim=REWORDED, label=label)

    found = asyncio.run(cache.ask(REWORDED, broken))
    assert (found.source, found.verdict.label) == (Source.l2, Label.refuted)
    assert (cache.stats.l2_hits, cache.stats.audits, cache.stats.failures) == (1, 0, 0)
