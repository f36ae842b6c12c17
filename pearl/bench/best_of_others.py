"""What a contender that chooses by itself reaches of the best of the others."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShareOfBest:
    """median, low, high: of the repeats' ratios, and the quartiles. best: the one that was compared with most often."""

    median: float
    low: float
    high: float
    best: str


def share_of_best(own: Sequence[float], others: Mapping[str, Sequence[float]]) -> ShareOfBest | None:
    """Speeds, of each repeat; the repeats were run in turns. None without others, or of a single repeat.

    In each repeat the speed is compared with that of the contender that was best in all *other* repeats. The one that
    is best in the same repeats is so by luck in part, the more so the more of them there are.
    """
    repeats = min(map(len, (own, *others.values())))
    if not others or repeats < 2:
        return None
    chosen, ratios = Counter[str](), []
    for repeat in range(repeats):
        best = max(others, key=lambda name: statistics.median(_without(others[name][:repeats], repeat)))
        chosen[best] += 1
        ratios.append(own[repeat] / others[best][repeat])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return ShareOfBest(median, low, high, chosen.most_common(1)[0][0])


def _without(values: Sequence[float], index: int) -> list[float]:
    return [*values[:index], *values[index + 1 :]]
