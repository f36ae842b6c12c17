"""Workers: a thread each, with its own number of intra-op threads, or the calling thread."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from pearl.errors import EngineClosedError
from pearl.workers import HostQueue, InlineWorker, ThreadWorker


@pytest.fixture
def workers() -> Iterator[list[ThreadWorker]]:
    made: list[ThreadWorker] = []
    yield made
    for worker in made:
        worker.close()


def test_each_worker_has_its_own_number_of_threads(workers: list[ThreadWorker]) -> None:
    workers += [ThreadWorker("a", 3), ThreadWorker("b", 1)]
    assert [worker.submit(torch.get_num_threads).result() for worker in workers] == [3, 1]
    assert [worker.submit(torch.get_num_threads).result() for worker in workers] == [3, 1]


def test_the_process_keeps_its_default(workers: list[ThreadWorker]) -> None:
    """The host program's threads, old and new, are not the worker's business."""
    before = torch.get_num_threads()
    workers.append(ThreadWorker("a", before + 2))
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join(10)
    assert [torch.get_num_threads(), *seen] == [before, before]


def test_calls_run_one_after_another_on_one_named_thread(workers: list[ThreadWorker]) -> None:
    workers.append(ThreadWorker("draft", 1))
    order: list[int] = []
    replies = [workers[0].submit(order.append, i) for i in range(20)]
    for reply in replies:
        reply.result(10)
    assert order == list(range(20))
    names = {workers[0].submit(lambda: threading.current_thread().name).result(10) for _ in range(5)}
    assert len(names) == 1
    assert names.pop().startswith("pearl-draft")


def test_calls_run_in_inference_mode_and_the_caller_does_not(workers: list[ThreadWorker]) -> None:
    workers.append(ThreadWorker("a", 1))
    assert workers[0].submit(torch.is_inference_mode_enabled).result(10)
    assert not torch.is_inference_mode_enabled()


def test_arguments_results_and_exceptions_pass_through(workers: list[ThreadWorker]) -> None:
    workers.append(ThreadWorker("a", 1))
    assert workers[0].submit(divmod, 7, 3).result(10) == (2, 1)
    assert workers[0].submit(int, "ff", base=16).result(10) == 255
    with pytest.raises(ZeroDivisionError):
        workers[0].submit(divmod, 1, 0).result(10)
    assert workers[0].submit(divmod, 9, 4).result(10) == (2, 1)  # the worker survives


def test_two_workers_run_at_the_same_time(workers: list[ThreadWorker]) -> None:
    workers += [ThreadWorker("a", 1), ThreadWorker("b", 1)]
    barrier = threading.Barrier(2, timeout=20)
    for reply in [worker.submit(barrier.wait) for worker in workers]:
        reply.result(20)


def test_close_ends_the_thread_finishes_what_runs_and_drops_what_waits() -> None:
    before = set(threading.enumerate())
    worker = ThreadWorker("a", 1)
    started, release, dropped = threading.Event(), threading.Event(), threading.Event()

    def busy() -> str:
        started.set()
        assert release.wait(20)
        return "done"

    running, waiting = worker.submit(busy), worker.submit(dropped.set)
    assert started.wait(20)
    closing = threading.Thread(target=worker.close)
    closing.start()
    with pytest.raises(EngineClosedError, match="before this call began"):
        waiting.result(20)
    with pytest.raises(TimeoutError):
        running.result(0.01)
    release.set()
    closing.join(20)
    assert running.result(0) == "done"
    assert not dropped.is_set()
    worker.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(EngineClosedError):
        worker.submit(divmod, 7, 3)


def test_a_worker_that_nobody_closes_takes_its_thread_with_it() -> None:
    before = set(threading.enumerate())
    worker = ThreadWorker("a", 1)
    assert set(threading.enumerate()) > before
    del worker
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_the_interpreter_ends_although_nobody_closed_a_worker() -> None:
    code = "from pearl.workers import ThreadWorker; import time; w = ThreadWorker('a', 1); w.submit(time.sleep, 0.2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_ends_a_thread_ends_neither_the_worker_nor_who_waits(workers: list[ThreadWorker]) -> None:
    workers.append(ThreadWorker("a", 1))
    with pytest.raises(SystemExit):
        workers[0].submit(sys.exit, 3).result(10)
    assert workers[0].submit(divmod, 9, 4).result(10) == (2, 1)


def test_the_calling_thread_as_a_worker() -> None:
    """Done when submit returns; an exception waits in the reply, an interruption does not."""
    worker = InlineWorker(HostQueue(torch.device("cpu")))
    here = worker.submit(threading.current_thread)
    assert here.result(0) is threading.current_thread()
    assert worker.submit(torch.is_inference_mode_enabled).result()
    assert not torch.is_inference_mode_enabled()
    assert worker.submit(int, "ff", base=16).result() == 255
    with pytest.raises(ZeroDivisionError):
        worker.submit(divmod, 1, 0).result()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.submit(interrupt)
    worker.close()
