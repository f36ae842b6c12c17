"""Ctrl-C while the engine works."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells report it


class InterruptGuard:
    """While entered, the first Ctrl-C only sets ``requested``; a second one ends the program at once.

    An exception in the middle of a round could leave the engine between two states. The one who generates asks
    ``requested`` between rounds instead, and stops there.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> InterruptGuard:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise SystemExit(INTERRUPTED)
        self.requested = True
