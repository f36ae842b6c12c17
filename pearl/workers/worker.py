"""One model's execution context: a thread with its own number of intra-op threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs submitted calls one after another, in inference mode, on its own thread.

    Two workers overlap because torch and our kernels release the GIL.
    """

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

    def close(self) -> None:
        """Finish what runs, drop what waits, end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)
