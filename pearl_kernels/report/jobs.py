"""Runs the compilers, several at a time."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from typing import Protocol

from pearl_kernels.report.resources import Compiled
from pearl_kernels.report.triton_jobs import TritonProcess


class Job(Protocol):
    """One run of a compiler; it borrows a process for Triton while it lasts."""

    @property
    def name(self) -> str: ...

    def run(self, compiler: TritonProcess, /) -> list[Compiled]: ...


def run(jobs: Sequence[Job], processes: int) -> Iterator[list[Compiled]]:
    """The kernels of each job, in the order in which they are done."""
    free: queue.SimpleQueue[TritonProcess] = queue.SimpleQueue()

    def one(job: Job) -> list[Compiled]:
        compiler = free.get()
        try:
            return job.run(compiler)
        finally:
            free.put(compiler)

    with ExitStack() as stack:
        for _ in range(processes):
            free.put(stack.enter_context(TritonProcess()))
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        futures = [pool.submit(one, job) for job in jobs]
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)  # an interrupted report starts no more
        for future in as_completed(futures):
            yield future.result()
