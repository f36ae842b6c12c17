"""One engine, many clients: they live on an event loop, the engine on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Collection
from functools import partial
from queue import SimpleQueue

from pearl.admission import params_for
from pearl.engine.scheduler import require_room
from pearl.errors import ConfigurationError, EngineClosedError, EngineDrainingError, EngineInUseError
from pearl.grammars import Grammar
from pearl.llm import LLM
from pearl.prompts import AnyPrompts
from pearl.sampling_params import SamplingParams
from pearl.serving.async_stream import AsyncStream, Mailbox
from pearl.serving.engine_thread import Cancel, Command, End, EngineThread, Submit, TellWhenIdle
from pearl.serving.feed import Feed
from pearl.serving.health import EngineLoad, Health
from pearl.serving.observers import Observer, Observers
from pearl.user_values import as_number, shown
from pearl.workers.worker import Reply

_LOG = logging.getLogger(__name__)
_LONGEST = 1e6  # seconds
_CLOSED = "the engine is closed; build a new one"


class AsyncEngine:
    """Owns an LLM: nobody else may drive it, and ``close`` closes it.

    All methods belong to one event loop, that of the first ``submit``; ``health``, ``load``, ``observe`` and
    ``forget`` may be used by any thread. Another loop may follow when the first is closed or has no stream left.
    Requests cross to the engine's thread in a queue that is emptied between rounds; what a round commits comes back in
    one call of the loop. So nothing here waits for a round, but ``drain`` and ``close``.

    An engine that nobody closed ends with the object, or the interpreter.
    """

    def __init__(self, llm: LLM, *, round_limit: float | None = None) -> None:
        """``round_limit``: a round of more seconds turns ``health`` red until it ends. It must leave room for what is
        compiled and captured in a round. Raises EngineInUseError if the LLM is working for others.
        """
        self.llm, self._round_limit = llm, _seconds("round_limit", round_limit)
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._submitted = 0  # requests, ever
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._draining = self._closed = False
        self._thread = EngineThread(llm)
        self._observers = Observers(*filter(None, [llm.engine.observer]))
        started: Reply[None] = Reply()
        # A daemon: the interpreter would otherwise wait for it before it is told to end.
        thread = threading.Thread(target=self._thread.run, args=(started,), name="pearl-engine", daemon=True)
        thread.start()
        started.result()
        llm.engine.observer = self._observers
        self._join = partial(_end, self._thread.inbox, thread, self._process, self._round_limit)
        # Younger than the workers' own: it is called before them when the interpreter ends.
        weakref.finalize(self, self._join)

    def submit(
        self,
        prompt: AnyPrompts,
        params: SamplingParams,
        *,
        grammar: Grammar | None = None,
        shown: Collection[int] = (),
    ) -> AsyncStream:
        """Queue a prompt, if short in any form, and return its outputs as they grow. On the event loop; never waits.

        ``grammar``: of the outputs, compiled, which is slow otherwise. ``shown``: special tokens whose names are part
        of the text.

        Raises InvalidRequestError; QueueFullError if there is no room for all of ``params.n``: max_num_seqs run at once
        and max_waiting may wait; EngineDrainingError; EngineClosedError if it is closed or cannot go on.

        ``grammar``: as ``LLM.grammar`` gives it; else a request that needs one has it compiled here, which is slow.
        """
        loop = asyncio.get_running_loop()
        self._require_open()
        self._require_loop(loop)
        (one,) = params_for(1, params)
        self._require_room(one.n)
        requests = self.llm.prepare(prompt, one, grammar=grammar, shown=shown)
        mailbox = Mailbox(requests)
        feed = Feed(requests, mailbox, self._thread.outgoing)
        self._submitted += len(requests)
        self._thread.inbox.put(Submit(feed, loop))
        stream = AsyncStream(mailbox, partial(self._thread.inbox.put, Cancel(feed)))
        self._streams.add(stream)
        return stream

    def _require_open(self) -> None:
        if self._thread.failure is not None:
            raise EngineClosedError(self._thread.failure)
        if self._closed:
            raise EngineClosedError(_CLOSED)
        if os.getpid() != self._process:
            raise EngineClosedError(f"this engine's thread is one of process {self._process}, not of its fork")
        if self._draining:
            raise EngineDrainingError("the engine finishes what it has and takes nothing new; try another one")

    def _require_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is self._loop:
            return
        if self._loop is not None and not self._loop.is_closed() and self._unfinished:
            raise EngineInUseError("this engine has clients on another event loop; all must be on one")
        self._loop = loop

    def _require_room(self, count: int) -> None:
        config, unfinished = self.llm.config, self._unfinished
        free = max(0, config.max_num_seqs - unfinished)
        require_room(count, free, max(0, unfinished - config.max_num_seqs), config.max_waiting)

    @property
    def _unfinished(self) -> int:
        """Requests that the engine has not ended yet, as far as is known here. One that is cancelled is, until then."""
        return self._submitted - self._thread.outgoing.ended

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def health(self) -> Health:
        """Red when the engine cannot go on, is closed, or has been in one round for longer than the limit."""
        if self._thread.failure is not None:
            return Health(False, self._thread.failure)
        if self._closed:
            return Health(False, _CLOSED)
        began, limit = self._thread.round_began, self._round_limit
        if limit is not None and began is not None and (lasted := time.monotonic() - began) > limit:
            return Health(False, f"the round under way has lasted {lasted:.1f} s, the limit is {limit:g} s")
        return Health(True)

    @property
    def load(self) -> EngineLoad:
        """As of the latest round's end, and what has been submitted since."""
        unfinished = self._unfinished
        running = min(self._thread.running, unfinished)
        return EngineLoad(running, unfinished - running, self._thread.kv_usage)

    def observe(self, observer: Observer) -> None:
        """Call it with a RoundRecord after every round, on the engine's thread. What it raises is logged, once."""
        self._observers.add(observer)

    def forget(self, observer: Observer) -> None:
        """Call it no more. It may be called once again meanwhile."""
        self._observers.remove(observer)

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests, and wait until those that there are have ended, at most ``timeout`` seconds."""
        self._draining = True
        if self._closed:
            return
        told = asyncio.get_running_loop().create_future()
        self._thread.inbox.put(TellWhenIdle(told))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(told, timeout)

    async def close(self) -> None:
        """Abort what is left, with an error, end the thread and close the LLM. Idempotent.

        It waits for the round under way; where there is a ``round_limit``, no longer than that: then the thread is left
        behind, and the LLM is closed when the round ends.
        """
        self._closed = True
        self._thread.inbox.put(End())  # also where nobody waits for the following
        await asyncio.to_thread(self._join)
        for stream in list(self._streams):  # which the engine's thread, if it has ended, has told
            stream.fail("the engine was closed in a round that does not end")


def _seconds(name: str, given: float | None) -> float | None:
    if given is None:
        return None
    value = as_number(given)
    if value is None or not 0 < value <= _LONGEST:
        raise ConfigurationError(f"{name} must be None or seconds, > 0 and at most {_LONGEST:g}, not {shown(given)}")
    return value


def _end(inbox: SimpleQueue[Command], thread: threading.Thread, process: int, patience: float | None) -> None:
    if os.getpid() != process:  # a fork has not got the thread
        return
    inbox.put(End())
    if thread is not threading.current_thread():  # which may be the one that finds the engine to be garbage
        thread.join(patience)
        if thread.is_alive():
            _LOG.error("the engine's thread is left behind in a round of more than %g s", patience)
