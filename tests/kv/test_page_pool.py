"""Pages change state as documented, the prefix cache is exact, and ``check_integrity`` finds what is broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pearl.kv import OutOfPages, PagePool, PrefixKey


def key_of(*pages: tuple[int, ...]) -> PrefixKey:
    """The key of the prefix that consists of these pages, built from scratch."""
    key = None
    for tokens in pages:
        key = PrefixKey(key, tokens)
    assert key is not None
    return key


def cached_page(pool: PagePool, *pages: tuple[int, ...]) -> int:
    """An evictable page that is cached under the prefix."""
    page = pool.allocate()
    pool.cache(page, key_of(*pages))
    pool.release(page)
    return page


def test_every_page_is_given_out_once() -> None:
    pool = PagePool(3, 1)
    assert sorted(pool.allocate() for _ in range(3)) == [0, 1, 2]
    assert pool.num_free_pages == 0
    with pytest.raises(OutOfPages, match="all 3 pages are in use"):
        pool.allocate()


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 1), (1, 0), (-1, 16)])
def test_a_pool_that_cannot_hold_anything_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="cannot hold anything"):
        PagePool(num_pages, page_size)


def test_a_page_is_free_only_after_its_last_holder() -> None:
    pool = PagePool(1, 1)
    page = pool.allocate()
    assert not pool.is_shared(page)
    pool.retain(page)
    assert pool.is_shared(page)
    pool.release(page)
    assert not pool.is_shared(page)
    assert pool.num_free_pages == 0
    pool.release(page)
    assert pool.num_free_pages == 1
    pool.check_integrity({})


def test_holders_are_counted_strictly() -> None:
    pool = PagePool(2, 1)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(ValueError, match="released more often than it is held"):
        pool.release(page)
    with pytest.raises(ValueError, match="is free"):
        pool.retain(page)


def test_cached_pages_are_reused_last_and_the_least_recently_used_first() -> None:
    pool = PagePool(4, 1)
    held = [pool.allocate() for _ in range(4)]
    for page in held[:3]:
        pool.cache(page, key_of((page,)))
    for page in (held[2], held[0], held[3], held[1]):
        pool.release(page)
    assert pool.num_free_pages == 4
    assert [pool.allocate() for _ in range(4)] == [held[3], held[2], held[0], held[1]]
    assert pool.evictions == 3
    assert all(pool.lookup(key_of((page,))) is None for page in held)


def test_use_renews_a_cached_page() -> None:
    pool = PagePool(2, 1)
    first, second = pool.allocate(), pool.allocate()
    for page in (first, second):
        pool.cache(page, key_of((page,)))
        pool.release(page)
    pool.retain(first)
    pool.release(first)
    assert pool.allocate() == second
    assert pool.lookup(key_of((first,))) is not None


def test_a_held_cached_page_is_never_evicted() -> None:
    pool = PagePool(1, 1)
    page = cached_page(pool, (7,))
    pool.retain(page)
    with pytest.raises(OutOfPages):
        pool.allocate()
    found = pool.lookup(key_of((7,)))
    assert found is not None
    assert found.page == page


def test_a_prefix_is_found_by_all_its_tokens() -> None:
    pool = PagePool(4, 2)
    page = cached_page(pool, (1, 2), (3, 4))
    found = pool.lookup(key_of((1, 2), (3, 4)))
    assert found is not None
    assert found.page == page
    for other in (((3, 4),), ((1, 2),), ((1, 2), (3, 5)), ((1, 9), (3, 4)), ((3, 4), (1, 2)), ((1, 2), (3, 4), (3, 4))):
        assert pool.lookup(key_of(*other)) is None, other


def test_colliding_hashes_never_return_a_wrong_page() -> None:
    """In CPython hash(-1) == hash(-2), so these prefixes differ and all their chained hashes agree."""
    ours, theirs = key_of((-1,), (5,)), key_of((-2,), (5,))
    assert hash(ours) == hash(theirs)
    assert ours != theirs
    pool = PagePool(2, 1)
    page = cached_page(pool, (-1,), (5,))
    assert pool.lookup(theirs) is None
    other = cached_page(pool, (-2,), (5,))
    assert [found.page for found in map(pool.lookup, (ours, theirs)) if found] == [page, other]
    pool.check_integrity({})


def test_a_key_equals_only_keys() -> None:
    assert key_of((1,)) != (1,)


def test_long_prefixes_need_no_recursion() -> None:
    pages = [(token,) for token in range(20_000)]
    assert key_of(*pages) == key_of(*pages)
    assert key_of((-1,), *pages) != key_of((-2,), *pages)


def test_the_first_page_of_a_prefix_stays_the_cached_one() -> None:
    pool = PagePool(2, 1)
    first, second = pool.allocate(), pool.allocate()
    canonical = pool.cache(first, key_of((7,)))
    assert pool.cache(second, key_of((7,))) is canonical
    assert pool.key_of(first) is canonical
    assert pool.key_of(second) is None
    pool.release(second)
    assert pool.allocate() == second, "a duplicate is free, not evictable"
    assert pool.evictions == 0


def test_caching_again_changes_nothing() -> None:
    pool = PagePool(1, 1)
    page = pool.allocate()
    canonical = pool.cache(page, key_of((7,)))
    assert pool.cache(page, key_of((7,))) is canonical
    pool.check_integrity({page: 1})


def test_a_cached_page_cannot_be_cached_as_another_prefix() -> None:
    pool = PagePool(1, 1)
    page = pool.allocate()
    pool.cache(page, key_of((7,)))
    with pytest.raises(ValueError, match="cached as another prefix"):
        pool.cache(page, key_of((8,)))
    pool.uncache(page)
    pool.cache(page, key_of((8,)))
    assert pool.lookup(key_of((7,))) is None
    assert pool.lookup(key_of((8,))) is not None


def _two_keys(pool: PagePool) -> None:
    entry = pool._cached[2]
    assert entry is not None
    pool._cache[PrefixKey(None, (6,))] = entry


def _wrong_hash(pool: PagePool) -> None:
    entry = pool._cached[2]
    assert entry is not None
    del pool._cache[entry.key]
    entry.key._hash += 1
    pool._cache[entry.key] = entry


def _wrong_tokens(pool: PagePool) -> None:
    pool.cache(0, PrefixKey(None, (1, 2)))


CORRUPTIONS: dict[str, tuple[Callable[[PagePool], object], str]] = {
    "a reference too many": (lambda pool: pool.retain(0), "refcount 2, but 1 sequences"),
    "a reference too few": (lambda pool: pool.release(0), "refcount 0, but 1 sequences"),
    "twice in the free list": (lambda pool: pool._free.append(1), "twice"),
    "free and evictable": (lambda pool: pool._evictable.update({1: None}), "both free and evictable"),
    "free though in use": (lambda pool: pool._free.append(0), "in use and on offer"),
    "evictable though in use": (lambda pool: pool._evictable.update({0: None}), "in use and on offer"),
    "lost": (lambda pool: pool._free.clear(), "neither free, evictable nor in use"),
    "evictable without a key": (lambda pool: pool.uncache(2), "evictable, but not in the prefix cache"),
    "free with a key": (lambda pool: pool.cache(1, PrefixKey(None, (5,))), "free, but in the prefix cache"),
    "under two keys": (_two_keys, "under two keys"),
    "a key without an entry": (lambda pool: pool._cache.clear(), "key of an entry that is gone"),
    "a hash that is not chained": (_wrong_hash, "does not follow from its parent"),
    "a page that is not full": (_wrong_tokens, "cached with 2 tokens"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_integrity_check_finds(corruption: str) -> None:
    """Page 0 is in use, page 1 free, page 2 evictable."""
    pool = PagePool(3, 1)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    pool.cache(2, PrefixKey(None, (9,)))
    pool.release(2)
    pool.release(1)
    pool.check_integrity({0: 1})
    corrupt, sentence = CORRUPTIONS[corruption]
    corrupt(pool)
    with pytest.raises(AssertionError, match=sentence):
        pool.check_integrity({0: 1})
