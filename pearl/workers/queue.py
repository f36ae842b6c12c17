"""Where a model's work is enqueued: the seam between the engine and a device.

On CPU work is done when the call returns. On a GPU it has only been enqueued, in a stream (``cuda_queue``); a call may
be captured once and replayed. Everything that the engine does beyond that is the same, and is tested on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from pearl.messages import Busy, Interval, Mark
from pearl.workers.cuda_queue import CudaQueue


class DeviceQueue(Protocol):
    """Belongs to one worker, except that the verifier enqueues behind the target's forward."""

    @property
    def device(self) -> torch.device: ...

    @property
    def asynchronous(self) -> bool:
        """Whether calls only enqueue work: then nothing in them may wait for it, and capturing them saves time."""
        ...

    @property
    def captured(self) -> int:
        """How many calls so far."""
        ...

    def enter(self, what: str) -> AbstractContextManager[None]:
        """What is called inside runs here, in order. ``what`` names it for profilers."""
        ...

    def aside(self, what: str) -> DeviceQueue:
        """Another queue of the device, for what need not wait for all that is enqueued here."""
        ...

    def mark(self) -> Mark:
        """The end of what has been enqueued so far."""
        ...

    def follow(self, mark: Mark) -> None:
        """What is enqueued from now on starts after ``mark``, of whatever queue."""
        ...

    def since(self, begin: Mark) -> Interval:
        """From a mark of this queue until now."""
        ...

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Run ``call``, and return what repeats it on the same memory, on a GPU without Python in between.

        Tensors that ``call`` uses and does not make itself must outlive what is returned, which does not keep them.
        CaptureError if capturing fails; what ``call`` raises when it is merely run, before, passes through.
        """
        ...

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done. What failed on the device is raised here."""
        ...


@dataclass(frozen=True)
class HostMark:
    at: float  # time.perf_counter()

    def wait(self) -> None:
        pass


class HostQueue:
    """The CPU: a call is done when it returns."""

    asynchronous = False
    captured = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def aside(self, what: str) -> HostQueue:
        return self

    def mark(self) -> HostMark:
        return HostMark(time.perf_counter())

    def follow(self, mark: Mark) -> None:
        mark.wait()

    def since(self, begin: Mark) -> Busy:
        assert isinstance(begin, HostMark)
        return Busy.since(begin.at)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        call()
        return call

    def synchronize(self) -> None:
        pass


def open_queue(name: str, device: torch.device, *, urgent: bool = False, spare: int | None = None) -> DeviceQueue:
    """For a worker of that name; ``urgent`` and ``spare`` as in ``CudaQueue``."""
    if device.type == "cpu":
        return HostQueue(device)
    return CudaQueue(name, device, urgent=urgent, spare=spare)
