"""Prompt lookup: propose what followed the last occurrence of the text's final n-gram. Needs no model and no KV."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pearl.messages import Busy, Drafted, DraftPlan, DraftProposal


class NGramDrafter:
    reads_history = True

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def propose(self, plan: DraftPlan) -> DraftProposal:
        begin = time.perf_counter()
        windows = {}
        for item in plan.work:
            state = item.forward.state
            assert state.history is not None
            tokens = self._lookup(state.history, item.num_draft)
            windows[state.request_id] = tuple(Drafted(token, 0.0, -1) for token in tokens)
        return DraftProposal(windows, busy=Busy.since(begin))

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def _lookup(self, history: Sequence[int], count: int) -> Sequence[int]:
        for size in self._sizes:
            tail = history[-size:]
            for at in range(len(history) - size - 1, -1, -1):
                if history[at : at + size] == tail:
                    return history[at + size : at + size + count]
        return ()
