"""The CUDA queue's calls, in order and with arguments that the installed torch takes. Stand-ins do the rest.

What they do on a device, tests/e2e/test_gpu.py shows where there is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from pearl.errors import CaptureError, ConfigurationError
from pearl.workers import HostQueue
from pearl.workers.cuda_queue import CudaQueue

DEVICE = torch.device("cuda", 0)
STREAM, EVENT, CAPTURE = torch.cuda.Stream.__new__, torch.cuda.Event.__new__, torch.cuda.graph.__init__


class Machine:
    """Notes what is asked of CUDA; time passes with each event."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.clock = 0.0

    def stream(self, *args: Any, **kwargs: Any) -> Stream:
        inspect.signature(STREAM).bind(torch.cuda.Stream, *args, **kwargs)
        return Stream(self, kwargs.get("priority", 0))

    def event(self, *args: Any, **kwargs: Any) -> Event:
        inspect.signature(EVENT).bind(torch.cuda.Event, *args, **kwargs)
        assert kwargs == {"enable_timing": True}
        return Event(self)

    @contextmanager
    def context(self, kind: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kind == "graph":
            inspect.signature(CAPTURE).bind(None, *args, **kwargs)
            kind = f"graph in {kwargs['capture_error_mode']} mode, pool {kwargs['pool']}"
        self.calls.append(f"enter {kind}")
        yield
        self.calls.append(f"leave {kind}")


class Stream:
    def __init__(self, machine: Machine, priority: int) -> None:
        self.machine, self.priority = machine, priority

    def wait_stream(self, other: Any) -> None:
        self.machine.calls.append(f"stream waits for {other}")

    def wait_event(self, event: Any) -> None:
        self.machine.calls.append("stream waits for event")

    def synchronize(self) -> None:
        self.machine.calls.append("host waits for stream")


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self, stream: Stream) -> None:
        self.machine.clock += 2.5
        self.at = self.machine.clock

    def synchronize(self) -> None:
        self.machine.calls.append("host waits for event")

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at  # milliseconds


class Graph:
    replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    stand_ins = {
        "Stream": made.stream,
        "Event": made.event,
        "CUDAGraph": Graph,
        "device": lambda device: made.context("device"),
        "stream": lambda stream: made.context("stream"),
        "graph": lambda *args, **kwargs: made.context("graph", *args, **kwargs),
        "current_stream": lambda device: "the loading stream",
        "graph_pool_handle": lambda: "P",
        "get_device_capability": lambda device: (9, 0),
        "get_device_properties": lambda device: type("Properties", (), {"multi_processor_count": 132}),
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda text: made.calls.append(f"push {text}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: made.calls.append("pop"))
    return made


def test_a_queue_starts_after_its_weights_are_loaded(machine: Machine) -> None:
    assert CudaQueue("target", torch.device("cuda")).device == DEVICE
    assert machine.calls == ["enter device", "stream waits for the loading stream", "leave device"]
    assert CudaQueue("draft", DEVICE, urgent=True)._stream.priority == -1


def test_what_is_entered_is_named_and_left_even_if_it_fails(machine: Machine) -> None:
    queue = CudaQueue("draft", DEVICE)
    machine.calls.clear()
    with pytest.raises(ZeroDivisionError), queue.enter("propose"):
        raise ZeroDivisionError
    assert machine.calls == ["enter device", "enter stream", "push draft: propose", "pop"]


def test_a_call_is_warmed_up_then_captured_then_only_replayed(machine: Machine) -> None:
    queue = CudaQueue("target", DEVICE)
    machine.calls.clear()
    replay = queue.capture(lambda: machine.calls.append("call"))
    inside = machine.calls[3:-3]
    graph = "graph in thread_local mode, pool P"
    assert inside == ["call", "host waits for stream", f"enter {graph}", "call", f"leave {graph}"]
    replay()
    replay()
    assert replay.__self__.replays == 2  # type: ignore[attr-defined]
    assert machine.calls.count("call") == 2


def test_a_capture_that_fails_is_told_from_a_call_that_fails(machine: Machine) -> None:
    """What fails before the capture began leaves torch's allocator as it was."""
    queue = CudaQueue("target", DEVICE)

    def call(fails_at: int) -> None:
        machine.calls.append("call")
        if machine.calls.count("call") == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for fails_at, kind in ((1, torch.OutOfMemoryError), (2, CaptureError)):
        machine.calls.clear()
        with pytest.raises(kind, match="CUDA out of memory"):
            queue.capture(partial(call, fails_at))
    assert queue.captured == 0
    queue.capture(lambda: None)
    assert queue.captured == 1


def test_intervals_are_what_the_events_say(machine: Machine) -> None:
    queue = CudaQueue("target", DEVICE)
    begin = queue.mark()
    interval = queue.since(begin)
    queue.mark()
    machine.calls.clear()
    assert interval.seconds == pytest.approx(2.5e-3)
    assert machine.calls == ["host waits for event"]
    assert interval.begin == begin.at


def test_a_queue_follows_a_device_by_event_and_a_host_by_waiting(machine: Machine) -> None:
    queue, host = CudaQueue("target", DEVICE), HostQueue(torch.device("cpu"))
    mark = CudaQueue("draft", DEVICE).mark()
    machine.calls.clear()
    queue.follow(mark)
    queue.follow(host.mark())
    assert machine.calls == ["stream waits for event"]
    host.follow(mark)
    assert machine.calls == ["stream waits for event", "host waits for event"]


def test_a_part_of_the_device_is_refused_with_the_reason(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for spare in (125, 132, 1000):
        with pytest.raises(ConfigurationError, match=rf"draft_sms={spare}, but cuda:0 has 132 multiprocessors"):
            CudaQueue("target", DEVICE, spare=spare)
    with pytest.raises(ConfigurationError, match=r"draft_sms=16 needs green contexts: .*; leave draft_sms out"):
        CudaQueue("target", DEVICE, spare=16)  # this torch was built without CUDA


@pytest.mark.parametrize(
    ("capability", "spare", "confined_to"), [((9, 0), 16, 112), ((9, 0), 12, 120), ((9, 0), 13, 112), ((8, 6), 16, 116)]
)
def test_a_queue_leaves_at_least_what_it_is_to_spare(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], spare: int, confined_to: int
) -> None:
    """In the driver's steps: it would round up what is asked for."""

    made = Stream(machine, 0)

    def create(num_sms: int, device_id: int) -> Any:
        assert (num_sms, device_id) == (confined_to, 0)
        return type("Context", (), {"Stream": lambda self: made})()

    monkeypatch.setattr(torch.cuda.green_contexts.GreenContext, "create", create)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert CudaQueue("target", DEVICE, spare=spare)._stream is made
