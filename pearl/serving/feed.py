"""From the engine's thread to the event loop: one stream's requests, and what their outputs have for its mailbox."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pearl.driver import Reader
from pearl.engine.request import Request
from pearl.outputs import OutputDelta
from pearl.serving.async_stream import Mailbox

Mail = list[tuple[Mailbox, OutputDelta]]


class Outgoing:
    """What the engine's thread has for the clients, and who they are. The thread's."""

    def __init__(self) -> None:
        self.mail: Mail = []  # since it was last sent
        self.feeds: set[Feed] = set()  # that have not ended
        self.ended = 0  # requests, ever


class Feed(Reader):
    """One stream's requests. The engine's thread owns it from the moment that it is submitted."""

    def __init__(self, requests: Sequence[Request], mailbox: Mailbox, outgoing: Outgoing) -> None:
        super().__init__()
        self.requests = requests
        self._mailbox, self._outgoing = mailbox, outgoing

    def open(self) -> None:
        self.unfinished.update(request.id for request in self.requests)
        self._outgoing.feeds.add(self)

    def receive(self, delta: OutputDelta) -> None:
        if delta.request_id not in self.unfinished:  # it was told another end before
            return
        self._outgoing.mail.append((self._mailbox, delta))
        if delta.finish_reason is not None:
            self._end({delta.request_id})

    def fail(self, error: str) -> None:
        """Tell the client that the outputs which have not ended never will. Leaves the engine alone."""
        for request in self.requests:
            if request.id in self.unfinished:
                request.metrics.finished_at = time.monotonic()
                self.receive(OutputDelta.given_up(request.id, request.metrics, error))

    def leave(self) -> None:
        """The client is gone."""
        self._end(set(self.unfinished))

    def _end(self, request_ids: set[int]) -> None:
        self.unfinished -= request_ids
        self._outgoing.ended += len(request_ids)
        if not self.unfinished:
            self._outgoing.feeds.discard(self)
