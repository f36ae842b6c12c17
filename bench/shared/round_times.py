"""Which rounds say how long decoding takes, and how their parts lie beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.engine.rounds import RoundRecord
from pearl.messages import Interval

_PROMPT_TOKENS = 2  # a draft that computes more of them at once is at a prompt


def only_decodes(record: RoundRecord) -> bool:
    """Nothing in it was of a prompt, and nothing was captured or compiled."""
    plan = record.plan
    if any(len(w.tokens) != w.num_logits for w in plan.target.work) or record.preparations:
        return False
    return all(len(w.forward.tokens) <= _PROMPT_TOKENS for w in plan.draft.work)


def together(intervals: Sequence[Interval]) -> float:
    """Seconds that at least one of them covers."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted((i.begin, i.begin + i.seconds) for i in intervals if i.seconds):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered
