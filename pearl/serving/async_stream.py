"""The outputs of one prompt as they reach a client: what has arrived, and is not read yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType

from pearl.outputs import OutputDelta, StreamChunk


class _Unread:
    """Deltas of one output that nobody has read yet, as one: a reader that is slow costs no more than its output."""

    __slots__ = ("drafted", "last", "logprobs", "texts", "token_ids")

    def __init__(self, first: OutputDelta) -> None:
        self.last = first
        self.texts, self.token_ids, self.drafted = [first.text], [*first.token_ids], [*first.drafted]
        self.logprobs = None if first.logprobs is None else [*first.logprobs]

    def add(self, delta: OutputDelta) -> None:
        self.last = delta
        self.token_ids += delta.token_ids
        self.drafted += delta.drafted
        if delta.text:
            self.texts.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs

    def joined(self) -> OutputDelta:
        return self.last._replace(
            token_ids=tuple(self.token_ids),
            drafted=tuple(self.drafted),
            text="".join(self.texts),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


class Mailbox:
    """One stream's. Belongs to the event loop."""

    def __init__(self, request_ids: Iterable[int]) -> None:
        """``request_ids``: of its outputs, in order."""
        self._indices = {request_id: index for index, request_id in enumerate(request_ids)}
        self._unread: dict[int, OutputDelta | _Unread] = {}  # by request id, in the order of arrival
        self._unfinished = len(self._indices)
        self._reader: asyncio.Future[None] | None = None  # who waits

    @property
    def is_open(self) -> bool:
        """Whether there is more to come."""
        return self._unfinished > 0

    def receive(self, delta: OutputDelta) -> None:
        if not self._unfinished:
            return
        if delta.finish_reason is not None:
            self._unfinished -= 1
        unread = self._unread.get(delta.request_id)
        if unread is None:
            self._unread[delta.request_id] = delta
        elif isinstance(unread, _Unread):
            unread.add(delta)
        else:
            self._unread[delta.request_id] = both = _Unread(unread)
            both.add(delta)
        self._wake()

    def shut(self) -> None:
        """Nothing is to be read any more."""
        self._unfinished = 0
        self._unread.clear()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def next(self) -> StreamChunk:
        """StopAsyncIteration behind the end. RuntimeError if somebody else is waiting for it."""
        while not self._unread:
            if not self._unfinished:
                raise StopAsyncIteration
            if self._reader is not None:
                raise RuntimeError("another task is reading this stream; give each task its own")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        request_id = next(iter(self._unread))
        unread = self._unread.pop(request_id)
        d = unread.joined() if isinstance(unread, _Unread) else unread
        index = self._indices[request_id]
        return StreamChunk(index, d.text, d.token_ids, d.drafted, d.finish_reason, d.metrics, d.error, d.logprobs)


class AsyncStream:
    """Iterates over the chunks of a prompt's outputs as they are committed: never a token that could be taken back.

    ``StreamChunk.index`` says which of the ``n`` outputs goes on; the iteration ends behind the last chunk of the last
    one. What arrives while nobody reads is joined, one chunk for each output. An output that the engine gives up ends
    with a chunk whose ``finish_reason`` is "abort" and whose ``error`` says why. Of an output that goes on ``metrics``
    is live: it may be ahead of the chunk.

    One task reads it. ``cancel``, ``aclose``, the end of an ``async with`` block, the end of the object and the
    cancellation of a task that waits for a chunk abort what has not ended, as does any exception in there.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[], None]) -> None:
        """``abort``: has the engine end what has not ended; of any thread, any number of times."""
        self._mailbox, self._abort = mailbox, abort

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamChunk:
        try:
            return await self._mailbox.next()
        except (StopAsyncIteration, RuntimeError):
            raise
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Abort what has not ended; its pages are free within a round, and the iteration ends. Idempotent.

        Called on the event loop.
        """
        if self._mailbox.is_open:
            self._abort()
        self._mailbox.shut()

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:  # in whichever thread: nobody can be waiting for a chunk
        if self._mailbox.is_open:
            self._abort()
