"""Who may drive an engine: one thread at a time, of the process that built it, and Ctrl-C between rounds only."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

from pearl.errors import EngineClosedError, EngineInUseError
from pearl.interrupts import InterruptGuard

T = TypeVar("T")


class Restful(Protocol):
    def rest(self) -> None: ...


class Gate:
    """Of one engine, or of several that share models. ``enter`` is a context manager, not reentrant."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._holder: str | None = None
        self._engine: Restful | None = None  # whose rounds were the latest

    @property
    def is_ours(self) -> bool:
        """Whether this process built the engine; a forked one has its memory, but none of its threads."""
        return os.getpid() == self._process

    def enter(self) -> Turn:
        """Raises, when entered, EngineInUseError or EngineClosedError."""
        return Turn(self)

    def take(self) -> None:
        if not self.is_ours:
            raise EngineClosedError(
                f"this engine belongs to process {self._process}, of which process {os.getpid()} is a fork; "
                "build the LLM in the process that uses it, and start that one with multiprocessing's 'spawn': torch's "
                "threads do not survive a fork either"
            )
        if not self._lock.acquire(blocking=False):
            raise EngineInUseError(
                f"this LLM is in use by thread {self._holder!r}; use it from one thread at a time, and not from an "
                "observer: give each thread its own LLM, or put a lock around this one"
            )
        self._holder = threading.current_thread().name

    def leave(self) -> None:
        self._lock.release()

    def hand_over(self, engine: Restful) -> None:
        """Inside a turn, before a round of ``engine``: another around the same models may have left one in flight."""
        if self._engine is not None and self._engine is not engine:
            self._engine.rest()
        self._engine = engine


class Turn:
    """One use of the engine. Ctrl-C has no effect but at a ``checkpoint``, ``outside``, and when it ends."""

    def __init__(self, gate: Gate) -> None:
        self._gate, self._guard = gate, InterruptGuard()
        self.inside = False

    def __enter__(self) -> Turn:
        self._guard.__enter__()  # first: an interruption behind ``take`` would leave the gate shut for ever
        try:
            self._take()
        except BaseException:
            self._guard.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._guard.hold()
        self._leave()
        self._guard.__exit__(kind, value, traceback)
        self._guard.deliver()

    def checkpoint(self) -> None:
        """Between two rounds: an interruption takes effect here."""
        self._guard.deliver()

    def outside(self, call: Callable[[T], object], argument: T) -> None:
        """Call a caller's own code between two rounds: it may be interrupted, and may use the engine itself.

        After it another thread may be at the engine: EngineInUseError. Where it raises, the turn is not ``inside`` any
        more. It is no context manager of a generator's: one that an interruption leaves unfinished would take the gate
        when it is collected.
        """
        self._guard.deliver()
        self._leave()
        self._guard.release()
        try:
            call(argument)
        finally:
            self._guard.hold()
        self._take()

    def _take(self) -> None:
        self._gate.take()
        self.inside = True

    def _leave(self) -> None:
        if self.inside:
            self.inside = False
            self._gate.leave()
