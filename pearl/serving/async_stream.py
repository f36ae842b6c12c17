"""The outputs of one prompt as they reach a client: what has arrived, and is not read yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

from pearl.engine.request import Request
from pearl.outputs import OutputDelta, StreamChunk


class _Unread:
    """Deltas of one output that nobody has read yet, as one: a reader that is slow costs no more than its output."""

    __slots__ = ("drafted", "last", "logprobs", "prompt_logprobs", "sources", "texts", "token_ids")

    def __init__(self, first: OutputDelta) -> None:
        self.last = first
        self.texts, self.token_ids, self.drafted = [first.text], [*first.token_ids], [*first.drafted]
        self.logprobs = None if first.logprobs is None else [*first.logprobs]
        self.prompt_logprobs = first.prompt_logprobs  # which the first delta of an output has
        self.sources = first.sources

    def add(self, delta: OutputDelta) -> None:
        self.last = delta
        self.token_ids += delta.token_ids
        self.drafted += delta.drafted
        self.sources += delta.sources
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
            prompt_logprobs=self.prompt_logprobs,
            sources=self.sources,
        )


class Mailbox:
    """One stream's. Belongs to the event loop."""

    def __init__(self, requests: Sequence[Request]) -> None:
        """``requests``: for its outputs, in order."""
        self._requests = requests
        self._indices = {request.id: index for index, request in enumerate(requests)}
        self._unread: dict[int, OutputDelta | _Unread] = {}  # by request id, in the order of arrival
        self._unfinished = set(self._indices)
        self._arrival: asyncio.Future[None] | None = None  # that a reader waits for, or has

    @property
    def is_open(self) -> bool:
        """Whether there is more to come."""
        return bool(self._unfinished)

    @property
    def is_empty(self) -> bool:
        return not self._unread

    def receive(self, delta: OutputDelta) -> None:
        request_id = delta.request_id
        if request_id not in self._unfinished:
            return
        if delta.finish_reason is not None:
            self._unfinished.discard(request_id)
        unread = self._unread.get(request_id)
        if unread is None:
            self._unread[request_id] = delta
        elif isinstance(unread, _Unread):
            unread.add(delta)
        else:
            self._unread[request_id] = both = _Unread(unread)
            both.add(delta)
        self._wake()

    def fail(self, error: str) -> None:
        """The outputs that have not ended never will."""
        for request in self._requests:
            self.receive(OutputDelta.given_up(request.id, request.metrics, error))

    def shut(self) -> None:
        """Nothing is to be read any more."""
        self._unfinished.clear()
        self._unread.clear()
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def arrival(self) -> asyncio.Future[None]:
        """Of the next delta, or the end. RuntimeError if somebody else is waiting for it."""
        if self._arrival is not None and not self._arrival.done():
            raise RuntimeError("another task is reading this stream; give each task its own")
        self._arrival = asyncio.get_running_loop().create_future()
        return self._arrival

    def take(self) -> StreamChunk:
        """What has waited longest, where there is something."""
        request_id = next(iter(self._unread))
        unread = self._unread.pop(request_id)
        delta = unread.joined() if isinstance(unread, _Unread) else unread
        return StreamChunk.of(self._indices[request_id], delta)


class AsyncStream:
    """Iterates over the chunks of a prompt's outputs as they are committed: never a token that could be taken back.

    ``StreamChunk.index`` says which of the ``n`` outputs goes on; the iteration ends behind the last chunk of the last
    one. What arrives while nobody reads is joined, one chunk for each output. An output that the engine gives up ends
    with a chunk whose ``finish_reason`` is "abort" and whose ``error`` says why. Of an output that goes on ``metrics``
    is live: it may be ahead of the chunk.

    One task reads it. ``cancel``, ``aclose``, the end of an ``async with`` block, the end of the object and the
    cancellation of a task that waits for a chunk abort what has not ended.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[], None]) -> None:
        """``abort``: has the engine end what has not ended; of any thread, any number of times."""
        self._mailbox, self._abort = mailbox, abort

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamChunk:
        while self._mailbox.is_empty:
            if not self._mailbox.is_open:
                raise StopAsyncIteration
            arrival = self._mailbox.arrival()
            try:
                await arrival
            except BaseException:
                self.cancel()
                raise
        return self._mailbox.take()

    def fail(self, error: str) -> None:
        """For the engine that cannot be asked: end with an error what has not ended. On the event loop."""
        self._mailbox.fail(error)

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
