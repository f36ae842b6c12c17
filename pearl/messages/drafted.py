"""Drafted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Ranked(NamedTuple):
    """What might stand in a drafted token's place, best first, with the scores that ``sample`` gives them."""

    drawn: float  # the drafted token's own score
    tokens: tuple[int, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, drawn: float, tokens: Sequence[int], scores: Sequence[float]) -> Ranked:
        """Of one row of ``sample``'s alternatives: behind the row's last ones its tokens are -1."""
        there = tokens.index(-1) if tokens[-1] < 0 else len(tokens)
        return cls(drawn, tuple(tokens[:there]), tuple(scores[:there]))

    def of_rank(self, rank: int) -> int | None:
        return self.tokens[rank] if rank < len(self.tokens) else None


class Drafted(NamedTuple):
    """A drafted token. ``logprob`` is log q(token); ``row`` is its row of the drafter's logits, -1: point mass."""

    token: int
    logprob: float
    row: int
    ranked: Ranked | None = None  # where alternatives were asked for


Windows = dict[int, tuple[Drafted, ...]]  # by request id, or by branch id: then the first token is the branch's own
