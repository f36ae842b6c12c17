"""What the scheduler relies on: prefix reuse, all-or-nothing growth, copy on write, rollback that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from pearl.kv import KVCacheManager, OutOfPages, PageCopy

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def manager_with(tokens: Sequence[int], *, num_pages: int = 8, page_size: int = 4) -> KVCacheManager:
    """Sequence 0 holds ``tokens``, all of them verified and computed."""
    kv = KVCacheManager(num_pages, page_size)
    run(kv, 0, tokens)
    return kv


def run(kv: KVCacheManager, seq_id: int, tokens: Sequence[int]) -> int:
    """Begin, compute and commit a sequence; returns how many tokens were cached."""
    cached = kv.begin(seq_id, tokens)
    assert kv.reserve(seq_id, len(tokens), cached) == ()
    kv.commit(seq_id, tokens, len(tokens))
    kv.check_integrity()
    return cached


def cached_tokens(kv: KVCacheManager, tokens: Sequence[int]) -> int:
    """How many leading tokens the prefix cache knows; the token that always remains to be computed comes on top."""
    cached = kv.begin(-1, [*tokens, 0])
    kv.free(-1)
    kv.check_integrity()
    return cached


class TestPrefixCache:
    def test_full_pages_are_found_while_held_and_after(self) -> None:
        kv = manager_with(PROMPT)
        assert kv.begin(1, PROMPT) == 8
        assert kv.block_table(1) == kv.block_table(0)[:2]
        kv.free(0)
        kv.free(1)
        assert kv.num_free_pages == kv.num_pages
        assert kv.begin(2, PROMPT) == 8

    @pytest.mark.parametrize(("length", "cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
    def test_one_token_always_remains_to_be_computed(self, length: int, cached: int) -> None:
        kv = manager_with(PROMPT)
        assert kv.begin(1, PROMPT[:length]) == cached
        assert kv.capacity_tokens(1) == cached

    def test_the_common_part_is_reused_and_continued(self) -> None:
        kv = manager_with(PROMPT)
        assert run(kv, 1, [1, 2, 3, 4, 50, 60, 70, 80, 90]) == 4
        assert kv.block_table(1)[0] == kv.block_table(0)[0]
        assert not set(kv.block_table(1)[1:]) & set(kv.block_table(0))
        assert cached_tokens(kv, [1, 2, 3, 4, 50, 60, 70, 80]) == 8

    def test_equal_pages_after_different_prefixes_are_different(self) -> None:
        kv = manager_with(PROMPT)
        assert cached_tokens(kv, [0, 0, 0, 0, 5, 6, 7, 8]) == 0
        assert cached_tokens(kv, [5, 6, 7, 8]) == 0

    def test_the_same_prompt_computed_twice_is_cached_once(self) -> None:
        kv = KVCacheManager(8, 4)
        for seq_id in (0, 1):
            assert kv.begin(seq_id, PROMPT) == 0
            kv.reserve(seq_id, 9, 0)
        for seq_id in (0, 1):
            kv.commit(seq_id, PROMPT, 9)
            kv.check_integrity()
        assert not set(kv.block_table(0)) & set(kv.block_table(1))
        kv.begin(2, PROMPT)
        assert kv.block_table(2) == kv.block_table(0)[:2]

    def test_pages_are_cached_as_they_fill(self) -> None:
        kv = KVCacheManager(4, 2)
        kv.begin(0, [1])
        tokens = [1, 2, 3, 4, 5]
        for length in range(1, 6):
            kv.reserve(0, length, length - 1)
            kv.commit(0, tokens[:length], length)
            assert cached_tokens(kv, tokens) == length // 2 * 2

    def test_commit_reads_new_pages_only(self) -> None:
        class Recorder(list[int]):
            def __init__(self, values: Iterable[int]) -> None:
                super().__init__(values)
                self.read: list[slice] = []

            def __getitem__(self, item: Any) -> Any:
                self.read.append(item)
                return super().__getitem__(item)

        kv = KVCacheManager(8, 2)
        tokens = Recorder(range(9))
        kv.begin(0, [0])
        kv.reserve(0, 9, 0)
        kv.commit(0, tokens, 4)
        assert tokens.read == [slice(0, 2), slice(2, 4)]
        tokens.read.clear()
        kv.commit(0, tokens, 9)
        assert tokens.read == [slice(4, 6), slice(6, 8)]
        tokens.read.clear()
        kv.commit(0, tokens, 9)
        assert tokens.read == []

    def test_a_sequence_that_computes_for_itself_is_not_extended(self) -> None:
        kv = KVCacheManager(8, 2)
        for seq_id in (1, 2):
            kv.begin(seq_id, [7] * 5)
            kv.reserve(seq_id, 2, 0)
        kv.commit(2, [7] * 5, 2)
        assert kv.extend(1, [7] * 5) == 0
        assert kv.begin(3, [7] * 5) == 2
        kv.check_integrity()

    def test_the_end_of_a_sequence_is_evicted_before_its_beginning(self) -> None:
        kv = manager_with(PROMPT, num_pages=3)  # two cached pages, one that is not full
        kv.free(0)
        kv.begin(1, [0] * 8)
        kv.reserve(1, 8, 0)
        assert kv.stats.evictions == 1
        assert cached_tokens(kv, PROMPT) == 4

    def test_switched_off(self) -> None:
        kv = KVCacheManager(8, 4, prefix_caching=False)
        run(kv, 0, PROMPT)
        assert run(kv, 1, PROMPT) == 0
        kv.free(0)
        assert cached_tokens(kv, PROMPT) == 0

    def test_stats_count_tokens(self) -> None:
        kv = manager_with(PROMPT)
        kv.begin(1, PROMPT)
        stats = kv.stats
        assert (stats.queried_tokens, stats.hit_tokens, stats.evictions, stats.page_copies) == (18, 8, 0, 0)


class TestOnlyVerifiedTokensAreCached:
    """Bug 8 of others: unverified full pages hashed into the prefix cache; rollback leaves the stale hash."""

    def test_bug_8_rejected_tokens_that_filled_a_page_are_never_found(self) -> None:
        kv = KVCacheManager(8, 4)
        verified, rejected, correction = [1, 2, 3], [4, 5, 6, 7, 8], 40
        kv.begin(0, verified)
        kv.reserve(0, 8, 0)
        kv.commit(0, verified, 8)  # computed, not verified: pages [1 2 3 4] and [5 6 7 8] are full
        assert cached_tokens(kv, verified + rejected) == 0
        kv.truncate(0, 3)
        verified = [*verified, correction]
        kv.commit(0, verified, 3)
        assert cached_tokens(kv, verified) == 0, "the correction is verified, but its KV is not computed"
        kv.reserve(0, 6, 3)
        kv.commit(0, verified, 6)
        assert cached_tokens(kv, [1, 2, 3, 4]) == 0
        assert cached_tokens(kv, verified) == 4

    def test_bug_8_partly_accepted_window(self) -> None:
        kv = KVCacheManager(8, 2)
        kv.begin(0, [1])
        kv.reserve(0, 6, 0)
        kv.truncate(0, 3)  # [1 2 3] hold, [4 5 6] do not
        kv.commit(0, [1, 2, 3, 40], 3)
        assert cached_tokens(kv, [1, 2, 3, 4, 5, 6]) == 2
        kv.reserve(0, 6, 3)
        kv.commit(0, [1, 2, 3, 40, 50, 60], 6)
        assert cached_tokens(kv, [1, 2, 3, 4, 5, 6]) == 2
        assert cached_tokens(kv, [1, 2, 3, 40, 50, 60]) == 6

    def test_bug_8_rollback_below_a_cached_page_then_other_tokens(self) -> None:
        kv = manager_with([1, 2, 3, 4, 5, 6, 7, 8])
        kv.truncate(0, 6)
        assert cached_tokens(kv, [1, 2, 3, 4, 5, 6, 7, 8]) == 8, "nothing was overwritten yet"
        assert kv.reserve(0, 8, 6) == ()
        assert cached_tokens(kv, [1, 2, 3, 4, 5, 6, 7, 8]) == 4
        kv.commit(0, [1, 2, 3, 4, 5, 6, 70, 80], 8)
        assert cached_tokens(kv, [1, 2, 3, 4, 5, 6, 7, 8]) == 4
        assert cached_tokens(kv, [1, 2, 3, 4, 5, 6, 70, 80]) == 8

    def test_bug_8_rollback_by_reserve_alone(self) -> None:
        kv = manager_with([1, 2, 3, 4, 5, 6, 7, 8])
        kv.reserve(0, 4, 3)
        kv.commit(0, [1, 2, 3, 40], 4)
        assert cached_tokens(kv, [1, 2, 3, 4, 5, 6, 7, 8]) == 0
        assert cached_tokens(kv, [1, 2, 3, 40, 5, 6, 7, 8]) == 4

    def test_bug_8_an_overwritten_page_cannot_be_committed_without_reserve(self) -> None:
        kv = manager_with([1, 2, 3, 4])
        kv.truncate(0, 3)
        with pytest.raises(ValueError, match="without being reserved"):
            kv.commit(0, [1, 2, 3, 40], 4)

    def test_more_computed_than_reserved_is_refused(self) -> None:
        kv = manager_with([1, 2, 3, 4])
        with pytest.raises(ValueError, match="pages for 4 tokens, so 5 cannot be computed"):
            kv.commit(0, [1, 2, 3, 4, 5], 5)


class TestReserve:
    def test_grows_to_the_page(self) -> None:
        kv = KVCacheManager(8, 4)
        kv.begin(0, PROMPT)
        for num_tokens, pages in ((1, 1), (4, 1), (5, 2), (3, 2), (12, 3)):
            kv.reserve(0, num_tokens, 0)
            assert kv.capacity_tokens(0) == 4 * pages
            assert len(kv.block_table(0)) == pages
        assert kv.num_free_pages == 5
        assert kv.usage == 3 / 8

    def test_growth_keeps_the_pages_before(self) -> None:
        kv = manager_with(PROMPT)
        before = kv.block_table(0)
        kv.reserve(0, 16, 9)
        assert kv.block_table(0)[:3] == before
        assert kv.block_table(0) is kv.block_table(0), "made once for each change"

    def test_is_all_or_nothing(self) -> None:
        kv = manager_with(PROMPT, num_pages=5)
        kv.fork(0, 1)
        table = kv.block_table(1)
        assert kv.can_reserve(1, 20)
        assert not kv.can_reserve(1, 20, write_from=9)
        with pytest.raises(OutOfPages, match="sequence 1 needs 3 more pages for 20 tokens, 2 of 5 are free"):
            kv.reserve(1, 20, 9)
        assert kv.block_table(0) == kv.block_table(1) == table
        assert kv.num_free_pages == 2
        assert cached_tokens(kv, PROMPT) == 8
        kv.check_integrity()
        assert kv.can_reserve(1, 16, write_from=9)
        kv.reserve(1, 16, 9)
        assert kv.num_free_pages == 0

    def test_takes_cached_pages_when_nothing_else_is_left(self) -> None:
        kv = manager_with(PROMPT, num_pages=3)
        kv.free(0)
        kv.begin(1, [0])
        assert kv.can_reserve(1, 12)
        assert not kv.can_reserve(1, 13)
        kv.reserve(1, 12, 0)
        assert kv.stats.evictions == 2
        assert kv.usage == 1

    def test_without_a_position_to_write_nothing_is_copied_or_uncached(self) -> None:
        kv = manager_with([1, 2, 3, 4, 5, 6])
        kv.fork(0, 1)
        assert kv.reserve(1, 6, 6) == ()
        assert kv.block_table(0) == kv.block_table(1)
        assert cached_tokens(kv, [1, 2, 3, 4]) == 4

    @pytest.mark.parametrize(("num_tokens", "write_from"), [(4, 5), (4, -1), (-1, -1)])
    def test_impossible_ranges_are_refused(self, num_tokens: int, write_from: int) -> None:
        kv = manager_with(PROMPT)
        with pytest.raises(ValueError, match="cannot be reserved"):
            kv.reserve(0, num_tokens, write_from)


class TestCopyOnWrite:
    def test_whoever_writes_first_copies_the_page_it_continues(self) -> None:
        kv = manager_with([1, 2, 3, 4, 5, 6])
        kv.fork(0, 1)
        shared = kv.block_table(0)
        copies = kv.reserve(1, 8, 6)
        assert copies == (PageCopy(shared[1], kv.block_table(1)[1]),)
        assert kv.block_table(0) == shared
        assert kv.block_table(1)[0] == shared[0]
        assert kv.block_table(1)[1] not in shared
        assert kv.reserve(0, 8, 6) == (), "the parent owns its page alone now"
        assert kv.stats.page_copies == 1
        kv.check_integrity()

    def test_pages_that_are_overwritten_from_their_first_slot_on_are_not_copied(self) -> None:
        kv = manager_with(PROMPT)
        kv.fork(0, 1)
        shared = kv.block_table(0)
        copies = kv.reserve(1, 9, 2)
        assert copies == (PageCopy(shared[0], kv.block_table(1)[0]),)
        assert not set(kv.block_table(1)) & set(shared)
        assert kv.reserve(0, 9, 4) == ()

    def test_a_prefix_found_by_others_is_not_overwritten(self) -> None:
        kv = manager_with([1, 2, 3, 4, 5])
        kv.begin(1, [1, 2, 3, 4, 5])
        kv.truncate(0, 2)
        (copy,) = kv.reserve(0, 4, 2)
        assert copy == PageCopy(kv.block_table(1)[0], kv.block_table(0)[0])
        kv.commit(0, [1, 2, 30, 40], 4)
        kv.check_integrity()
        assert cached_tokens(kv, [1, 2, 3, 4]) == 4
        assert cached_tokens(kv, [1, 2, 30, 40]) == 4

    def test_fork_costs_no_pages(self) -> None:
        kv = manager_with(PROMPT)
        free = kv.num_free_pages
        kv.fork(0, 1)
        assert kv.num_free_pages == free
        assert kv.block_table(1) == kv.block_table(0)
        kv.free(0)
        assert kv.num_free_pages == free
        kv.free(1)
        assert kv.num_free_pages == kv.num_pages

    def test_both_commit_a_page_they_share(self) -> None:
        kv = KVCacheManager(8, 2)
        kv.begin(0, [1])
        kv.reserve(0, 4, 0)
        kv.fork(0, 1)
        for seq_id in (0, 1):
            kv.commit(seq_id, [1, 2, 3, 4], 4)
            kv.check_integrity()
        assert kv.block_table(0) == kv.block_table(1)
        assert cached_tokens(kv, [1, 2, 3, 4]) == 4


class TestTruncate:
    @pytest.mark.parametrize(("num_tokens", "pages"), [(9, 3), (8, 2), (7, 2), (5, 2), (4, 1), (1, 1), (0, 0)])
    def test_gives_back_pages_wholly_beyond(self, num_tokens: int, pages: int) -> None:
        kv = manager_with(PROMPT)
        before = kv.block_table(0)
        kv.truncate(0, num_tokens)
        assert kv.block_table(0) == before[:pages]
        assert kv.num_free_pages == 8 - pages
        kv.check_integrity()

    @pytest.mark.parametrize("num_tokens", [9, 12, 13, 1000])
    def test_beyond_the_end_changes_nothing(self, num_tokens: int) -> None:
        kv = manager_with(PROMPT)
        before = kv.block_table(0)
        kv.truncate(0, num_tokens)
        assert kv.block_table(0) is before

    def test_keeps_verified_pages_findable(self) -> None:
        kv = manager_with(PROMPT)
        kv.truncate(0, 0)
        assert cached_tokens(kv, PROMPT) == 8

    def test_negative_is_refused(self) -> None:
        kv = manager_with(PROMPT)
        with pytest.raises(ValueError, match="truncated to -1 tokens"):
            kv.truncate(0, -1)


class TestSettle:
    def test_a_page_that_was_rolled_back_stays_for_the_next_round(self) -> None:
        kv = manager_with(PROMPT)
        table = kv.block_table(0)
        kv.settle(0, PROMPT, 8)
        assert kv.block_table(0) is table
        kv.settle(0, PROMPT, 4)  # two pages beyond are more than one
        assert kv.block_table(0) == table[:1]

    def test_where_pages_are_scarce_it_does_not(self) -> None:
        kv = manager_with(PROMPT, num_pages=3)
        kv.settle(0, PROMPT, 8)
        assert kv.num_free_pages == 1

    @pytest.mark.parametrize(("num_pages", "ahead"), [(4, 0), (5, 1), (6, 2), (9, 3)])
    def test_pages_are_taken_ahead_where_there_are_enough(self, num_pages: int, ahead: int) -> None:
        """Not the last one, which a sequence may need."""
        kv = KVCacheManager(num_pages, 4, lookahead=1)
        kv.begin(0, PROMPT)
        kv.reserve(0, 9, 0)
        assert len(kv.block_table(0)) == 3 + ahead
        kv.settle(0, PROMPT, 9)
        assert len(kv.block_table(0)) == 3 + ahead

    def test_what_is_rolled_back_must_be_reserved_before_it_is_other_tokens(self) -> None:
        kv = manager_with(PROMPT)
        kv.settle(0, PROMPT[:5], 5)
        with pytest.raises(ValueError, match="without being reserved"):
            kv.commit(0, [1, 2, 3, 4, 50, 60, 70, 80], 8)

    def test_no_more_is_computed_than_there_are_pages_for(self) -> None:
        with pytest.raises(ValueError, match="so 13 cannot be computed"):
            manager_with(PROMPT).settle(0, PROMPT, 13)
