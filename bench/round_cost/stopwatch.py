"""Where the time of a round goes, part by part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

MODELS = "models"  # what stands for forwards, and kernels: not the host's


class Stopwatch:
    """Charges the time of one thread to the innermost part that it is in; parts of a round add up to the round."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._parts = ["rest"]
        self._since = perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._begin(name)
        try:
            yield
        finally:
            self._end()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, all of whose time is the part's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._begin(name)  # without ``part``, which takes a microsecond: some parts are called for each request
            try:
                return call(*args, **kwargs)
            finally:
                self._end()

        return timed

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap."""
        self._charge()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _begin(self, name: str) -> None:
        self._charge()
        self._parts.append(name)

    def _end(self) -> None:
        self._charge()
        self._parts.pop()

    def _charge(self) -> None:
        now = perf_counter()
        self._seconds[self._parts[-1]] += now - self._since
        self._since = now
