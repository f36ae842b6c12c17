"""What looks on at an engine's rounds, and may fail without harm to them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pearl.engine.rounds import RoundRecord

_LOG = logging.getLogger(__name__)
Observer = Callable[[RoundRecord], None]


class Observers:
    """Calls each with every round's record, on the engine's thread. What one raises is logged, the first time."""

    def __init__(self, *observers: Observer) -> None:
        self._observers: tuple[Observer, ...] = observers
        self._failed: set[int] = set()  # by id
        self._changing = threading.Lock()

    def add(self, observer: Observer) -> None:
        """May be called by any thread."""
        with self._changing:
            self._observers = (*self._observers, observer)

    def remove(self, observer: Observer) -> None:
        """If it is there. May be called by any thread; a call under way may still end."""
        with self._changing:
            self._observers = tuple(each for each in self._observers if each != observer)
            self._failed.discard(id(observer))

    def __call__(self, record: RoundRecord) -> None:
        for observer in self._observers:
            try:
                observer(record)
            except Exception:
                if id(observer) not in self._failed:
                    self._failed.add(id(observer))
                    _LOG.exception("an observer of the engine's rounds failed; it is called again, and not logged")
