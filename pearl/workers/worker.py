"""Where a model's calls run: a thread with its own number of intra-op threads, or the engine's own thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

import torch

from pearl.workers.queue import DeviceQueue

P = ParamSpec("P")
T = TypeVar("T")


class Worker(Protocol):
    """Runs submitted calls one after another, in inference mode."""

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...

    def rest(self) -> None:
        """Wait until what the submitted calls enqueued on a device is done. Their futures are done already."""
        ...

    def close(self) -> None:
        """Finish what runs, drop what waits. Idempotent."""
        ...


class ThreadWorker:
    """A thread of its own. Two of them overlap because torch and our kernels release the GIL."""

    def __init__(self, name: str, intra_op_threads: int) -> None:
        # torch.set_num_threads sets the calling thread's OpenMP team and, as a side effect, the default of threads
        # that have not used torch yet: put that default back, it belongs to the host program.
        default = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(1, f"pearl-{name}", torch.set_num_threads, (intra_op_threads,))
        self._executor.submit(torch.get_num_threads).result()
        torch.set_num_threads(default)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def run() -> T:
            with torch.inference_mode():
                return call(*args, **kwargs)

        return self._executor.submit(run)

    def rest(self) -> None:
        pass

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class InlineWorker:
    """The calling thread: ``submit`` returns when the call has ended.

    For a model on a GPU, where a call only enqueues, and for a target on CPU whose forward is one call that brings its
    own helpers: the engine would only wait for it, and waking two threads costs a tenth of a small model's forward.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            with torch.inference_mode(), self._queue.enter(getattr(call, "__name__", "call")):
                future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def rest(self) -> None:
        self._queue.synchronize()

    def close(self) -> None:
        pass
