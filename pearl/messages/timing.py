"""When a model worked, and how far a device has come."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol


class Mark(Protocol):
    """A point in the work of a device."""

    def wait(self) -> None:
        """Until the device has come this far."""
        ...


class Interval(Protocol):
    """When a model worked. Of work on a GPU it is known, and waited for, when it is read."""

    @property
    def begin(self) -> float:
        """In time.perf_counter() seconds."""
        ...

    @property
    def seconds(self) -> float: ...


class Busy(NamedTuple):
    """An ``Interval`` that has passed."""

    begin: float
    seconds: float

    @classmethod
    def since(cls, begin: float) -> Busy:
        return cls(begin, time.perf_counter() - begin)


NOT_BUSY = Busy(0.0, 0.0)
