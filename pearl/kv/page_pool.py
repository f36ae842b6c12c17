"""Physical pages: reference counts, the free list, and the table of cached prefixes."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class OutOfPages(Exception):
    """Fewer pages are free or evictable than were asked for; nothing was changed."""


class PageKey(NamedTuple):
    """What a cached page holds: its tokens, after the page that ``parent`` identifies.

    ``parent`` is the serial number of the preceding cached content (0 at the start of a sequence). Serial numbers are
    never used again, so equal keys mean equal tokens all the way back; there is nothing to collide.
    """

    parent: int
    tokens: tuple[int, ...]


@dataclass
class _Page:
    references: int = 0
    key: PageKey | None = None  # set while the page can be found in the prefix cache
    serial: int = 0  # of its content, for the keys of the pages that follow


class PagePool:
    """Pages 0..num_pages-1. Every page is in exactly one state:

    * in use: references > 0;
    * free: references == 0 and no key, in the free list;
    * evictable: references == 0 and a key; it can be found again until it is needed, oldest first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs at least one page of one slot, not {num_pages} of {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self._pages = [_Page() for _ in range(num_pages)]
        self._free: deque[int] = deque(range(num_pages))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[PageKey, int] = {}
        self._next_serial = 1

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` could hand out now: free or evictable."""
        return len(self._free) + len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages with one reference each; evicts cached pages last. Raises OutOfPages."""
        if count > self.num_free:
            raise OutOfPages(f"{count} pages are needed, {self.num_free} of {self.num_pages} are free")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._evictable.popitem(last=False)
                self.forget(page)
            self._pages[page].references = 1
            pages.append(page)
        return pages

    def share(self, page: int) -> None:
        """One more reference; revives an evictable page."""
        if self._pages[page].references == 0:
            del self._evictable[page]  # a free page cannot be shared: nothing refers to it
        self._pages[page].references += 1

    def release(self, page: int) -> None:
        entry = self._pages[page]
        assert entry.references > 0, f"page {page} is released more often than it was taken"
        entry.references -= 1
        if entry.references == 0:
            if entry.key is None:
                self._free.append(page)
            else:
                self._evictable[page] = None

    def is_writable(self, page: int) -> bool:
        """Whether its only owner may write into it: nobody shares it, and nobody could find it."""
        entry = self._pages[page]
        return entry.references == 1 and entry.key is None

    def is_shared(self, page: int) -> bool:
        return self._pages[page].references > 1

    def forget(self, page: int) -> None:
        """Remove the page from the prefix cache, because its content is about to change."""
        entry = self._pages[page]
        if entry.key is not None:
            del self._cached[entry.key]
            entry.key, entry.serial = None, 0

    def publish(self, page: int, key: PageKey) -> int:
        """Make a page's content findable; returns the serial for the keys that follow.

        Where equal content is cached already, that page's serial is returned and this page stays private.
        """
        known = self._cached.get(key)
        if known is not None:
            return self._pages[known].serial
        entry = self._pages[page]
        assert entry.key is None, f"page {page} would be cached twice"
        entry.key, entry.serial = key, self._next_serial
        self._next_serial += 1
        self._cached[key] = page
        return entry.serial

    def find(self, key: PageKey) -> tuple[int, int] | None:
        """(page, serial) of cached content, or None."""
        page = self._cached.get(key)
        return None if page is None else (page, self._pages[page].serial)

    def check_integrity(self, references: Mapping[int, int]) -> None:
        """AssertionError if any invariant is broken. ``references``: how many sequences hold each page."""
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a page is in the free list twice"
        for page, entry in enumerate(self._pages):
            held = references.get(page, 0)
            assert entry.references == held, f"page {page} counts {entry.references} references, {held} hold it"
            expected = (held == 0 and entry.key is None, held == 0 and entry.key is not None)
            assert (page in free, page in evictable) == expected, f"page {page} is in the wrong list"
            assert entry.key is None or self._cached.get(entry.key) == page, f"page {page} is cached under no key"
            assert entry.key is None or len(entry.key.tokens) == self.page_size, f"page {page} is cached half full"
        for key, page in self._cached.items():
            assert self._pages[page].key == key, f"the cache's entry for page {page} is stale"
