"""What is captured before the first request: both models in turn, within a time and half of the memory."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from pearl.engine.warm_up import Side, warm_up
from pearl.workers import HostQueue, InlineWorker

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Bench:
    """A clock, and a memory that each capture takes a piece of."""

    def __init__(self) -> None:
        self.now, self.memory = 0.0, 100
        self.done: list[str] = []

    def side(self, name: str, count: int, device: torch.device = CPU) -> Side:
        return Side(InlineWorker(HostQueue(CPU)), device, [partial(self.capture, f"{name}{i}") for i in range(count)])

    def capture(self, name: str) -> None:
        self.now += 1
        self.memory -= 12
        self.done.append(name)

    def free(self, device: torch.device) -> int | None:
        return self.memory if device.type == "cuda" else None

    def run(self, sides: list[Side], seconds: float = 1e9) -> int:
        return warm_up(sides, seconds, self.free, lambda: self.now)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_likeliest_of_both_models_come_first(bench: Bench) -> None:
    assert bench.run([bench.side("t", 4), bench.side("d", 2)]) == 6
    assert bench.done == ["t0", "d0", "t1", "d1", "t2", "t3"]
    assert bench.run([]) == 0


def test_it_ends_when_its_time_is_over(bench: Bench) -> None:
    assert bench.run([bench.side("t", 9), bench.side("d", 9)], seconds=3) == 3
    assert bench.done == ["t0", "d0", "t1"]


def test_a_device_keeps_half_of_what_was_free(bench: Bench) -> None:
    """One capture goes below it at most; another device's go on."""
    bench.run([bench.side("t", 9, CUDA), bench.side("d", 6)])
    assert bench.done == ["t0", "d0", "t1", "d1", "t2", "d2", "d3", "d4", "d5"]


def test_progress_is_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pearl.engine.warm_up"):
        bench.run([bench.side("t", 25)], seconds=21)
    assert [record.getMessage() for record in caplog.records] == [
        "captured 10 of 25 shapes in 10.0 s",
        "captured 20 of 25 shapes in 20.0 s",
        "4 of 25 shapes are left to be captured when they come up",
    ]


def test_what_fails_is_raised() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        warm_up([Side(InlineWorker(HostQueue(CPU)), CPU, [fail])], 9)
