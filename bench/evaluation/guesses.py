"""What the target guesses in parallel: the likeliest token at each row that it verifies, also behind a rejected one.

Behind the first rejected token a row's guess rests on tokens that were wrong: that is an iteration of Jacobi's method,
as in Lookahead decoding (arXiv 2402.02057), which collects n-grams from such iterations. There a forward has rows of
its own for it, of several iterations at once, and verifies several n-grams as branches. Here the rows are those of the
window that is verified, and one candidate is verified at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.evaluation.anatomy import TimedJudge
from pearl.engine.judge import Judge
from pearl.messages import DraftProposal, SchedulerOutput, TargetOutput, VerifyResult

NGRAM = 5  # tokens of the longest, its first one, by which it is found, included


@dataclass
class _Guesses:
    """Of one request. tails: by their first token, what was guessed to follow it. ahead: behind the latest
    correction."""

    tails: dict[int, tuple[int, ...]] = field(default_factory=dict)
    ahead: list[int] = field(default_factory=list)


class GuessPool:
    """Written between rounds, read in them. Lookahead keeps several n-grams for a token; here the latest one stays."""

    def __init__(self) -> None:
        self._of: defaultdict[int, _Guesses] = defaultdict(_Guesses)

    def clear(self) -> None:
        self._of.clear()

    def observe(self, request_id: int, judged: Sequence[int], guesses: Sequence[int], held: int) -> None:
        """``judged``: the last committed token and the ones that were tested behind it; ``guesses``: what the target
        would put behind each of these; ``held``: how many of the tested ones did.
        """
        own = self._of[request_id]
        for start, token in enumerate(judged):
            tail = tuple(guesses[start : start + NGRAM - 1])
            # The end of a window has short ones; they do not replace what is longer and begins alike.
            if own.tails.get(token, ())[: len(tail)] != tail:
                own.tails[token] = tail
        own.ahead = list(guesses[held + 1 :])

    def phrase(self, request_id: int, token: int, most: int) -> list[int]:
        """What may follow the token, n-gram after n-gram."""
        found: list[int] = []
        tails = self._of[request_id].tails
        while len(found) < most and (tail := tails.get(token)):
            found += tail
            token = found[-1]
        return found[:most]

    def ahead(self, request_id: int) -> Sequence[int]:
        """What was guessed to follow the latest correction."""
        return self._of[request_id].ahead


class ListeningJudge(TimedJudge):
    """Tells a pool what the target guessed at each row."""

    def __init__(self, judge: Judge, pool: GuessPool, vocab_size: int) -> None:
        super().__init__(judge)
        self._pool, self._vocab_size = pool, vocab_size

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        result = super().verify(plan, proposal, target)
        if not result.decisions or target.logits is None:
            return result
        likeliest = target.logits[:, : self._vocab_size].argmax(dim=-1).tolist()
        forwards, begin = {}, 0
        for forward in plan.target.work:
            forwards[forward.state.request_id] = (forward, likeliest[begin : begin + forward.num_logits])
            begin += forward.num_logits
        for work in plan.verify:
            forward, rows = forwards[work.request_id]
            decision, count = result.decisions[work.request_id], forward.end + 1 - work.position
            before = forward.tokens[work.position - 1 - forward.start]
            judged = (before, *decision.tested)[:count]
            self._pool.observe(work.request_id, judged, rows[-count:], decision.accepted)
        return result
