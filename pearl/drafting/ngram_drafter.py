"""Prompt lookup: propose what followed the last occurrence of the text's final n-gram. Needs no model and no KV."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pearl.messages import Busy, Drafted, DraftPlan, DraftProposal


class NGramDrafter:
    """Each token is looked up anew, with those drafted before it as text: so it depends on the text alone, not on where
    a window began, and a seeded output does not depend on windows.
    """

    reads_history = True
    hidden_layers: tuple[int, ...] = ()
    most_behind = 0
    prepares = False

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        self._longest, self._shortest = longest, shortest

    def propose(self, plan: DraftPlan) -> DraftProposal:
        begin = time.perf_counter()
        windows = {}
        for item in plan.work:
            state = item.forward.state
            assert state.history is not None
            tokens = self._window(state.history, item.num_draft)
            windows[state.request_id] = tuple(Drafted(token, 0.0, -1) for token in tokens)
        return DraftProposal(windows, busy=Busy.since(begin))

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def _window(self, history: Sequence[int], count: int) -> list[int]:
        latest_first = list(reversed(history))
        for drafted in range(count):
            token = self._next(latest_first)
            if token is None:
                return latest_first[:drafted][::-1]
            latest_first.insert(0, token)
        return latest_first[:count][::-1]

    def _next(self, latest_first: list[int]) -> int | None:
        """What followed the last one of the longest matches."""
        size, found, at = self._shortest - 1, None, 0
        while size < self._longest:
            try:
                at = latest_first.index(latest_first[0], at + 1)
            except (ValueError, IndexError):  # no further occurrence; no text
                break
            if (match := self._match(latest_first, at)) > size:
                size, found = match, latest_first[at - 1]
        return found

    def _match(self, latest_first: list[int], at: int) -> int:
        """How many tokens up to ``at`` are those at the text's end; ``longest`` at most."""
        most = min(self._longest, len(latest_first) - at)
        for size in range(1, most):
            if latest_first[at + size] != latest_first[size]:
                return size
        return most
