"""What sequences and branches hold of a KV cache, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pearl.kv.page_pool import PrefixKey


@dataclass(frozen=True, slots=True)
class PageCopy:
    """The worker copies page ``source`` to page ``destination``, all slots and layers, before it writes anything."""

    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since the manager was built."""

    queried_tokens: int  # tokens of all sequences begun
    hit_tokens: int  # of these, tokens whose KV was found in the prefix cache
    evictions: int  # cached pages given up for new content
    page_copies: int  # copies on write, and of pages that branches begin in


@dataclass(slots=True)
class SequencePages:
    """What one sequence holds.

    Invariants:
    * ``prefix[i]`` is the key of the tokens that page i holds for this sequence, for i in [0, len(prefix)),
      len(prefix) <= len(pages). The page carries that key itself unless another page was cached under it first.
    * pages [own_from, len(pages)) are held by this sequence alone, and not cached: they may be written to as they are.
      There may be more of these before them.
    """

    pages: list[int] = field(default_factory=list)
    prefix: list[PrefixKey] = field(default_factory=list)
    own_from: int = 0
    block_table: tuple[int, ...] | None = None  # tuple(pages), made when asked for


@dataclass(frozen=True, slots=True)
class BranchPages:
    """What a branch holds: the first ``shared`` pages of its sequence belong to that alone, the rest are its own."""

    seq_id: int
    shared: int
    pages: list[int]
