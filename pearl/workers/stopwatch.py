"""How long a model works: the device's time, not the host's before it."""

from __future__ import annotations

from pearl.messages import NOT_BUSY, Interval, Mark
from pearl.workers.queue import DeviceQueue


class Stopwatch:
    """Runs from the first launch of a model's work in a round until ``stop``.

    ``start`` is called right before each launch, when batches are packed and under way: a device that rests while the
    host packs would else seem to work, and both models' shares of a round would be wrong.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._begin: Mark | None = None

    def reset(self) -> None:
        """Forget what was begun: a round that failed never stopped."""
        self._begin = None

    def start(self) -> None:
        """Only the first call after ``reset`` counts."""
        if self._begin is None:
            self._begin = self._queue.mark()

    def stop(self) -> Interval:
        """What was measured, until what has been enqueued so far is done."""
        return NOT_BUSY if self._begin is None else self._queue.since(self._begin)
