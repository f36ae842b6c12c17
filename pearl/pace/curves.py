"""How long forwards take: measured while serving, by batch, context and whether the other model works beside; in a
machine's usual mood.

Before anything is measured a forward takes as long as its weights need to be read.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pearl.methods import Mode
from pearl.pace.mood import Mood
from pearl.pace.rounds import Load, MeasuredRound
from pearl.pace.samples import Point, Samples, Summary, summary

Numbers = NDArray[np.float64]

COLD_ROUNDS = 24  # in which memory is touched and code run for the first time: their times are forgotten then
_RECENT = 24  # rounds of a mode
_BEYOND = 1.25  # times the most rows that were measured, or the fewest over it: a guess from there on
_SIMILAR = 1  # steps between contexts whose forwards take about as long
_LEAST = 0.25  # of a forward of the fewest measured rows: what fewer take at least
_ROW_SHARE = 0.05  # a guess: of a forward's time for each of its rows, that one row more costs
_LONGEST_START = 4.0  # steps: what else a window's time cannot be, beside those that it has
_GUESS_WEIGHT, _GUESS_SPREAD = 2, 0.1  # as if in so many rounds rows had differed by this share


@dataclass(frozen=True)
class Sizes:
    """What forwards must read, in bytes, and how fast: a guess that the first measured rounds replace."""

    target_bytes: int
    draft_bytes: int = 0
    bytes_per_second: float = 20e9


@dataclass(frozen=True)
class Times:
    """Seconds of forwards under one load.

    ``points``: rows and seconds of the target's forwards, both ascending; ``slope``: of a row beside them. ``steps``:
    sequences, and what each of the draft's steps took in windows of ``typical`` tokens; ``start``: so many steps' time
    goes by before the first.
    """

    points: tuple[Point, ...]
    slope: float
    steps: tuple[Point, ...]
    typical: float = 1.0
    start: float = 0.0

    @cached_property
    def _target(self) -> tuple[Numbers, Numbers]:
        x, y = np.array(self.points).T
        return x, y

    @cached_property
    def _draft(self) -> tuple[Numbers, Numbers]:
        x, y = np.array(self.steps).T
        return x, y

    def target(self, rows: Numbers) -> Numbers:
        x, y = self._target
        below, above = np.minimum(rows - x[0], 0.0), np.maximum(rows - x[-1], 0.0)
        seconds = np.interp(rows, x, y) + self.slope * (below + above)
        at_least: Numbers = np.maximum(seconds, _LEAST * y[0])
        return at_least

    def window(self, tokens: Numbers, sequences: Numbers) -> Numbers:
        """Of drafting so many tokens for each of so many sequences."""
        x, y = self._draft
        more: Numbers = np.maximum(sequences - x[-1], 0.0) * (_ROW_SHARE * y[-1] / x[-1])
        step = np.interp(sequences, x, y) + more
        seconds: Numbers = step * (tokens + self.start) * (self.typical / (self.typical + self.start))
        return seconds


@dataclass
class _Forwards:
    target: Samples = field(default_factory=Samples)  # by rows
    draft: Samples = field(default_factory=Samples)  # of a step, by sequences
    windows: Samples = field(default_factory=Samples)  # of all steps together, by their number


_Key = tuple[tuple[int, int], bool]  # bucket, beside


class Curves:
    """Belongs to one pace."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._samples: defaultdict[_Key, _Forwards] = defaultdict(_Forwards)
        self._overhead: defaultdict[tuple[int, Mode], deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self._known: dict[tuple[Load, bool, str], Summary] = {}  # until the next round is measured
        self.mood = Mood()
        self.felt = 1.0  # how many times longer than usual the latest round's forwards took
        self.rounds = 0
        self._share, self._share_of = _ROW_SHARE, -1  # ``_row_share``, and after which round it was found

    def observe(self, measured: MeasuredRound, steady: bool = True, looks: bool = False) -> None:
        """``steady``: whether its times are those of rounds of its kind; else it only counts as one. ``looks``: whether
        its kind runs for a moment only, to be measured in the mood of the rounds before: by its own, what is wrongly
        known of it would look like a mood, and stay.
        """
        self.rounds += 1
        if self.rounds == COLD_ROUNDS:
            self._samples.clear()
            self._overhead.clear()
        self._known.clear()
        if not steady:
            self.felt = self.mood.factor
            return
        beside = bool(measured.target_seconds and measured.draft_seconds)
        samples = self._samples[measured.load.bucket, beside]
        mood = self.felt = self.mood.factor
        if not looks:  # its own mood would make its times the usual ones
            self._feel(measured, samples)
        target, draft = measured.target_seconds / mood, measured.draft_seconds / mood
        if target:
            samples.target.add(measured.target_rows, target, self.rounds)
        if draft:
            samples.draft.add(max(1, measured.draft_sequences), draft / measured.draft_steps, self.rounds)
            samples.windows.add(measured.draft_steps, draft, self.rounds)
        rest = max(0.0, measured.seconds / mood - max(target, draft))
        self._overhead[measured.load.batch.bit_length(), measured.mode].append(rest)

    def _feel(self, measured: MeasuredRound, samples: _Forwards) -> None:
        """Learn the mood from a round, by what was known before it."""
        seconds = usual = 0.0
        if measured.target_seconds and (known := samples.target.usual(measured.target_rows, self._share)):
            seconds, usual = measured.target_seconds, known
        if measured.draft_seconds and (known := samples.draft.usual(max(1, measured.draft_sequences), _ROW_SHARE)):
            seconds, usual = seconds + measured.draft_seconds, usual + known * measured.draft_steps
        if usual:
            self.felt = seconds / usual
            self.mood.observe(self.felt)

    def knows(self, load: Load, beside: bool, rounds: int) -> bool:
        """Whether so many rounds of about such a load were measured, of both models."""
        (batch, context), enough = load.bucket, 0
        for (key, state), samples in self._samples.items():
            if state == beside and abs(key[0] - batch) <= 1 and abs(key[1] - context) <= 2:
                enough = max(enough, min(samples.target.count, samples.draft.count))
        return enough >= rounds

    def covers(self, load: Load, beside: bool, rows: float) -> bool:
        """Whether about so many rows of the target were measured, or fewer and more; not while memory was cold."""
        points = self._about(load, beside, "target").points
        known = bool(points) and self.rounds >= COLD_ROUNDS
        return known and points[0][0] / _BEYOND <= rows <= _BEYOND * points[-1][0]

    def overhead(self, batch: int, mode: Mode) -> float:
        """Seconds of a mode's round beyond its longer forward: the mean, as its rounds may be of several kinds, without
        the tenth that took longest.
        """
        size = batch.bit_length()
        known = [key for key, samples in self._overhead.items() if samples]
        if not known:
            return 0.0
        samples = sorted(self._overhead[min(known, key=lambda key: 2 * abs(key[0] - size) + 3 * (key[1] != mode))])
        return statistics.fmean(samples[: max(1, len(samples) * 9 // 10)])

    def spread(self, load: Load) -> float:
        """The relative error of what is known of the target's times, from their own scatter."""
        return max(self._about(load, beside, "target").error for beside in (True, False))

    def times(self, load: Load, beside: bool) -> Times:
        here, there = (self._about(load, state, "target") for state in (beside, not beside))
        steps, sizes = self._about(load, beside, "draft").points, self._sizes
        points = here.points or ((1.0, sizes.target_bytes / sizes.bytes_per_second),)
        if not steps:
            # As many times faster than the target as it is smaller.
            scale = points[0][1] / sizes.target_bytes if sizes.target_bytes else 0.0
            steps = ((1.0, sizes.draft_bytes * scale),)
        windows = self._near(load, beside, "windows")[
            :1
        ]  # of one size of batch: longer ones would not be told from larger
        typical, start = _start(summary([self._samples[key].windows for key in windows]))
        return Times(points, self._slope(here, there, points[0]), steps, typical, start)

    def _slope(self, here: Summary, there: Summary, guess: Point) -> float:
        """Seconds of a row beside the measured ones: what rows cost in both states of the draft, least squares, drawn
        towards what they cost under other loads as long as their numbers hardly differ and noise would decide.
        """
        known = here.sums if here.sums.n else there.sums
        x, y = (known.x / known.n, known.y / known.n) if known.n else guess
        xx = _GUESS_WEIGHT * (_GUESS_SPREAD * x) ** 2
        xy = xx * self._row_share() * y / x
        for measured in (here, there):
            more_xx, more_xy = measured.sums.around_the_means()
            xx, xy = xx + more_xx, xy + more_xy
        return max(0.0, xy / xx)

    def _row_share(self) -> float:
        """Of a forward's time for each of its rows, what one row more costs, under all loads that were measured."""
        if self._share_of != self.rounds:
            xx, xy = _GUESS_WEIGHT * _GUESS_SPREAD**2, _GUESS_WEIGHT * _GUESS_SPREAD**2 * _ROW_SHARE
            for forwards in self._samples.values():
                more_xx, more_xy = summary([forwards.target]).sums.around_the_means(relative=True)
                xx, xy = xx + more_xx, xy + more_xy
            self._share, self._share_of = max(0.0, xy / xx), self.rounds
        return self._share

    def _about(self, load: Load, beside: bool, name: str) -> Summary:
        """What the forwards of that ``name`` take under such a load, rather with the other model in the same state than
        without; by rows that it did not have yet, what they took in batches of other sizes.
        """
        if (known := self._known.get((load, beside, name))) is None:
            near = self._near(load, beside, name)
            alike = [key for key in near if key[1] == near[0][1] and abs(key[0][1] - near[0][0][1]) <= _SIMILAR]
            known = summary([getattr(self._samples[key], name) for key in alike])
            self._known[load, beside, name] = known
        return known

    def _near(self, load: Load, beside: bool, name: str) -> list[_Key]:
        """Where such forwards were measured, the most similar load first."""
        size, (_, context) = math.log2(load.batch) + 0.5, load.bucket

        def distance(key: _Key) -> float:
            return 4 * abs(key[0][0] - size) + abs(key[0][1] - context) + 3 * (key[1] != beside)

        return sorted([key for key in self._samples if getattr(self._samples[key], name).count], key=distance)


def _start(windows: Summary) -> Point:
    """The typical number of a window's steps, and how many steps' time goes by before the first: least squares, drawn
    towards none as long as windows hardly differ in length.
    """
    n, x, y, *_ = windows.sums
    if not n or not y:
        return 1.0, 0.0
    x, y = x / n, y / n
    weight = _GUESS_WEIGHT * (_GUESS_SPREAD * x) ** 2
    xx, xy = windows.sums.around_the_means()
    step = max((weight * y / x + xy) / (weight + xx), y / (x + _LONGEST_START))
    return x, max(0.0, y / step - x)
