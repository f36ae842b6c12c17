"""The thread that runs an engine's rounds for a service. What it is asked to do comes through one queue, between
rounds; what a round commits goes to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from queue import SimpleQueue
from typing import NamedTuple

from pearl.errors import EngineClosedError, EngineInUseError, PearlError
from pearl.llm import LLM
from pearl.serving.feed import Feed, Mail, Outgoing
from pearl.workers.worker import Reply

_LOG = logging.getLogger(__name__)


class Submit(NamedTuple):
    feed: Feed
    loop: asyncio.AbstractEventLoop  # its client's


class Cancel(NamedTuple):
    feed: Feed


class TellWhenIdle(NamedTuple):
    told: asyncio.Future[None]


class End(NamedTuple):
    pass


Command = Submit | Cancel | TellWhenIdle | End


class EngineThread:
    """``run`` is the thread. ``inbox`` may be filled by any; the other attributes may be read by any."""

    def __init__(self, llm: LLM) -> None:
        self.inbox: SimpleQueue[Command] = SimpleQueue()
        self.outgoing = Outgoing()
        self.failure: str | None = None  # why no round can follow
        self.round_began: float | None = None  # time.monotonic() of the round under way
        self.running, self.kv_usage = 0, 0.0  # when the latest round ended
        self._llm, self._driver = llm, llm.driver
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: list[TellWhenIdle] = []

    def run(self, started: Reply[None]) -> None:
        """``started``: the engine is this thread's now; or it raises EngineInUseError, EngineClosedError."""
        started.run(self._take)
        try:
            started.result()
        except PearlError:
            return
        try:
            self._live()
        finally:
            self._driver.gate.leave()
            self._close_llm()

    def _take(self) -> None:
        self._driver.gate.take()
        if self._driver.engine.has_work:
            self._driver.gate.leave()
            raise EngineInUseError("this LLM has streams that have not ended; read or close them first")

    def _live(self) -> None:
        """Until the end is asked for, whatever happens before."""
        try:
            while self._obey_all():
                self._round()
        except BaseException as error:  # whoever waits for an output must not wait for ever
            self._die(error)
            while not isinstance(command := self.inbox.get(), End):
                self._refuse(command)
        else:
            self._abort_rest()

    def _abort_rest(self) -> None:
        try:
            self._driver.close()
        except BaseException as error:
            self._die(error)
        self._send()
        self._tell_idle()

    def _obey_all(self) -> bool:
        """What has been asked for until now, or, where there is nothing to do, until there is. False: the end."""
        while True:
            if self.inbox.empty():
                if self._driver.engine.has_work:
                    return True
                self._rest()
            command = self.inbox.get()
            if isinstance(command, End):
                return False
            self._obey(command)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._submit(command)
        elif isinstance(command, Cancel):
            self._drop(command.feed)
        elif isinstance(command, TellWhenIdle):
            self._idle.append(command)

    def _submit(self, command: Submit) -> None:
        feed = command.feed
        if command.loop is not self._loop:
            self._drop_all()  # their loop is closed
            self._loop = command.loop
        feed.open()
        try:
            self._driver.submit(feed, feed.requests)
        except PearlError as error:
            feed.fail(str(error))

    def _drop(self, feed: Feed) -> None:
        self._driver.drop(feed, inside=True)
        feed.leave()

    def _drop_all(self) -> None:
        for feed in list(self.outgoing.feeds):
            self._drop(feed)

    def _round(self) -> None:
        self.round_began = time.monotonic()
        try:
            self._driver.round()
        finally:
            self.round_began = None
        self._look()
        self._send()
        if self._driver.engine.failure is not None:
            raise EngineClosedError(self._driver.engine.failure)

    def _rest(self) -> None:
        """Before there is nothing to do."""
        self._look()
        self._send()
        self._tell_idle()

    def _look(self) -> None:
        scheduler = self._driver.engine.scheduler
        self.running = len(scheduler.running)
        self.kv_usage = max(kv.usage for kv in (scheduler.target_kv, scheduler.draft_kv) if kv is not None)

    def _send(self) -> None:
        mail, self.outgoing.mail = self.outgoing.mail, []
        if not mail or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, mail)
        except RuntimeError:  # the loop is closed
            self._drop_all()

    def _tell_idle(self) -> None:
        waiting, self._idle = self._idle, []
        for command in waiting:
            _tell(command)

    def _die(self, error: BaseException) -> None:
        """Answer everyone. The engine's state may be anything: it is left alone."""
        words = str(error) or "no reason given"
        self.failure = words if isinstance(error, EngineClosedError) else f"{type(error).__name__}: {words}"
        _LOG.critical("the engine cannot go on: %s", self.failure, exc_info=error)
        for feed in list(self.outgoing.feeds):
            feed.fail(self.failure)
        self.running = 0
        self._send()
        self._tell_idle()

    def _refuse(self, command: Command) -> None:
        """In the place of an engine that cannot go on."""
        if isinstance(command, Submit):
            self._loop = command.loop
            command.feed.open()
            command.feed.fail(str(self.failure))
            self._send()
        elif isinstance(command, TellWhenIdle):
            _tell(command)

    def _close_llm(self) -> None:
        try:
            self._llm.close()
        except Exception:
            _LOG.exception("the engine could not be closed in order")


def _deliver(mail: Mail) -> None:
    """On the event loop."""
    for mailbox, delta in mail:
        mailbox.receive(delta)


def _tell(command: TellWhenIdle) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        command.told.get_loop().call_soon_threadsafe(_resolve, command.told)


def _resolve(told: asyncio.Future[None]) -> None:
    if not told.done():
        told.set_result(None)
