"""Ctrl-C while the engine works."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130  # exit status of a program that Ctrl-C ended: 128 + SIGINT, as shells report it
_PATIENCE = 1.0  # seconds


class InterruptGuard:
    """While entered, the first Ctrl-C only sets ``requested``. One that comes a second later, where nobody has asked by
    then, is passed on at once; a key that is held down, or hit twice, is not.

    An exception in the middle of a round would leave the engine between two states. The one who generates asks
    ``requested`` between rounds instead, and stops there. A guard does nothing where an outer one holds already, and
    where Ctrl-C raises nothing: in other threads than the main one, with SIGINT ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0  # time.monotonic() of the request
        self._holds = True
        self._previous: Any = None  # the handler in whose place this one stands

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            outer = getattr(handler, "__self__", None)
            if callable(handler) and not (isinstance(outer, InterruptGuard) and outer._holds):
                self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def release(self) -> None:
        """From now on Ctrl-C has its usual effect; ``hold`` ends that. What came before is still only ``requested``."""
        self._holds = False

    def hold(self) -> None:
        self._holds = True

    def deliver(self) -> None:
        """Pass on what was requested, now: usually that raises KeyboardInterrupt."""
        if self.requested:
            self.requested = False
            self._previous(signal.SIGINT, sys._getframe())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._holds or (self.requested and now - self._since >= _PATIENCE):
            self._previous(number, frame)
        elif not self.requested:
            self.requested, self._since = True, now
