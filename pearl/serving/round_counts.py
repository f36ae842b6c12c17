"""What the pace does under this load: rounds, seconds and tokens of each mode, and the tokens that were predicted."""

from __future__ import annotations

from typing import NamedTuple

from pearl.engine.rounds import RoundRecord
from pearl.methods import Mode


class ModeCounts(NamedTuple):
    rounds: int = 0
    seconds: float = 0.0
    tokens: int = 0  # committed
    predicted: float = 0.0  # tokens, where the pace predicts


class RoundCounts:
    """An observer: one writer, the engine's thread. Who reads takes what is there just now."""

    def __init__(self) -> None:
        self.by_mode: dict[Mode, ModeCounts] = {}

    def __call__(self, record: RoundRecord) -> None:
        pace = record.plan.pace
        if pace is None:  # nothing ran but prompts
            return
        rounds, seconds, tokens, predicted = self.by_mode.get(pace.mode, ModeCounts())
        new, took = sum([len(d.committed) for d in record.result.decisions.values()]), record.whole.seconds
        # Replaced whole: a reader never sees half of a round.
        self.by_mode[pace.mode] = ModeCounts(
            rounds + 1, seconds + took, tokens + new, predicted + took * pace.tokens_per_second
        )
