"""The outputs of one prompt while they are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from pearl.driver import Driver, Reader
from pearl.engine.request import Request
from pearl.errors import EngineInUseError
from pearl.gate import Turn
from pearl.outputs import OutputDelta, StreamChunk


class Stream:
    """Iterates over the chunks of a prompt's outputs as they are committed: never a token that could be taken back.

    The requests are queued when the first chunk is asked for. ``close``, the end of a ``with`` block and the end of
    the object abort what has not ended; so does an exception in ``next``, an interruption among them, because what it
    was about to return is lost. EngineInUseError changes nothing: the chunk is still there.
    """

    def __init__(self, driver: Driver, make_requests: Callable[[], Sequence[Request]]) -> None:
        self._driver, self._make_requests = driver, make_requests
        self._reader: Reader | None = None
        self._indices: dict[int, int] = {}  # request id -> index of its output
        self._ended = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamChunk:
        if self._ended:
            raise StopIteration
        try:
            with self._driver.gate.enter() as turn:
                delta = self._next(turn)
                return StreamChunk.of(self._indices[delta.request_id], delta)
        except EngineInUseError:
            raise
        except BaseException:
            self.close()
            raise

    def _next(self, turn: Turn) -> OutputDelta:
        if self._reader is None:
            self._reader = Reader()
            requests = self._make_requests()
            self._indices = {request.id: index for index, request in enumerate(requests)}
            self._driver.submit(self._reader, requests)
        while not self._reader.mail:
            if not self._reader.unfinished:
                raise StopIteration
            turn.checkpoint()
            self._driver.round()
        return self._reader.mail.popleft()

    def close(self) -> None:
        """Abort what has not ended. Where a round is under way that happens after it. Idempotent."""
        self._ended = True
        if self._reader is not None and self._reader.unfinished:
            self._driver.drop(self._reader)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
