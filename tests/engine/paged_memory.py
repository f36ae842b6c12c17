"""KV pages that know on which text each entry was computed: a wrong rollback, copy or share is found by a read."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

from pearl.kv import PageCopy


class _Entry(NamedTuple):
    position: int
    token: int
    digest: int  # of the prefix that the entry was computed on: keys and values depend on all of it


class PagedMemory:
    """What a model's KV tensors hold, slot by slot."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._slots: dict[int, _Entry] = {}

    def copy(self, copies: Sequence[PageCopy]) -> None:
        sources, destinations = {c.source for c in copies}, [c.destination for c in copies]
        assert len(set(destinations)) == len(destinations), copies
        assert not sources & set(destinations), copies
        for pair in copies:
            for slot in range(self._page_size):
                self._slots.pop(pair.destination * self._page_size + slot, None)
                held = self._slots.get(pair.source * self._page_size + slot)
                if held is not None:
                    self._slots[pair.destination * self._page_size + slot] = held

    def write(self, table: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        """What a forward does: each entry is computed on what the pages hold below it, right or wrong."""
        below = self._slots.get(self._slot(table, start - 1)) if start else None
        digest = below.digest if below else 0
        for position, token in enumerate(tokens, start):
            digest = zlib.crc32(bytes([token]), digest)
            self._slots[self._slot(table, position)] = _Entry(position, token, digest)

    def read(self, table: Sequence[int], end: int) -> list[int]:
        """The tokens of positions [0, end), each computed on exactly the ones before it."""
        tokens: list[int] = []
        digest = 0
        for position in range(end):
            entry = self._slots.get(self._slot(table, position))
            assert entry is not None, f"position {position} of {end} was never computed"
            digest = zlib.crc32(bytes([entry.token]), digest)
            assert entry == _Entry(position, entry.token, digest), f"stale KV at position {position}: {entry}"
            tokens.append(entry.token)
        return tokens

    def _slot(self, table: Sequence[int], position: int) -> int:
        return table[position // self._page_size] * self._page_size + position % self._page_size
