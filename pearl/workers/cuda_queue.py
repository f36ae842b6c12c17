"""A CUDA stream as a ``DeviceQueue``: events for marks, CUDA graphs for captured calls, NVTX ranges for profilers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pearl.errors import CaptureError, ConfigurationError
from pearl.messages import Mark


@dataclass(frozen=True)
class CudaMark:
    event: torch.cuda.Event
    at: float  # time.perf_counter() when it was enqueued

    def wait(self) -> None:
        self.event.synchronize()


@dataclass(frozen=True)
class CudaInterval:
    """Between two events. ``begin`` is when the work was enqueued, which is when it began: a round starts at rest."""

    start: CudaMark
    end: CudaMark

    @property
    def begin(self) -> float:
        return self.start.at

    @property
    def seconds(self) -> float:
        """Waits for the end."""
        self.end.wait()
        return float(self.start.event.elapsed_time(self.end.event)) / 1e3


class CudaQueue:
    asynchronous = True

    def __init__(self, name: str, device: torch.device, *, urgent: bool = False, spare: int | None = None) -> None:
        """``urgent``: its kernels go first where a device runs several queues. ``spare``: leave at least so many
        multiprocessors to others. ConfigurationError if torch or the driver cannot do that.

        Not both: a partition's stream has the priority that it has.
        """
        assert not (urgent and spare)
        self.device = torch.device("cuda", device.index or 0)
        self._name = name
        self.captured = 0
        with torch.cuda.device(self.device):
            self._partition = None if spare is None else _green_context(self.device, spare)
            if self._partition is None:
                self._stream = torch.cuda.Stream(self.device, priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]
            else:
                self._stream = self._partition.Stream()
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # weights were loaded there
            self._pool = torch.cuda.graph_pool_handle()  # one for all: the graphs of a queue never run side by side

    @contextmanager
    def enter(self, what: str) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            torch.cuda.nvtx.range_push(f"{self._name}: {what}")  # type: ignore[no-untyped-call]
            try:
                yield
            finally:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def aside(self, what: str) -> CudaQueue:
        return CudaQueue(f"{self._name} {what}", self.device)

    def mark(self) -> CudaMark:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return CudaMark(event, time.perf_counter())

    def follow(self, mark: Mark) -> None:
        if isinstance(mark, CudaMark):
            self._stream.wait_event(mark.event)
        else:
            mark.wait()

    def since(self, begin: Mark) -> CudaInterval:
        assert isinstance(begin, CudaMark)
        return CudaInterval(begin, self.mark())

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        with self.enter("capture"):
            call()  # compiles kernels, and makes what libraries make at a first call
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads (another LLM, a CPU draft) may allocate meanwhile.
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    call()
            except Exception as error:
                raise CaptureError(
                    f"a CUDA graph could not be captured ({type(error).__name__}: {error}); build a new engine, with "
                    "enforce_eager=True, or with a smaller kv_cache_memory if memory ran out"
                ) from error
        self.captured += 1
        replay: Callable[[], None] = graph.replay
        return replay

    def synchronize(self) -> None:
        self._stream.synchronize()


def _green_context(device: torch.device, spare: int) -> Any:
    """All of the device's multiprocessors but ``spare``, or a few more, as a partition of it.

    torch makes partitions of the first n multiprocessors only, so that two of them would overlap: the queue with the
    long work is confined, and the urgent one may use all.
    """
    there = torch.cuda.get_device_properties(device).multi_processor_count
    # The driver cuts a device in such steps, and rounds up what is asked for.
    step = 8 if torch.cuda.get_device_capability(device) >= (9, 0) else 2
    sms = (there - spare) // step * step
    if sms < max(step, 4):
        raise ConfigurationError(
            f"draft_sms={spare}, but {device} has {there} multiprocessors; leave some to the target"
        )
    try:
        context = torch.cuda.green_contexts.GreenContext.create(num_sms=sms, device_id=device.index)
        if not hasattr(context, "Stream"):
            raise RuntimeError("this torch cannot make streams of green contexts; 2.13 can")
    except (AttributeError, RuntimeError) as error:
        raise ConfigurationError(f"draft_sms={spare} needs green contexts: {error}; leave draft_sms out") from error
    return context
