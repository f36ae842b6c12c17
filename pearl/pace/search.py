"""The best windows of a mode, by prediction: all alike, or each as long as its tokens pay; and how many to prepare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pearl.methods import Mode
from pearl.pace.acceptance import Odds
from pearl.pace.curves import Numbers
from pearl.pace.hits import Hits
from pearl.pace.speed import Situation, tokens_per_second

_RAGGED = 1.02  # by how much windows of their own must promise more: odds of single requests are noisy
_PREPARED = (1, 2, 3, 4, 6, 8, 16, 32)  # windows that are looked at, if so many may be,
_WORTH_PREPARING = 1.01  # and by how much they must promise more than none


@dataclass(frozen=True)
class Choice:
    mode: Mode
    longest: int
    threshold: float  # a request drafts no token that is reached with a smaller chance
    predicted: float  # tokens per second, in the machine's usual mood,
    factor: float  # and how far such predictions were off
    informed: bool = False  # whether the times that it rests on were measured
    prepared: int = 0  # windows beside those of the requests

    @property
    def rate(self) -> float:
        return self.predicted * self.factor

    def windows(self, odds: Sequence[Odds]) -> list[int]:
        later = np.array([one.later for one in odds])
        windows: list[int] = (
            _ragged(np.array([self.longest]), np.array([self.threshold]), later)[0].astype(int).tolist()
        )
        return windows


class Search:
    """``largest``: the longest window; ``most_prepared``: windows that may be prepared in a round; ``hits``: how often
    one of these is the right one.
    """

    def __init__(self, largest: int, most_prepared: int, hits: Hits) -> None:
        self._largest, self._hits = largest, hits
        self._prepared = [number for number in _PREPARED if number <= most_prepared]

    def best(self, mode: Mode, now: Situation, factor: float) -> Choice:
        """Of a mode, with as many prepared windows as pay: all windows alike, or each as long as its tokens pay for the
        rows that they cost the target.
        """
        longest = self._windows(mode)
        prepared = self._pays(now, longest) if mode == "pearl" and self._prepared else 0
        now = self._with(now, prepared)
        alike = longest[:, None] * np.ones_like(now.count)
        rates = tokens_per_second(mode, now, alike)
        best = int(np.argmax(rates))
        choice = Choice(mode, int(longest[best]), 0.0, float(rates[best]), factor, prepared=prepared)
        if len(now.count) == 1 or mode == "autoregressive":
            return choice
        thresholds = rates * _row_seconds(now, alike)
        ragged = _ragged(longest, thresholds, now.later)
        rates = tokens_per_second(mode, now, ragged)
        best = int(np.argmax(rates))
        if rates[best] > _RAGGED * choice.predicted:
            predicted, threshold = float(rates[best]), float(thresholds[best])
            choice = replace(choice, longest=int(longest[best]), threshold=threshold, predicted=predicted)
        return choice

    def _pays(self, now: Situation, longest: Numbers) -> int:
        """How many prepared windows do, in PEARL: all numbers with all windows at once."""
        numbers = np.array([0, *self._prepared], dtype=np.float64)
        hits = np.array([self._hits.chance(number / now.batch) for number in numbers])
        prepared, windows = np.repeat(numbers, len(longest)), np.tile(longest, len(numbers))
        every = replace(now, prepared=prepared, hits=np.repeat(hits, len(longest))[:, None])
        rates = tokens_per_second("pearl", every, windows[:, None] * np.ones_like(now.count))
        rates[(prepared > 0) & (windows < 2)] = 0.0  # nothing would be pending
        best = rates.reshape(len(numbers), -1).max(1)
        index = int(np.argmax(best))
        return int(numbers[index]) if best[index] > _WORTH_PREPARING * best[0] else 0

    def _with(self, now: Situation, prepared: int) -> Situation:
        if not prepared:
            return now
        return replace(now, prepared=np.array(float(prepared)), hits=np.array(self._hits.chance(prepared / now.batch)))

    def _windows(self, mode: Mode) -> Numbers:
        return np.arange(1, (1 if mode == "autoregressive" else self._largest) + 1, dtype=np.float64)

    def others(self, choice: Choice, now: Situation) -> list[Choice]:
        """The same mode with every other window, all alike."""
        alike = self._windows(choice.mode)[:, None] * np.ones_like(now.count)
        rates = enumerate(tokens_per_second(choice.mode, self._with(now, choice.prepared), alike).tolist(), 1)
        return [
            replace(choice, longest=window, threshold=0.0, predicted=rate)
            for window, rate in rates
            if window != choice.longest
        ]

    def again(self, choice: Choice, now: Situation, factor: float) -> Choice:
        """The same choice, with what is predicted now."""
        windows = _ragged(np.array([choice.longest]), np.array([choice.threshold]), now.later)
        predicted = float(tokens_per_second(choice.mode, self._with(now, choice.prepared), windows)[0])
        return replace(choice, predicted=predicted, factor=factor)


def _row_seconds(now: Situation, windows: Numbers) -> Numbers:
    """``[W]``: what one row more costs the target where each request has so many."""
    rows = (now.count * windows).sum(1)
    seconds: Numbers = (now.beside.target(1.1 * rows) - now.beside.target(rows)) / (0.1 * rows)
    return seconds


def _ragged(longest: Numbers, thresholds: Numbers, later: Numbers) -> Numbers:
    """``[W, C]``: windows up to ``longest`` whose every token is reached with a chance of ``thresholds`` at least."""
    with np.errstate(divide="ignore"):
        worth = 1 + np.floor(np.log(thresholds)[:, None] / np.log(later)[None, :])
    return np.clip(np.where(thresholds[:, None] > 0, worth, np.inf), 1, longest[:, None])
