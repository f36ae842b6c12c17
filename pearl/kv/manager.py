"""Which page holds which tokens of which sequence. Host only: the KV tensors belong to a worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pearl.kv.page_pool import OutOfPages, PageKey, PagePool


class PageCopy(NamedTuple):
    """A page copy that the worker must perform before it writes (copy-on-write)."""

    source: int
    destination: int


@dataclass(frozen=True)
class PrefixStats:
    """Tokens that ``begin`` looked up, and that it found cached."""

    queried_tokens: int = 0
    hit_tokens: int = 0


@dataclass
class _Sequence:
    """Positions [0, len(pages) * page_size) have a page.

    The first len(serials) pages hold committed, computed tokens and are known to the prefix cache, either themselves
    or through an equal page; serials[i] identifies the content of pages [0, i].
    """

    pages: list[int] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)
    table: tuple[int, ...] | None = None  # the block table, until ``pages`` changes


class KVCacheManager:
    """Page bookkeeping of one model: allocate, commit, truncate, free; with prefix caching and copy-on-write.

    Only pages that are full of *committed and computed* tokens enter the prefix cache: a page with drafted tokens may
    be rolled back and rewritten, and whoever found it would read another text's keys.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        self._pool = PagePool(num_pages, page_size)
        self._prefix_caching = prefix_caching
        self._sequences: dict[int, _Sequence] = {}
        self.stats = PrefixStats()

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def page_size(self) -> int:
        return self._pool.page_size

    @property
    def num_free_pages(self) -> int:
        """Free or evictable."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold, 0..1."""
        return 1.0 - self._pool.num_free / self._pool.num_pages

    def begin(self, seq_id: int, tokens: Sequence[int]) -> int:
        """Register a sequence and attach its longest cached prefix; returns how many tokens that covers.

        Whole pages only, and at most len(tokens) - 1 tokens: the last one must be computed for its logits.
        Raises ValueError if the id is in use.
        """
        if seq_id in self._sequences:
            raise ValueError(f"sequence {seq_id} has begun already")
        sequence = self._sequences[seq_id] = _Sequence()
        if not self._prefix_caching:
            return 0
        size, parent = self.page_size, 0
        for start in range(0, (len(tokens) - 1) // size * size, size):
            found = self._pool.find(PageKey(parent, tuple(tokens[start : start + size])))
            if found is None:
                break
            page, parent = found
            self._pool.share(page)
            sequence.pages.append(page)
            sequence.serials.append(parent)
        hit = len(sequence.pages) * size
        self.stats = PrefixStats(self.stats.queried_tokens + len(tokens), self.stats.hit_tokens + hit)
        return hit

    def can_reserve(self, seq_id: int, num_tokens: int, write_from: int) -> bool:
        """Whether ``reserve`` with the same arguments would succeed."""
        new, copied = self._needs(self._sequences[seq_id], num_tokens, write_from)
        return new + len(copied) <= self._pool.num_free

    def reserve(self, seq_id: int, num_tokens: int, write_from: int) -> tuple[PageCopy, ...]:
        """Give positions [0, num_tokens) a page, and make every page with a position >= write_from writable.

        Returns the page copies that must happen before anything is written. Raises OutOfPages and changes nothing if
        there are too few pages.
        """
        sequence = self._sequences[seq_id]
        new, shared = self._needs(sequence, num_tokens, write_from)
        first_written = write_from // self.page_size
        if new or shared:
            fresh = self._pool.allocate(new + len(shared))  # all or nothing
            sequence.table = None
        copies = []
        for index in shared:
            source, destination = sequence.pages[index], fresh.pop()
            self._pool.release(source)
            sequence.pages[index] = destination
            copies.append(PageCopy(source, destination))
        for page in sequence.pages[first_written:]:
            self._pool.forget(page)  # exclusively ours, but others could find it: its content is about to change
        del sequence.serials[first_written:]
        if new:
            sequence.pages.extend(fresh)
        return tuple(copies)

    def _needs(self, sequence: _Sequence, num_tokens: int, write_from: int) -> tuple[int, list[int]]:
        """(pages to add, indices of shared pages that must be copied)."""
        new = max(0, -(-num_tokens // self.page_size) - len(sequence.pages))
        first = write_from // self.page_size
        shared = [i for i in range(first, len(sequence.pages)) if self._pool.is_shared(sequence.pages[i])]
        return new, shared

    def commit(self, seq_id: int, tokens: Sequence[int], num_computed: int) -> None:
        """Offer pages to the prefix cache: those full of positions below min(len(tokens), num_computed).

        tokens: the committed (verified) ones, from the sequence's start. num_computed: leading positions whose KV is
        valid.
        """
        if not self._prefix_caching:
            return
        sequence, size = self._sequences[seq_id], self.page_size
        for index in range(len(sequence.serials), min(len(tokens), num_computed) // size):
            parent = sequence.serials[-1] if sequence.serials else 0
            key = PageKey(parent, tuple(tokens[index * size : (index + 1) * size]))
            sequence.serials.append(self._pool.publish(sequence.pages[index], key))

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Roll back to the first num_tokens positions: gives back the pages that lie wholly behind them."""
        sequence = self._sequences[seq_id]
        keep = -(-num_tokens // self.page_size)
        if keep < len(sequence.pages):
            for page in sequence.pages[keep:]:
                self._pool.release(page)
            del sequence.pages[keep:]
            sequence.table = None
        del sequence.serials[num_tokens // self.page_size :]

    def fork(self, parent_id: int, child_id: int) -> None:
        """Start a sequence that shares all of another's pages; whichever writes first gets copies."""
        if child_id in self._sequences:
            raise ValueError(f"sequence {child_id} has begun already")
        parent = self._sequences[parent_id]
        for page in parent.pages:
            self._pool.share(page)
        self._sequences[child_id] = _Sequence(list(parent.pages), list(parent.serials), parent.table)

    def free(self, seq_id: int) -> None:
        """End a sequence. Its cached pages can be found until they are needed; the last are given up first."""
        for page in reversed(self._sequences.pop(seq_id).pages):
            self._pool.release(page)

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        sequence = self._sequences[seq_id]
        if sequence.table is None:
            sequence.table = tuple(sequence.pages)
        return sequence.table

    def capacity_tokens(self, seq_id: int) -> int:
        """Positions that have a page."""
        return len(self._sequences[seq_id].pages) * self.page_size

    def check_integrity(self) -> None:
        """AssertionError with a sentence if any invariant is broken; for tests."""
        for seq_id, sequence in self._sequences.items():
            assert len(set(sequence.pages)) == len(sequence.pages), f"sequence {seq_id} holds a page twice"
            assert len(sequence.serials) <= len(sequence.pages), f"sequence {seq_id} has hashed pages it lost"
            assert sequence.table in (None, tuple(sequence.pages)), f"sequence {seq_id} has a stale block table"
        held = Counter(page for sequence in self._sequences.values() for page in sequence.pages)
        self._pool.check_integrity(held)
