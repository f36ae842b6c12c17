"""How often a rejection finds that its window was prepared (docs/algorithm.md), by how many were."""

from __future__ import annotations

_MOST, _HALF = 0.85, 0.7  # a guess: of rejections that ever hit, and windows of a request with which half of them do
_WEIGHT = 20.0  # of the guess, in rejections
_FORGET = 0.998  # rejections, with each further one
_HIGHEST = 0.95


class Hits:
    """Belongs to one pace. Learns by how much the guess is off, at whatever numbers of windows there were."""

    def __init__(self) -> None:
        self._found = self._expected = 0.0

    def observe(self, windows_each: float, rejections: int, hits: int) -> None:
        """A round in which a request had so many windows prepared, on average."""
        keep = _FORGET**rejections
        self._found = keep * self._found + hits
        self._expected = keep * self._expected + rejections * _guess(windows_each)

    def chance(self, windows_each: float) -> float:
        """Of a rejection, where each request has so many windows prepared."""
        scale = (self._found + _WEIGHT * _guess(1.0)) / (self._expected + _WEIGHT * _guess(1.0))
        return min(scale * _guess(windows_each), _HIGHEST)


def _guess(windows_each: float) -> float:
    return _MOST * windows_each / (windows_each + _HALF)
