"""The pool of pages: counts, prefixes, eviction, every error, and a random machine that checks the accounting."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m3.engine.kv_cache import OutOfPages, PagePool


def refused(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check()
    return pool.used, pool.cached, pool.free


def computed(pool: PagePool, tokens: list[int], *, salt: str | None = None) -> list[int]:
    """Pages of a sequence whose keys are all computed: found where they can be, and published."""
    pages = pool.match(tokens, salt)
    pages += pool.allocate(pool.pages_for(len(tokens)) - len(pages))
    pool.publish(tokens, pages, len(tokens), salt)
    return pages


# -- ownership --------------------------------------------------------------------------------------------------------
def test_every_page_is_given_once():
    pool = PagePool(5, 4)
    assert sorted(pool.allocate(2) + pool.allocate(0) + pool.allocate(3)) == [0, 1, 2, 3, 4]
    assert counts(pool) == (5, 0, 0)


def test_a_released_page_is_given_again_first():
    pool = PagePool(5, 4)
    pages = pool.allocate(3)
    pool.release(pages[2:])
    assert pool.allocate(1) == pages[2:]
    assert counts(pool) == (3, 0, 2)


def test_out_of_pages_takes_nothing():
    pool = PagePool(3, 4)
    pool.release(computed(pool, [1, 2, 3, 4]))
    pool.allocate(1)
    with pytest.raises(OutOfPages, match=re.escape("want at most 2 of 3 pages (1 used, 1 cached, 1 free); got 3")):
        pool.allocate(3)
    assert counts(pool) == (1, 1, 1)


SLOTS = {"none": (0, 0), "one": (1, 1), "full": (4, 1), "one_more": (5, 2), "many": (4001, 1001)}


@pytest.mark.parametrize(("slots", "pages"), SLOTS.values(), ids=SLOTS)
def test_pages_for_slots(slots, pages):
    assert PagePool(1, 4).pages_for(slots) == pages


# -- prefixes ---------------------------------------------------------------------------------------------------------
def test_a_beginning_is_shared_in_full_pages():
    pool = PagePool(8, 4)
    first = computed(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]) == first[:2]
    assert pool.match([1, 2, 3, 4, 5, 6, 7]) == first[:1]
    assert counts(pool) == (3, 0, 5)
    pool.check(owners=[first, first[:2], first[:1]])


NOT_SHARED = {
    "empty": [],
    "less_than_a_page": [1, 2, 3],
    "last_token_of_the_page_differs": [1, 2, 3, 5, 5, 6, 7, 8],
    "second_page_first": [5, 6, 7, 8],
    "shifted": [0, 1, 2, 3, 4, 5, 6, 7],
}


@pytest.mark.parametrize("tokens", NOT_SHARED.values(), ids=NOT_SHARED)
def test_what_differs_is_not_shared(tokens):
    pool = PagePool(8, 4)
    computed(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.match(tokens) == []
    assert counts(pool) == (2, 0, 6)


def test_equal_pages_after_different_beginnings_are_different():
    pool = PagePool(8, 2)
    one, two = computed(pool, [1, 1, 7, 7]), computed(pool, [2, 2, 7, 7])
    assert pool.match([1, 1, 7, 7]) == one
    assert pool.match([2, 2, 7, 7]) == two
    assert not set(one) & set(two)


def test_tokens_of_equal_hash_are_not_taken_for_each_other():
    assert hash((-1, 5)) == hash((-2, 5))
    pool = PagePool(4, 2)
    computed(pool, [-1, 5])
    assert pool.match([-2, 5]) == []


def test_salts_do_not_share():
    pool = PagePool(8, 2)
    plain, salted = computed(pool, [1, 2]), computed(pool, [1, 2], salt="adapter")
    assert pool.match([1, 2]) == plain
    assert pool.match([1, 2], "adapter") == salted
    assert pool.match([1, 2], "another") == []


def test_a_page_is_found_from_the_moment_that_it_is_full():
    pool = PagePool(4, 4)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    pages = pool.allocate(2)
    pool.publish(tokens, pages, 3)
    assert pool.match(tokens) == []
    pool.publish(tokens, pages, 4)
    assert pool.match(tokens) == pages[:1]
    pool.publish(tokens, pages, 8)
    assert pool.match(tokens) == pages
    pool.check(owners=[pages, pages[:1], pages])


def test_released_pages_wait_to_be_found():
    pool = PagePool(4, 2)
    pages = computed(pool, [1, 2, 3, 4, 5])
    pool.release(pages)
    assert counts(pool) == (0, 2, 2)
    assert pool.match([1, 2, 3, 4]) == pages[:2]
    assert counts(pool) == (2, 0, 2)


def test_a_copy_stays_private_and_so_does_what_follows_it():
    pool = PagePool(8, 2)
    original, copy = pool.allocate(1), pool.allocate(2)
    pool.publish([1, 2], original, 2)
    pool.publish([1, 2, 3, 4], copy, 2)
    pool.publish([1, 2, 3, 4], copy, 4)
    assert pool.match([1, 2, 3, 4]) == original
    pool.release(original)
    pool.release(copy)
    assert counts(pool) == (1, 0, 7)


# -- eviction ---------------------------------------------------------------------------------------------------------
def test_free_pages_go_before_cached_ones():
    pool = PagePool(4, 2)
    pages = computed(pool, [1, 2])
    pool.release(pages)
    pool.allocate(3)
    assert pool.match([1, 2]) == pages


def test_the_end_of_a_sequence_is_evicted_before_its_beginning():
    pool = PagePool(3, 2)
    pages = computed(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    pool.release(pool.allocate(1))
    assert pool.match([1, 2, 3, 4, 5, 6]) == pages[:2]
    pool.release(pages[:2])
    pool.release(pool.allocate(2))
    assert pool.match([1, 2, 3, 4, 5, 6]) == pages[:1]


def test_the_least_recently_used_sequence_is_evicted_first():
    pool = PagePool(4, 2)
    old, new = computed(pool, [1, 1, 1, 1]), computed(pool, [2, 2, 2, 2])
    pool.release(old)
    pool.release(new)
    pool.release(pool.match([1, 1, 1, 1]))  # used again
    pool.allocate(2)
    assert pool.match([2, 2]) == []
    assert pool.match([1, 1, 1, 1]) == old


def test_a_branch_is_evicted_before_the_trunk_that_outlived_it():
    pool = PagePool(4, 2)
    left = computed(pool, [1, 1, 2, 2])
    right = computed(pool, [1, 1, 3, 3])
    pool.release(left)
    pool.release(right)
    assert counts(pool) == (0, 3, 1)
    pool.allocate(2)
    assert pool.match([1, 1, 2, 2]) == left[:1]
    pool.release(left[:1])
    assert pool.match([1, 1, 3, 3]) == right
    pool.check(owners=[right, [page for page in range(4) if page not in right]])


def test_everything_cached_can_be_had():
    pool = PagePool(6, 2)
    pool.release(computed(pool, [1, 1, 2, 2, 3, 3]))
    pool.release(computed(pool, [1, 1, 4, 4, 5, 5]))
    assert pool.available == 6
    assert sorted(pool.allocate(6)) == [0, 1, 2, 3, 4, 5]
    assert pool.match([1, 1]) == []


# -- new weights ------------------------------------------------------------------------------------------------------
def test_nothing_is_found_after_clear_prefixes():
    pool = PagePool(6, 2)
    pool.release(computed(pool, [1, 2, 3, 4]))
    held = computed(pool, [5, 6])
    pool.clear_prefixes()
    assert pool.match([1, 2, 3, 4]) == pool.match([5, 6]) == []
    assert counts(pool) == (1, 0, 5)
    pool.release(held)
    assert counts(pool) == (0, 0, 6)


def test_pages_of_old_weights_are_never_published_nor_what_follows_them():
    pool = PagePool(6, 2)
    pages = computed(pool, [1, 2])
    pool.clear_prefixes()
    pages += pool.allocate(2)
    pool.publish([1, 2, 3, 4, 5, 6], pages, 4)
    pool.publish([1, 2, 3, 4, 5, 6], pages, 6)
    assert pool.match([1, 2, 3, 4, 5, 6]) == []
    pool.release(pages)
    assert counts(pool) == (0, 0, 6)


def test_a_page_used_again_after_clear_prefixes_is_published():
    pool = PagePool(1, 2)
    pool.release(computed(pool, [1, 2]))
    pool.clear_prefixes()
    pool.release(computed(pool, [1, 2]))
    assert pool.match([1, 2]) == [0]


# -- errors -----------------------------------------------------------------------------------------------------------
def test_a_pool_without_pages_is_refused():
    with refused("PagePool: num_pages: want at least 1; got 0"):
        PagePool(0, 16)


def test_pages_without_slots_are_refused():
    with refused("PagePool: page_size: want at least 1; got 0"):
        PagePool(4, 0)


def test_a_negative_count_is_refused():
    with refused("PagePool.allocate: count: want at least 0; got -1"):
        PagePool(4, 16).allocate(-1)


RELEASED = {
    "twice": ([1, 2], "want pages in use; got page 2"),
    "negative": ([-1], "want pages in use; got page -1"),
    "beyond": ([4], "want pages in use; got page 4"),
    "repeated": ([0, 1, 0], "want each page once; got [0, 1, 0]"),
}


@pytest.mark.parametrize(("pages", "message"), RELEASED.values(), ids=RELEASED)
def test_a_wrong_release_is_refused_and_changes_nothing(pages, message):
    pool = PagePool(4, 16)
    assert pool.allocate(2) == [0, 1]
    with refused(f"PagePool.release: pages: {message}"):
        pool.release(pages)
    pool.check(owners=[[0, 1]])


# -- check() sees what it is for --------------------------------------------------------------------------------------
BROKEN = {
    "leaked": (lambda pool: pool._free.remove(3), "page 3 is in 0 places"),
    "free_twice": (lambda pool: pool._free.append(3), "page 3 is in 2 places"),
    "free_and_used": (lambda pool: pool._free.append(0), "page 0 is in 2 places"),
    "unknown": (lambda pool: pool._free.append(9), "page 9 does not exist"),
    "cached_and_not_published": (lambda pool: pool._cached.update({pool._free.pop(): None}), "and not published"),
    "key_lost": (lambda pool: pool._page.clear(), "2 published pages have 0 keys"),
    "order": (lambda pool: (pool.release([0, 1]), pool._cached.move_to_end(1)), "page 0 is evicted before page 1"),
    "follower": (lambda pool: pool._followers.__setitem__(1, 2), "page 1 counts 2 followers"),
    "half": (lambda pool: pool.release([0]), "page 1 has owners that page 0 lacks"),
}


@pytest.mark.parametrize(("harm", "message"), BROKEN.values(), ids=BROKEN)
def test_check_names_the_broken_page(harm, message):
    pool = PagePool(6, 2)
    assert computed(pool, [1, 2, 3, 4]) == [0, 1]
    pool.check(owners=[[0, 1]])
    harm(pool)
    with pytest.raises(AssertionError, match=re.escape(message)):
        pool.check()


def test_check_compares_with_the_owners():
    pool = PagePool(6, 2)
    pages = pool.allocate(2)
    with pytest.raises(AssertionError, match=f"page {pages[1]} has 1 owners, not 0"):
        pool.check(owners=[pages[:1]])


# -- a random machine -------------------------------------------------------------------------------------------------
PAGE = 2
TOKENS = st.lists(st.integers(0, 1), max_size=9)  # few tokens: many equal beginnings


class Machine(RuleBasedStateMachine):
    """Sequences that begin, grow, publish and end on a small pool; what each page holds is remembered apart."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[tuple[list[int], list[int]]] = []
        self.written: dict[int, tuple[int, ...]] = {}  # by page: all tokens up to its end

    @initialize(num_pages=st.integers(1, 9))
    def begin(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages, PAGE)

    def compute(self, tokens: list[int], pages: list[int], first: int) -> None:
        for index in range(first, len(pages)):
            self.written[pages[index]] = tuple(tokens[: (index + 1) * PAGE])

    @rule(tokens=TOKENS, publish=st.booleans())
    def add(self, tokens: list[int], publish: bool) -> None:
        pages = self.pool.match(tokens)
        for index, page in enumerate(pages):
            assert self.written[page] == tuple(tokens[: (index + 1) * PAGE])
        found = len(pages)
        missing = self.pool.pages_for(len(tokens)) - found
        if missing > self.pool.available:
            with pytest.raises(OutOfPages):
                self.pool.allocate(missing)
            self.pool.release(pages)
            return
        pages = pages + self.pool.allocate(missing)
        self.compute(tokens, pages, found)
        if publish:
            self.pool.publish(tokens, pages, len(tokens))
        self.sequences.append((list(tokens), pages))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data, more: list[int]) -> None:
        tokens, pages = data.draw(st.sampled_from(self.sequences))
        full = len(tokens) // PAGE
        missing = self.pool.pages_for(len(tokens) + len(more)) - len(pages)
        if missing <= self.pool.available:
            tokens += more
            pages += self.pool.allocate(missing)
            self.compute(tokens, pages, full)
            self.pool.publish(tokens, pages, len(tokens))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(index)[1])

    @rule()
    def clear(self) -> None:
        self.pool.clear_prefixes()
        assert self.pool.match([0, 0]) == self.pool.match([1, 1]) == []
        assert self.pool.cached == 0

    @invariant()
    def accounted(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(owners=[pages for _, pages in self.sequences])
            held = Counter(page for _, pages in self.sequences for page in pages)
            assert self.pool.used == len(held)
            assert self.pool.used + self.pool.cached + self.pool.free == self.pool.num_pages

    def teardown(self) -> None:
        for _, pages in self.sequences:
            self.pool.release(pages)
        if hasattr(self, "pool"):
            self.pool.check(owners=[])
            assert len(self.pool.allocate(self.pool.num_pages)) == self.pool.num_pages


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestMachine = Machine.TestCase
