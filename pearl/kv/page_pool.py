"""Reference-counted pages, and the prefix cache that finds their content again.

Each page is in exactly one state:

    in use      refcount > 0     held by sequences, with or without a prefix key
    evictable   refcount = 0     carries a prefix key: it can be found again, and is reused last, oldest first
    free        refcount = 0     carries no key
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple


class OutOfPages(Exception):
    """More pages were asked for than are free or evictable. Nothing has changed."""


class PrefixKey:
    """The whole token prefix that ends with one full page. Immutable.

    ``tokens`` are those of the page itself, ``parent`` is the key of the page before it (None: this is the first).
    Keys are equal exactly if all tokens of both prefixes are equal; the chained hash only says where to look, so a
    collision costs time and never a wrong page. A comparison ends at the first ancestor that both keys share, hence
    the pool hands out one canonical key for each cached prefix: children of it compare in O(page).
    """

    __slots__ = ("_hash", "parent", "tokens")

    def __init__(self, parent: PrefixKey | None, tokens: tuple[int, ...]) -> None:
        self.parent = parent
        self.tokens = tokens
        self._hash = hash((parent, tokens))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrefixKey):
            return NotImplemented
        mine: PrefixKey | None = self
        theirs: PrefixKey | None = other
        while mine is not theirs:
            if mine is None or theirs is None or mine._hash != theirs._hash or mine.tokens != theirs.tokens:
                return False
            mine, theirs = mine.parent, theirs.parent
        return True


class CachedPage(NamedTuple):
    """A page in the prefix cache, under its canonical key."""

    page: int
    key: PrefixKey


class PagePool:
    """Pages 0..num_pages-1 of ``page_size`` tokens each. Every method but ``check_integrity`` is O(1)."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Raises ValueError unless both numbers are at least 1."""
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {num_pages} pages of {page_size} tokens cannot hold anything")
        self.num_pages = num_pages
        self.page_size = page_size
        self._refcounts = [0] * num_pages
        self._free = list(reversed(range(num_pages)))  # a stack: what was just released is still in the caches
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cache: dict[PrefixKey, CachedPage] = {}
        self._cached: list[CachedPage | None] = [None] * num_pages  # the page's entry in _cache
        self._evictions = 0

    @property
    def num_free_pages(self) -> int:
        """Pages that ``allocate`` can still give out: free + evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def evictions(self) -> int:
        """How many cached pages were given up for new content so far."""
        return self._evictions

    def allocate(self) -> int:
        """A page with refcount 1 and no key; its content is undefined. Raises OutOfPages."""
        if self._free:
            page = self._free.pop()
        elif self._evictable:
            page, _ = self._evictable.popitem(last=False)
            self.uncache(page)
            self._evictions += 1
        else:
            raise OutOfPages(f"all {self.num_pages} pages are in use")
        self._refcounts[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One holder more. Raises ValueError if the page is free: its content belongs to nobody."""
        if self._refcounts[page] == 0:
            if self._cached[page] is None:
                raise ValueError(f"page {page} is free: allocate it")
            del self._evictable[page]
        self._refcounts[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one leaves the page evictable if it is cached, else free.

        Raises ValueError if nobody holds the page.
        """
        if self._refcounts[page] == 0:
            raise ValueError(f"page {page} is released more often than it is held")
        self._refcounts[page] -= 1
        if self._refcounts[page] == 0:
            if self._cached[page] is None:
                self._free.append(page)
            else:
                self._evictable[page] = None

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds the page, so that none of them may write to it."""
        return self._refcounts[page] > 1

    def lookup(self, key: PrefixKey) -> CachedPage | None:
        """The page that holds exactly this prefix. The caller must ``retain`` it before anything is allocated."""
        return self._cache.get(key)

    def key_of(self, page: int) -> PrefixKey | None:
        """The prefix under which this very page is cached."""
        entry = self._cached[page]
        return None if entry is None else entry.key

    def cache(self, page: int, key: PrefixKey) -> PrefixKey:
        """Make a held page findable under ``key``; returns the canonical key of that prefix.

        If another page holds the same prefix already, that one stays in the cache and this one stays as it is.
        Raises ValueError if the page is cached as another prefix: it was overwritten without ``uncache``.
        """
        own = self._cached[page]
        if own is not None and own.key != key:
            raise ValueError(f"page {page} is cached as another prefix: it was written to without being reserved")
        entry = own or self._cache.get(key)
        if entry is None:
            entry = CachedPage(page, key)
            self._cache[key] = self._cached[page] = entry
        return entry.key

    def uncache(self, page: int) -> None:
        """Take the page, which is about to be overwritten, out of the prefix cache, if it is there.

        Meant for pages in use: an evictable page would be neither free nor evictable afterwards.
        """
        entry = self._cached[page]
        if entry is not None:
            del self._cache[entry.key]
            self._cached[page] = None

    def check_integrity(self, holders: Mapping[int, int]) -> None:
        """Raise AssertionError if an invariant is broken. ``holders``: how many sequences hold each page in use."""
        free, evictable = set(self._free), set(self._evictable)
        in_use = {page for page, count in enumerate(self._refcounts) if count > 0}
        for page, count in enumerate(self._refcounts):
            held = holders.get(page, 0)
            assert count == held, f"page {page} has refcount {count}, but {held} sequences hold it"
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & evictable, f"pages {free & evictable} are both free and evictable"
        assert not in_use & (free | evictable), f"pages {in_use & (free | evictable)} are in use and on offer"
        lost = set(range(self.num_pages)) - free - evictable - in_use
        assert not lost, f"pages {lost} are neither free, evictable nor in use"
        self._check_cache(free, evictable)

    def _check_cache(self, free: set[int], evictable: set[int]) -> None:
        for page in free:
            assert self._cached[page] is None, f"page {page} is free, but in the prefix cache"
        for page in evictable:
            assert self._cached[page] is not None, f"page {page} is evictable, but not in the prefix cache"
        assert len(self._cache) == self.num_pages - self._cached.count(None), (
            "a page is in the prefix cache under two keys, or keeps the key of an entry that is gone"
        )
        for key, entry in self._cache.items():
            assert key is entry.key, f"page {entry.page} is not in the prefix cache under its canonical key"
            assert self._cached[entry.page] is entry, f"page {entry.page} has lost its prefix key"
            assert len(key.tokens) == self.page_size, f"page {entry.page} is cached with {len(key.tokens)} tokens"
            chained = PrefixKey(key.parent, key.tokens)
            assert chained == key, f"the hash of page {entry.page} does not follow from its parent and its tokens"
