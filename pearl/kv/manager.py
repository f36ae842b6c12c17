"""Which pages each sequence holds: growth, rollback, sharing, prefix reuse.

A sequence's tokens lie at positions [0, n). Page i of its block table holds positions [i * S, (i + 1) * S), S being
the page size in tokens. The manager never sees what is drafted: a page enters the prefix cache in ``commit`` alone,
when all its tokens are verified and their KV is computed, and leaves it in ``reserve`` before it is overwritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pearl.kv.held import BranchPages, CacheStats, PageCopy, SequencePages
from pearl.kv.page_pool import OutOfPages, PagePool, PrefixKey


class KVCacheManager:
    """Pages of one model's KV cache. The engine's thread owns it: no locks.

    Every method but ``begin``, ``extend``, ``fork``, ``free`` and ``check_integrity`` costs O(pages that change). An
    unknown ``seq_id`` raises KeyError.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True, lookahead: int = 64) -> None:
        """``page_size`` is in tokens. Raises ValueError unless both numbers are at least 1.

        ``lookahead``: a sequence that needs a page takes one more for each so many that it has. Each time that its
        pages change there is a new block table, which costs O(context): so a long sequence's change seldom.
        """
        self._pool, self._page_size = PagePool(num_pages, page_size), page_size
        self._prefix_caching, self._lookahead = prefix_caching, lookahead
        self._sequences: dict[int, SequencePages] = {}
        self._branches: dict[int, BranchPages] = {}
        self._queried_tokens = self._hit_tokens = self._page_copies = 0

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._page_size

    @property
    def num_free_pages(self) -> int:
        """Pages that can still be reserved: free ones, and cached ones that no sequence holds."""
        return self._pool.num_free_pages

    @property
    def usage(self) -> float:
        """The part of all pages that sequences hold, in [0, 1]."""
        return 1 - self.num_free_pages / self.num_pages

    @property
    def stats(self) -> CacheStats:
        return CacheStats(self._queried_tokens, self._hit_tokens, self._pool.evictions, self._page_copies)

    def block_table(self, seq_id: int) -> tuple[int, ...]:
        """The sequence's pages in the order of their positions."""
        sequence = self._sequences[seq_id]
        if sequence.block_table is None:
            sequence.block_table = tuple(sequence.pages)
        return sequence.block_table

    def capacity_tokens(self, seq_id: int) -> int:
        """How many tokens the sequence's pages can hold."""
        return len(self._sequences[seq_id].pages) * self._page_size

    def begin(self, seq_id: int, tokens: Sequence[int]) -> int:
        """Register a sequence with the pages of its longest cached prefix.

        Returns n, the number of tokens whose KV is valid already: a multiple of the page size, n < len(tokens), so
        that at least one token remains to be computed (0 if there are no tokens). Raises ValueError if the id exists.
        """
        self._register(seq_id, SequencePages())
        self._queried_tokens += len(tokens)
        return self.extend(seq_id, tokens)

    def extend(self, seq_id: int, tokens: Sequence[int]) -> int:
        """Go on as ``begin`` does, with pages that were cached since; only while the sequence holds cached ones alone.

        Returns how many more tokens are valid already. Costs O(pages found).
        """
        sequence = self._sequences[seq_id]
        held = len(sequence.pages)
        if not self._prefix_caching or len(sequence.prefix) < held:
            return 0
        for index in range(held, (len(tokens) - 1) // self._page_size):
            found = self._pool.lookup(self._next_key(sequence, tokens, index))
            if found is None:
                break
            self._pool.retain(found.page)
            sequence.pages.append(found.page)
            sequence.prefix.append(found.key)
        num_found = (len(sequence.pages) - held) * self._page_size
        if num_found:
            sequence.own_from, sequence.block_table = len(sequence.pages), None
        self._hit_tokens += num_found
        return num_found

    def next_page(self, seq_id: int, tokens: Sequence[int]) -> PrefixKey | None:
        """The key of the first page that is not committed: equal for sequences that would compute the same page.

        None if ``tokens`` do not fill that page and one more position, or nothing is cached.
        """
        sequence = self._sequences[seq_id]
        index = len(sequence.prefix)
        if not self._prefix_caching or index >= (len(tokens) - 1) // self._page_size:
            return None
        return self._next_key(sequence, tokens, index)

    def fork(self, parent_id: int, child_id: int) -> None:
        """Register ``child_id`` on all pages of ``parent_id``; who writes first copies.

        Raises ValueError if the child's id exists.
        """
        parent = self._sequences[parent_id]
        parent.own_from = len(parent.pages)
        child = SequencePages(parent.pages.copy(), parent.prefix.copy(), parent.own_from, parent.block_table)
        self._register(child_id, child)
        for page in parent.pages:
            self._pool.retain(page)

    def _register(self, seq_id: int, sequence: SequencePages) -> None:
        if seq_id in self._sequences:
            raise ValueError(f"sequence {seq_id} exists already")
        self._sequences[seq_id] = sequence

    def branch(self, seq_id: int, branch_id: int, num_tokens: int, end: int) -> PageCopy | None:
        """Another continuation of the sequence's first ``num_tokens`` positions, with room up to ``end``.

        For as long as the sequence neither ends nor gives up pages before ``num_tokens``: whole pages before it are the
        sequence's, and only read; the rest are the branch's own. The sequence may go on being written to. Costs
        O(end - num_tokens). ``adopt`` or ``drop`` ends the branch; no other method knows its id.

        Returns the copy that the first own page begins with, to be performed when positions before ``num_tokens``
        are computed. Raises OutOfPages with nothing changed; ValueError if the id exists, if the sequence has no pages
        for ``num_tokens``, or unless ``num_tokens < end``.
        """
        sequence = self._sequences[seq_id]
        if branch_id in self._branches or branch_id in self._sequences:
            raise ValueError(f"sequence {branch_id} exists already")
        if not 0 <= num_tokens < end or num_tokens > len(sequence.pages) * self._page_size:
            raise ValueError(f"sequence {seq_id} cannot branch at {num_tokens} up to {end}")
        shared, within = divmod(num_tokens, self._page_size)
        needed = self._num_pages_for(end) - shared
        if needed > self.num_free_pages:
            raise OutOfPages(f"a branch needs {needed} pages, {self.num_free_pages} of {self.num_pages} are free")
        own = [self._pool.allocate() for _ in range(needed)]
        self._branches[branch_id] = BranchPages(seq_id, shared, own)
        self._page_copies += within > 0
        return PageCopy(sequence.pages[shared], own[0]) if within else None

    def branch_table(self, branch_id: int) -> tuple[int, ...]:
        """As ``block_table``, of a branch."""
        branch = self._branches[branch_id]
        return (*self.block_table(branch.seq_id)[: branch.shared], *branch.pages)

    def adopt(self, branch_id: int) -> None:
        """The branch's sequence goes on as the branch does: with its pages, in the place of its own."""
        branch = self._branches.pop(branch_id)
        sequence, shared = self._sequences[branch.seq_id], branch.shared
        self._release(sequence, shared)
        sequence.pages += branch.pages
        sequence.own_from, sequence.block_table = min(sequence.own_from, shared), None
        del sequence.prefix[shared:]

    def drop(self, branch_id: int) -> None:
        """Forget the branch; its own pages are free again."""
        for page in reversed(self._branches.pop(branch_id).pages):
            self._pool.release(page)

    def can_reserve(self, seq_id: int, num_tokens: int, write_from: int | None = None) -> bool:
        """Whether ``reserve`` with these arguments would succeed (None: no position that has a page is rewritten)."""
        write_from = num_tokens if write_from is None else write_from
        missing, _, shared = self._plan(self._sequences[seq_id].pages, num_tokens, write_from)
        return missing + len(shared) <= self.num_free_pages

    def reserve(self, seq_id: int, num_tokens: int, write_from: int) -> tuple[PageCopy, ...]:
        """Make positions [write_from, num_tokens) ready to be written, and keep [0, write_from) readable.

        Afterwards there are pages for [0, num_tokens), or more, and each page with a position to be written is held by
        this sequence alone and not cached. The KV at positions >= write_from counts as invalid from here on.

        Returns the copies to perform before anything is written. Copies of several calls are right in the order of
        the calls; if no sequence was freed, truncated or forked in between, no destination is a source or a
        destination of another copy, so that any order is right.

        Raises OutOfPages with nothing changed; ValueError unless 0 <= write_from <= num_tokens.
        """
        if not 0 <= write_from <= num_tokens:
            raise ValueError(f"positions [{write_from}, {num_tokens}) cannot be reserved")
        sequence = self._sequences[seq_id]
        pages, first = sequence.pages, write_from // self._page_size
        if sequence.own_from <= first and num_tokens <= len(pages) * self._page_size:  # most often
            del sequence.prefix[first:]
            return ()
        missing, written, shared = self._plan(pages, num_tokens, write_from)
        needed = missing + len(shared)
        if needed > self.num_free_pages:
            raise OutOfPages(
                f"sequence {seq_id} needs {needed} more pages for {num_tokens} tokens, "
                f"{self.num_free_pages} of {self.num_pages} are free"
            )
        for index in written:
            if index not in shared:
                self._pool.uncache(pages[index])
        copies = self._own(pages, shared, write_from) if shared else ()
        if needed:
            wanted = missing + self._ahead(len(pages), missing) if missing else 0
            pages += [self._pool.allocate() for _ in range(wanted)]
            sequence.block_table = None
        if written.stop >= sequence.own_from:
            sequence.own_from = min(sequence.own_from, written.start)
        del sequence.prefix[first:]
        return copies

    def _plan(self, pages: list[int], num_tokens: int, write_from: int) -> tuple[int, range, list[int]]:
        """For positions [write_from, num_tokens): how many pages are missing; indices of the pages held already that
        have such a position; those of them that are shared, each of which needs a page of its own.
        """
        wanted, held = self._num_pages_for(num_tokens), len(pages)
        written = range(write_from // self._page_size, min(held, wanted)) if write_from < num_tokens else range(0)
        return max(0, wanted - held), written, [i for i in written if self._pool.is_shared(pages[i])]

    def _ahead(self, held: int, missing: int) -> int:
        """How many pages to take before they are needed; none that would make pages scarce."""
        plenty = self.num_free_pages - missing - len(self._sequences)
        return max(0, min((held + missing) // self._lookahead, plenty))

    def _own(self, pages: list[int], shared: list[int], write_from: int) -> tuple[PageCopy, ...]:
        copies = []
        for index in shared:
            page = pages[index]
            pages[index] = self._pool.allocate()
            self._pool.release(page)
            if index * self._page_size < write_from:  # later pages hold nothing that is still valid
                copies.append(PageCopy(page, pages[index]))
        self._page_copies += len(copies)
        return tuple(copies)

    def commit(self, seq_id: int, tokens: Sequence[int], num_computed: int) -> None:
        """Cache the full pages that are verified and computed: those within [0, min(len(tokens), num_computed)).

        ``tokens`` are the sequence's verified tokens from position 0 on, ``num_computed`` is how many leading positions
        hold valid KV. Positions of pages committed before are not read again. Raises ValueError if more is computed
        than there are pages for, or if a page that is cached already was overwritten without ``reserve``.
        """
        sequence = self._sequences[seq_id]
        if num_computed > len(sequence.pages) * self._page_size:
            raise ValueError(
                f"sequence {seq_id} has pages for {len(sequence.pages) * self._page_size} tokens, "
                f"so {num_computed} cannot be computed"
            )
        if not self._prefix_caching:
            return
        prefix = sequence.prefix
        for index in range(len(prefix), min(len(tokens), num_computed) // self._page_size):
            prefix.append(self._pool.cache(sequence.pages[index], self._next_key(sequence, tokens, index)))
            sequence.own_from = max(sequence.own_from, index + 1)

    def _next_key(self, sequence: SequencePages, tokens: Sequence[int], index: int) -> PrefixKey:
        """Of page ``index``, which follows the sequence's prefix."""
        start = index * self._page_size
        parent = sequence.prefix[-1] if sequence.prefix else None
        return PrefixKey(parent, tuple(tokens[start : start + self._page_size]))

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Roll back: KV at positions >= num_tokens is invalid, pages wholly beyond are given back.

        The page that num_tokens cuts through stays as it is, cached or shared, until ``reserve`` prepares it for
        writing. A num_tokens beyond the sequence's end changes nothing. Raises ValueError if it is negative.
        """
        if num_tokens < 0:
            raise ValueError(f"a sequence cannot be truncated to {num_tokens} tokens")
        sequence = self._sequences[seq_id]
        num_kept = self._num_pages_for(num_tokens)
        if num_kept < len(sequence.pages):
            self._release(sequence, num_kept)
            sequence.own_from = min(sequence.own_from, num_kept)
            sequence.block_table = None
        del sequence.prefix[num_tokens // self._page_size :]

    def settle(self, seq_id: int, tokens: Sequence[int], num_computed: int, num_kept: int = 0) -> None:
        """After a round: ``truncate`` to ``num_computed`` tokens and ``commit``; most often there is nothing to do.

        Unless pages are scarce, a page that was rolled back stays, and those that were reserved ahead: the next round
        needs them. Those for [0, num_kept) stay in any case: what is written in them is no text yet, but is read.
        """
        sequence, page_size = self._sequences[seq_id], self._page_size
        num_kept = max(num_kept, num_computed)
        beyond = len(sequence.pages) * page_size - num_kept  # tokens that the pages could still hold
        most = (2 + len(sequence.pages) // self._lookahead) * page_size
        if beyond >= page_size and (beyond >= most or self._is_scarce()):
            self.truncate(seq_id, num_kept)
            del sequence.prefix[num_computed // page_size :]
        else:
            del sequence.prefix[num_computed // page_size :]
        verified = min(len(tokens), num_computed) // page_size if self._prefix_caching else 0
        if verified > len(sequence.prefix) or beyond < 0:
            self.commit(seq_id, tokens, num_computed)

    def _is_scarce(self) -> bool:
        """Whether not every sequence could be given another page."""
        return self.num_free_pages < len(self._sequences)

    def free(self, seq_id: int) -> None:
        """Forget the sequence; its cached pages stay findable until they are needed for something else."""
        self._release(self._sequences.pop(seq_id), 0)

    def _release(self, sequence: SequencePages, num_kept: int) -> None:
        # The last page first, so that it is evicted first: a prefix without its end is useful, an end alone is not.
        while len(sequence.pages) > num_kept:
            self._pool.release(sequence.pages.pop())

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def check_integrity(self) -> None:
        """Raise AssertionError, saying what is wrong, if an invariant is broken. For tests: O(all pages)."""
        holders: Counter[int] = Counter()
        for seq_id, sequence in self._sequences.items():
            pages, prefix = sequence.pages, sequence.prefix
            assert len(set(pages)) == len(pages), f"sequence {seq_id} holds a page twice: {pages}"
            assert sequence.block_table in (None, tuple(pages)), f"sequence {seq_id} has a stale block table"
            assert len(prefix) <= len(pages), f"sequence {seq_id} has more prefix keys than pages"
            assert 0 <= sequence.own_from <= len(pages), f"sequence {seq_id} owns pages that it does not hold"
            for page in pages[sequence.own_from :]:
                assert not self._pool.is_shared(page), f"page {page} counts as sequence {seq_id}'s own, but is shared"
                assert self._pool.key_of(page) is None, f"page {page} counts as sequence {seq_id}'s own, but is cached"
            holders.update(pages)
            for index, (page, key) in enumerate(zip(pages, prefix, strict=False)):
                parent = prefix[index - 1] if index else None
                assert key.parent == parent, f"page {index} of sequence {seq_id} does not follow from its parent"
                carried = self._pool.key_of(page)
                assert carried in (None, key), f"page {index} of sequence {seq_id} is cached as another prefix"
        for branch_id, branch in self._branches.items():
            assert branch.seq_id in self._sequences, f"branch {branch_id} has outlived its sequence"
            holders.update(branch.pages)
            for page in branch.pages:
                assert self._pool.key_of(page) is None, f"page {page} of branch {branch_id} is cached"
        self._pool.check_integrity(holders)
