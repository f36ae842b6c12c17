"""Runs an engine for several readers at once: each call's outputs reach that call, whoever ran the round."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from weakref import WeakValueDictionary

from pearl.engine.engine import Engine
from pearl.engine.request import Request
from pearl.errors import EngineClosedError, EngineInUseError, PearlError
from pearl.gate import Gate
from pearl.outputs import OutputDelta


class Reader:
    """One call's requests: which have not ended, and what the engine has committed of them but nobody has read.

    A reader is known as long as its call holds it and its requests have not ended. What has ended is forgotten inside a
    turn: where a reader's own end does it, later, that happens in Python, and an interruption meanwhile would be lost.
    """

    def __init__(self) -> None:
        self.mail: deque[OutputDelta] = deque()
        self.unfinished: set[int] = set()

    def receive(self, delta: OutputDelta) -> None:
        self.mail.append(delta)
        if delta.finish_reason is not None:
            self.unfinished.discard(delta.request_id)


class Driver:
    """``drop`` may be called at any time; all else only inside a turn."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        """``gate``: of all engines around the same models."""
        self.engine, self.gate = engine, gate
        self._readers: WeakValueDictionary[int, Reader] = WeakValueDictionary()  # by request id
        self._dropped: deque[int] = deque()  # requests to abort before the next round

    def submit(self, reader: Reader, requests: Iterable[Request]) -> None:
        """Queue all of them or none."""
        self._reap()
        try:
            for request in requests:
                self._readers[request.id] = reader
                reader.unfinished.add(request.id)
                self.engine.add(request)
        except BaseException:
            self.drop(reader, inside=True)
            raise

    def round(self) -> None:
        """One round of the engine; what it committed has reached its readers, also if it raises."""
        self._reap()
        if not self.engine.has_work:
            raise PearlError("the engine has lost a request; please report this, and build a new LLM")
        self.gate.hand_over(self.engine)
        try:
            self._distribute(self.engine.step())
        except BaseException:
            self._distribute(self.engine.take())
            raise

    def drop(self, reader: Reader, inside: bool = False) -> None:
        """Abort what has not ended: now, or, where another thread is at the engine, before the next round.

        ``inside``: whether the caller is. May be called at any time.
        """
        self._dropped.extend(reader.unfinished)
        if inside:
            self._reap()
        elif self._dropped:
            with contextlib.suppress(EngineInUseError, EngineClosedError), self.gate.enter():
                self._reap()

    def _reap(self) -> None:
        while self._dropped:
            request_id = self._dropped.popleft()
            self._readers.pop(request_id, None)
            if request_id in self.engine.scheduler.requests:
                self.engine.abort(request_id)

    def close(self) -> None:
        """Close the engine. Readers whose requests had not ended are told so. All models are at rest then."""
        self._reap()
        self.gate.hand_over(self.engine)
        self.engine.close()
        self._distribute(self.engine.take())

    def _distribute(self, outputs: Iterable[OutputDelta]) -> None:
        for delta in outputs:
            ended = delta.finish_reason is not None
            reader = (self._readers.pop if ended else self._readers.get)(delta.request_id, None)
            if reader is not None:
                reader.receive(delta)
