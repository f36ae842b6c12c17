"""Lookahead decoding's way to draft (arXiv 2402.02057), without a model: n-grams that the target guessed before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bench.evaluation.guesses import GuessPool
from pearl.drafting import Drafter
from pearl.messages import Busy, Drafted, DraftPlan, DraftProposal

_STRIDE = 7919  # a prime: fillers come from all over the text


class LookaheadDrafter:
    """A window is n-grams of the pool, one after another; where there is none, the guesses of the latest iteration for
    these positions; behind them tokens of the text, which the next iteration replaces, as the paper begins with random
    ones. So each window is as long as it may be: the target's guesses at its rows are the next iteration.
    """

    reads_history = True
    hidden_layers: tuple[int, ...] = ()
    most_behind = 0
    prepares = False

    def __init__(self, pool: GuessPool) -> None:
        self._pool = pool

    @classmethod
    def around(cls, pool: GuessPool) -> Callable[[Drafter], Drafter]:
        """In the place of any drafter that keeps no KV."""
        return lambda replaced: cls(pool)

    def propose(self, plan: DraftPlan) -> DraftProposal:
        begin = time.perf_counter()
        windows = {}
        for item in plan.work:
            state = item.forward.state
            assert state.history is not None
            tokens = self._window(state.request_id, state.history, item.num_draft)
            windows[state.request_id] = tuple(Drafted(token, 0.0, -1) for token in tokens)
        return DraftProposal(windows, busy=Busy.since(begin))

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def _window(self, request_id: int, history: Sequence[int], count: int) -> list[int]:
        found = self._pool.phrase(request_id, history[-1], count)
        found += self._pool.ahead(request_id)[len(found) : count]
        return found + [history[index * _STRIDE % len(history)] for index in range(len(found), count)]
