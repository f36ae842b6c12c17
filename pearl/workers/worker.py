"""Where a model's calls run: a thread with its own number of intra-op threads, or the engine's own thread."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch

from pearl.errors import EngineClosedError
from pearl.workers.queue import DeviceQueue

P = ParamSpec("P")
T = TypeVar("T")


class Reply(Generic[T]):
    """What a submitted call returns or raises. A round waits for two: a ``Future`` costs it several times as much."""

    __slots__ = ("_done", "_error", "_value")

    _value: T

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call, and keep what it returns, or an Exception; an interruption passes through."""
        try:
            self._value = call(*args, **kwargs)
        except Exception as error:
            self._error = error
        self._done.release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.release()

    def result(self, timeout: float = -1) -> T:
        """Waits for it, at most ``timeout`` seconds (negative: for ever); then TimeoutError."""
        if not self._done.acquire(timeout=timeout):
            raise TimeoutError(f"no reply within {timeout} s")
        self._done.release()
        if self._error is not None:
            raise self._error
        return self._value


class Worker(Protocol):
    """Runs submitted calls one after another, in inference mode."""

    @property
    def blocks(self) -> bool:
        """Whether ``submit`` returns only when the work is done, not when it is begun or enqueued."""
        ...

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Reply[T]: ...

    def rest(self) -> None:
        """Wait until what the submitted calls enqueued on a device is done. They themselves have replied already."""
        ...

    def close(self) -> None:
        """Finish what runs, drop what waits. Idempotent."""
        ...


_Calls = SimpleQueue[tuple[Reply[Any], Callable[[], Any]] | None]  # None: the end


class ThreadWorker:
    """A thread of its own. Two of them overlap because torch and our kernels release the GIL."""

    blocks = False

    def __init__(self, name: str, intra_op_threads: int) -> None:
        self._calls: _Calls = SimpleQueue()
        self._process = os.getpid()
        thread = threading.Thread(target=_run_calls, args=(self._calls,), name=f"pearl-{name}", daemon=True)
        thread.start()
        # Also where nobody closes it: when the worker is garbage, and before the interpreter ends.
        self._end = weakref.finalize(self, _end, self._calls, thread, self._process)
        # torch.set_num_threads sets the calling thread's OpenMP team and, as a side effect, the default of threads
        # that have not used torch yet: put that default back, it belongs to the host program.
        default = torch.get_num_threads()
        self.submit(torch.set_num_threads, intra_op_threads).result()
        self.submit(torch.get_num_threads).result()  # uses torch, and so keeps its number
        torch.set_num_threads(default)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Reply[T]:
        """Raises EngineClosedError once the worker is closed, and in a forked process, which has not got its thread."""
        if not self._end.alive:
            raise EngineClosedError("the worker is closed")
        if os.getpid() != self._process:
            raise EngineClosedError(f"the worker's thread is one of process {self._process}, not of its fork")
        reply: Reply[T] = Reply()
        self._calls.put((reply, partial(call, *args, **kwargs)))
        return reply

    def rest(self) -> None:
        """Also what an interrupted caller has not waited for is done then."""
        self.submit(_nothing).result()

    def close(self) -> None:
        self._end()


def _run_calls(calls: _Calls) -> None:
    """What a worker's thread does. It does not know the worker, which may be garbage by then."""
    with torch.inference_mode():
        while (waiting := calls.get()) is not None:
            reply, call = waiting
            try:
                reply.run(call)
            except BaseException as error:  # SystemExit: whoever waits for the reply must not wait for ever
                reply.fail(error)
            del waiting, reply, call  # what they hold may be large


def _nothing() -> None:
    pass


def _end(calls: _Calls, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:  # a fork: the queue's lock may be held by a thread that is not there
        return
    with contextlib.suppress(Empty):
        while (waiting := calls.get_nowait()) is not None:
            waiting[0].fail(EngineClosedError("the worker was closed before this call began"))
    calls.put(None)
    if thread is not threading.current_thread():  # which may be the one that finds the worker to be garbage
        thread.join()


class InlineWorker:
    """The calling thread: ``submit`` returns when the call has ended.

    For a model on a GPU, where a call only enqueues, and for a target on CPU whose forward is one call that brings its
    own helpers: the engine would only wait for it, and waking two threads costs a tenth of a small model's forward.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue, self._inference = queue, torch.inference_mode()
        self.blocks = not queue.asynchronous

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Reply[T]:
        reply: Reply[T] = Reply()
        with self._inference, self._queue.enter(getattr(call, "__name__", "call")):
            reply.run(call, *args, **kwargs)
        return reply

    def rest(self) -> None:
        self._queue.synchronize()

    def close(self) -> None:
        pass
