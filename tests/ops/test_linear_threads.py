"""linear on a worker's own threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ops_support import both_dtypes
from test_linear import MATRICES, inputs

from pearl_kernels import Situation, WeightFormat, select
from pearl_kernels.cpu.linear import ThreadedLinear, linear, pack_linear

TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.exists(), reason="counts threads in /proc")


@pytest.mark.parametrize("weights", ["full", "int8"])
@both_dtypes
def test_threads_change_no_bit(dtype: torch.dtype, weights: WeightFormat) -> None:
    """More threads than panels, than rows, than cores; products of many sizes one after another on the same threads."""
    for threads in (2, 3, 7):
        threaded = ThreadedLinear(threads)
        for n in (1, 8, 67, 0, 3):
            for m, k in MATRICES:
                x, matrix, bias = inputs(n, m, k, dtype)
                weight = pack_linear(matrix, weights)
                assert torch.equal(threaded(x, weight, bias), linear(x, weight, bias))


def test_a_worker_with_threads_has_a_product_with_threads() -> None:
    one, two = select(Situation(threads=1)), select(Situation(threads=2))
    assert not isinstance(one.linear, ThreadedLinear)
    assert isinstance(two.linear, ThreadedLinear)
    assert two.linear is not select(Situation(threads=2)).linear  # threads belong to one worker


def test_helpers_take_part_and_sleep_between_calls() -> None:
    """CPU time of the process beyond this thread's is the helpers': some while products run, next to none after."""
    threaded = ThreadedLinear(3)
    x, matrix, _ = inputs(32, 2048, 512, torch.float32)
    weight = pack_linear(matrix)

    def of_helpers() -> float:
        return time.process_time() - time.thread_time()

    before, deadline = of_helpers(), time.monotonic() + 30
    while of_helpers() < before + 0.02:
        assert time.monotonic() < deadline, "no helper did anything"
        threaded(x, weight)
    before = of_helpers()
    time.sleep(0.3)
    assert of_helpers() - before < 0.1


@needs_proc
def test_threads_end_with_their_owner() -> None:
    x, matrix, _ = inputs(3, 50, 31, torch.float32)
    weight = pack_linear(matrix)

    def tasks() -> set[str]:
        return {task.name for task in TASKS.iterdir()}

    before = tasks()
    threaded = ThreadedLinear(5)
    assert tasks() <= before  # none before the first call
    threaded(x, weight)
    started = tasks() - before
    assert len(started) == 4
    del threaded
    deadline = time.monotonic() + 10  # a thread that has been joined may be listed a little longer
    while started & tasks():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_workers_with_threads_of_their_own_do_not_disturb_each_other() -> None:
    """More threads than cores, torch's own among them."""
    x, matrix, bias = inputs(9, 384, 384, torch.bfloat16)
    weight = pack_linear(matrix)
    expected = linear(x, weight, bias)
    start = threading.Barrier(3)

    def work() -> Iterator[bool]:
        threaded = ThreadedLinear(4)
        start.wait(20)
        for _ in range(200):
            yield torch.equal(threaded(x, weight, bias), expected)
            torch.mm(matrix.float(), matrix.float())

    with ThreadPoolExecutor(3) as executor:
        outcomes = [executor.submit(lambda: all(work())) for _ in range(3)]
        assert all(outcome.result(60) for outcome in outcomes)
