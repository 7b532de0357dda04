"""The pages of the paged cache: who owns which, and which hold a beginning that another sequence can share.

A page holds the keys and values of ``page_size`` consecutive tokens, in every layer. This file counts pages; their
memory is the runner's. A full page is published under (page before it, its tokens): the page before it stands for all
tokens further up, so equal keys mean equal beginnings, token by token, and no hash is trusted. Lookups, growth and
release cost O(1) a page.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from m3kernels.checks import refuse

# The page before a page, or (salt,) where there is none; and the tokens of the page.
Key = tuple[Hashable, tuple[int, ...]]

_PRIVATE = -1  # the generation of a page that is never published


class OutOfPages(RuntimeError):  # noqa: N818
    """More pages were asked for than are free or cached. Nothing was taken."""


class PagePool:
    """Pages 0..num_pages-1, counted.

    Invariants, verified by check():
    - A page is in exactly one place: free (no owner, not published), cached (no owner, published), or used (owners).
    - A published page has one key, and a key has one page. The page before it is published too.
    - Who owns a published page owns all pages before it. So a page without owners has none after it that is owned, and
      everything free or cached can be had: ``available`` is a promise.
    - Cached pages are ordered so that a page comes after all cached pages that follow it in a sequence: the first is a
      leaf, and the one least recently used. It is evicted first.
    - Pages never change their content or number while they are owned: sharing copies nothing and moves nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise refuse("PagePool", "num_pages", "at least 1", num_pages)
        if page_size < 1:
            raise refuse("PagePool", "page_size", "at least 1", page_size)
        self.num_pages = num_pages
        self.page_size = page_size
        self._owners = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page used last is warm
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._key: dict[int, Key] = {}  # of published pages
        self._page: dict[Key, int] = {}
        self._followers = [0] * num_pages  # published pages whose key names this page
        self._now = 0  # the generation: rises with clear_prefixes()
        self._generation = [0] * num_pages  # in which a page was allocated

    # -- counts -------------------------------------------------------------------------------------------------------
    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.num_pages - self.available

    @property
    def available(self) -> int:
        """Pages that allocate() can give: free ones, then cached ones."""
        return len(self._free) + len(self._cached)

    def pages_for(self, slots: int) -> int:
        """Pages that hold so many slots."""
        return -(-slots // self.page_size)

    # -- ownership ----------------------------------------------------------------------------------------------------
    def allocate(self, count: int) -> list[int]:
        """Pages of one owner, content undefined. Raises OutOfPages, and takes nothing, where fewer are available."""
        if count < 0:
            raise refuse("PagePool.allocate", "count", "at least 0", count)
        if count > self.available:
            raise OutOfPages(f"PagePool.allocate: count: want at most {self.available} of {self}; got {count}")
        while len(self._free) < count:
            page, _ = self._cached.popitem(last=False)
            self._unpublish(page)
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
            self._generation[page] = self._now
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one ownership of each page: all pages of a sequence, or the last ones, in the order of the sequence.

        Published pages stay findable until they are evicted.
        """
        for page in pages:
            if not 0 <= page < self.num_pages or not self._owners[page]:
                raise refuse("PagePool.release", "pages", "pages in use", f"page {page}")
        if len(set(pages)) != len(pages):
            raise refuse("PagePool.release", "pages", "each page once", str(list(pages)))
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                if page in self._key:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    # -- prefixes -----------------------------------------------------------------------------------------------------
    def page_key(self, tokens: Sequence[int], pages: Sequence[int], index: int, salt: Hashable = None) -> Key:
        """The key of page ``index`` of a sequence whose pages before it are ``pages[:index]``."""
        before = pages[index - 1] if index else (salt,)
        return before, tuple(tokens[index * self.page_size : (index + 1) * self.page_size])

    def match(self, tokens: Sequence[int], salt: Hashable = None) -> list[int]:
        """The published pages of the longest beginning of ``tokens``, whole pages only. The caller owns them."""
        pages: list[int] = []
        for index in range(len(tokens) // self.page_size):
            page = self._page.get(self.page_key(tokens, pages, index, salt))
            if page is None:
                break
            pages.append(page)
        for page in pages:
            self._owners[page] += 1
            if self._owners[page] == 1:
                del self._cached[page]
        return pages

    def publish(self, tokens: Sequence[int], pages: Sequence[int], upto: int, salt: Hashable = None) -> None:
        """Makes the full pages of ``tokens[:upto]``, which must be computed, findable. Call again as ``upto`` grows.

        A page whose key another page has stays private, and so do all after it: a sequence owns what it is found by.
        So do pages that are older than the last clear_prefixes(), and all after them.
        """
        full = min(upto, len(tokens)) // self.page_size
        first = full
        while first and pages[first - 1] not in self._key and self._generation[pages[first - 1]] == self._now:
            first -= 1
        private = first > 0 and pages[first - 1] not in self._key
        for index in range(first, full):
            page = pages[index]
            key = self.page_key(tokens, pages, index, salt)
            private = private or key in self._page
            if private:
                self._generation[page] = _PRIVATE
                continue
            self._key[page] = key
            self._page[key] = page
            if index:
                self._followers[pages[index - 1]] += 1

    def clear_prefixes(self) -> None:
        """Forgets all published pages: the weights have changed. Owners keep theirs, which stay private from now on."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._key.clear()
        self._page.clear()
        self._followers = [0] * self.num_pages
        self._now += 1

    def _unpublish(self, page: int) -> None:
        assert not self._followers[page], f"page {page} is evicted before a page that follows it"
        key = self._key.pop(page)
        del self._page[key]
        if isinstance(key[0], int):
            self._followers[key[0]] -= 1

    # -- accounting ---------------------------------------------------------------------------------------------------
    def check(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Raises AssertionError, naming the page, where an invariant is broken. ``owners``: the pages of each owner."""
        places = Counter(self._free)
        places.update(self._cached.keys())
        places.update(page for page in range(self.num_pages) if self._owners[page])
        for page in range(self.num_pages):
            assert places[page] == 1, f"page {page} is in {places[page]} places"
            assert self._owners[page] >= 0, f"page {page} has {self._owners[page]} owners"
        assert len(places) == self.num_pages, f"page {max(places)} does not exist"
        for page in self._free:
            assert page not in self._key, f"page {page} is free and published"
        for page in self._cached:
            assert page in self._key, f"page {page} is cached and not published"
        followers: Counter[int] = Counter()
        order = {page: at for at, page in enumerate(self._cached)}
        assert len(self._key) == len(self._page), f"{len(self._key)} published pages have {len(self._page)} keys"
        for page, key in self._key.items():
            assert self._page.get(key) == page, f"page {page} has the key of page {self._page.get(key)}"
            assert len(key[1]) == self.page_size, f"page {page} is published with {len(key[1])} tokens"
            before = key[0]
            if isinstance(before, int):
                followers[before] += 1
                assert before in self._key, f"page {page} follows page {before}, which is not published"
                assert self._owners[before] >= self._owners[page], f"page {page} has owners that page {before} lacks"
                assert before not in order or order.get(page, self.num_pages) < order[before], (
                    f"page {before} is evicted before page {page}, which follows it"
                )
        for page in range(self.num_pages):
            assert followers[page] == self._followers[page], f"page {page} counts {self._followers[page]} followers"
        if owners is not None:
            held = Counter(page for pages in owners for page in pages)
            for page in range(self.num_pages):
                assert held[page] == self._owners[page], (
                    f"page {page} has {self._owners[page]} owners, not {held[page]}"
                )

    def __str__(self) -> str:
        return f"{self.num_pages} pages ({self.used} used, {self.cached} cached, {self.free} free)"
