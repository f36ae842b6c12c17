"""Seconds that were measured, by what they depend on, and what they say together."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_RECENT = 64  # samples of about the same x that are kept,
_OLD = 96  # rounds after which one no longer counts beside newer ones
_RATIO = 1.12  # of x that count as the same
_ENOUGH = 3  # samples

Point = tuple[float, float]


class Sums(NamedTuple):
    """Of samples (x, y): their number, and sums of powers."""

    n: float = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    @staticmethod
    def of(samples: Iterable[Point]) -> Sums:
        n, sum_x, sum_y, xx, xy = 0, 0.0, 0.0, 0.0, 0.0
        for x, y in samples:
            n, sum_x, sum_y, xx, xy = n + 1, sum_x + x, sum_y + y, xx + x * x, xy + x * y
        return Sums(n, sum_x, sum_y, xx, xy)

    def around_the_means(self, relative: bool = False) -> Point:
        """Sums of squares of x, and of products of x and y, around their means; ``relative``: in shares of these."""
        if not self.n:
            return 0.0, 0.0
        xx, xy = max(0.0, self.xx - self.x**2 / self.n), self.xy - self.x * self.y / self.n
        if relative:
            mean_x, mean_y = self.x / self.n, self.y / self.n
            xx, xy = xx / mean_x**2, xy / (mean_x * mean_y)
        return xx, xy


class _Median(NamedTuple):
    """Of samples of about the same x. scatter: of their relative distances from the median, the median."""

    x: float
    y: float
    n: int
    scatter: float
    sums: Sums


class _Group:
    """The latest samples of about the same x."""

    def __init__(self) -> None:
        self._samples: deque[Point] = deque(maxlen=_RECENT)
        self._rounds: deque[int] = deque(maxlen=_RECENT)  # in which they were measured
        self._median: _Median | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, x: float, y: float, now: int) -> None:
        while self._rounds and now - self._rounds[0] > _OLD:
            self._samples.popleft()
            self._rounds.popleft()
        self._samples.append((x, y))
        self._rounds.append(now)
        self._median = None

    @property
    def median(self) -> _Median:
        if self._median is None:
            sums, y = Sums.of(self._samples), statistics.median([y for _, y in self._samples])
            scatter = statistics.median([abs(one / y - 1) for _, one in self._samples]) if y else 0.0
            self._median = _Median(sums.x / sums.n, y, len(self._samples), scatter, sums)
        return self._median


class Summary(NamedTuple):
    """points: x and median y, both ascending. sums: of all samples. error: the relative one of y, from its scatter."""

    points: tuple[Point, ...] = ()
    sums: Sums = Sums()
    error: float = 0.0


class Samples:
    """Of about the same x the latest are kept, so that rare ones are not driven out."""

    def __init__(self) -> None:
        self.groups: dict[int, _Group] = {}  # by about the logarithm of x
        self.count = 0

    def usual(self, x: float, share: float) -> float:
        """Seconds at x, where there are enough samples about it, else 0. share: of a change of x, what that changes."""
        group = self.groups.get(round(math.log(x, _RATIO)))
        if group is None or len(group) < _ENOUGH:
            return 0.0
        return group.median.y * (1 + share * (x / group.median.x - 1))

    def add(self, x: float, seconds: float, now: int) -> None:
        """``now``: a count of rounds."""
        group = round(math.log(x, _RATIO))
        if group not in self.groups:
            self.groups[group] = _Group()
        self.groups[group].add(x, seconds, now)
        self.count += 1


def summary(samples: Sequence[Samples]) -> Summary:
    """What they say together: about each x the first one that has ``_ENOUGH`` samples, or the one that has most."""
    heard: dict[int, _Median] = {}
    for one in samples:
        for group, measured in one.groups.items():
            known = heard.get(group)
            if known is None or known.n < min(_ENOUGH, len(measured)):
                heard[group] = measured.median
    medians = [heard[group] for group in sorted(heard)]
    if not medians:
        return Summary()
    sums = Sums(*map(sum, zip(*(median.sums for median in medians), strict=True)))
    scatter = sum(median.n * median.scatter for median in medians)
    return Summary(_rising(medians), sums, scatter / sums.n**1.5)


def _rising(medians: Iterable[_Median]) -> tuple[Point, ...]:
    """Times of forwards rise with x; neighbours in the wrong order become one."""
    points: list[tuple[float, float, int]] = []
    for median in medians:
        x, y, n = median.x, median.y, median.n
        while points and points[-1][1] > y:
            x0, y0, n0 = points.pop()
            x, y, n = (x0 * n0 + x * n) / (n0 + n), (y0 * n0 + y * n) / (n0 + n), n0 + n
        points.append((x, y, n))
    return tuple([(x, y) for x, y, _ in points])
