"""Sequences of a KV cache by their ids, and what the integrity check finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_manager import PROMPT, manager_with

from pearl.kv import KVCacheManager


class TestSequenceIds:
    def test_an_id_is_used_once_at_a_time(self) -> None:
        kv = manager_with(PROMPT)
        for begin in (lambda: kv.begin(0, PROMPT), lambda: kv.fork(0, 0)):
            with pytest.raises(ValueError, match="sequence 0 exists already"):
                begin()
        kv.check_integrity()
        kv.free(0)
        kv.begin(0, PROMPT)

    @pytest.mark.parametrize(
        "call",
        [
            lambda kv: kv.reserve(5, 1, 0),
            lambda kv: kv.can_reserve(5, 1),
            lambda kv: kv.commit(5, [1], 1),
            lambda kv: kv.truncate(5, 0),
            lambda kv: kv.settle(5, [1], 1),
            lambda kv: kv.fork(5, 6),
            lambda kv: kv.free(5),
            lambda kv: kv.block_table(5),
            lambda kv: kv.capacity_tokens(5),
        ],
    )
    def test_unknown_ids_raise(self, call: Callable[[KVCacheManager], object]) -> None:
        with pytest.raises(KeyError):
            call(manager_with(PROMPT))


CORRUPTIONS: dict[str, tuple[Callable[[KVCacheManager], object], str]] = {
    "a page held twice": (lambda kv: kv._sequences[0].pages.append(kv._sequences[0].pages[0]), "holds a page twice"),
    "a stale block table": (lambda kv: kv._sequences[0].pages.pop(), "stale block table"),
    "a forgotten sequence": (lambda kv: kv._sequences.pop(0), "refcount 2, but 1 sequences hold it"),
    "more keys than pages": (lambda kv: kv._sequences[0].prefix.extend(kv._sequences[0].prefix), "more prefix keys"),
    "a broken chain": (lambda kv: kv._sequences[0].prefix.reverse(), "does not follow from its parent"),
    "a shared page as its own": (lambda kv: setattr(kv._sequences[0], "own_from", 0), "own, but is shared"),
    "a cached page as its own": (
        lambda kv: (kv.free(1), setattr(kv._sequences[0], "own_from", 1)),
        "own, but is cached",
    ),
    "own pages it has not": (lambda kv: setattr(kv._sequences[0], "own_from", 4), "owns pages that it does not hold"),
    "pages in the wrong order": (lambda kv: kv._sequences[1].pages.reverse(), "cached as another prefix"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_integrity_check_finds(corruption: str) -> None:
    kv = manager_with(PROMPT)
    kv.block_table(0)
    kv.begin(1, PROMPT)
    kv.check_integrity()
    corrupt, sentence = CORRUPTIONS[corruption]
    corrupt(kv)
    with pytest.raises(AssertionError, match=sentence):
        kv.check_integrity()
