"""Prompts that come together and begin alike: the oldest request computes what they share, others find it cached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pearl.kv import KVCacheManager, PrefixKey


class Behind(NamedTuple):
    """A request whose model still computes its tokens. ``reusable``: those of which a part may be found cached."""

    request_id: int
    tokens: Sequence[int]
    reusable: Sequence[int]


def find_waiting(kv: KVCacheManager, behind: Iterable[Behind]) -> set[int]:
    """Ids of the requests whose next page an older one is about to compute; ``behind``: the oldest first.

    Nobody waits for a younger one, so the oldest never waits.
    """
    computing: set[PrefixKey] = set()
    waiting: set[int] = set()
    for request_id, tokens, reusable in behind:
        if kv.next_page(request_id, reusable) in computing:
            waiting.add(request_id)
        elif (page := kv.next_page(request_id, tokens)) is not None:
            computing.add(page)
    return waiting
