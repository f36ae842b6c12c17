"""Captured calls are kept by shape, made once, and dropped when there are too many."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pearl.host_tensors import Array, array
from pearl.workers import HostQueue
from pearl.workers.graphs import Calls, Graphs, StaticInputs

CPU = torch.device("cpu")


class Repeating(HostQueue):
    """Counts."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.captured = self.waits = 0

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return super().capture(call)

    def synchronize(self) -> None:
        self.waits += 1


def numbers(*values: int) -> dict[str, Array]:
    return {"values": array(values, torch.int64), "scale": array([2.0], torch.float32)}


def scaled(inputs: Mapping[str, Tensor]) -> tuple[Calls, Tensor]:
    out = torch.empty(inputs["values"].shape)

    def call() -> None:
        torch.mul(inputs["values"], inputs["scale"], out=out)

    return (call,), out


def test_a_call_is_captured_once_for_a_key_and_sees_new_values() -> None:
    queue = Repeating()
    graphs: Graphs[Tensor] = Graphs(queue, most=9)
    first = graphs.run("three", numbers(1, 2, 3), scaled)
    assert first.tolist() == [2, 4, 6]
    again = graphs.run("three", numbers(7, 8, 9), scaled)
    assert again is first
    assert again.tolist() == [14, 16, 18]
    assert graphs.run("two", numbers(5, 6), scaled).tolist() == [10, 12]
    assert (queue.captured, len(graphs)) == (2, 2)


def test_the_ones_longest_unused_go_after_the_device_has_passed_them() -> None:
    queue = Repeating()
    graphs: Graphs[Tensor] = Graphs(queue, most=2)
    for count in (1, 2, 1, 3):  # 2 is the oldest when 3 comes
        graphs.run(count, numbers(*range(count)), scaled)
    assert (queue.captured, queue.waits, len(graphs)) == (3, 1, 2)
    graphs.run(1, numbers(4), scaled)
    assert queue.captured == 3
    graphs.run(2, numbers(4, 5), scaled)
    assert queue.captured == 4


def test_static_inputs_stay_where_they_are() -> None:
    inputs = StaticInputs(numbers(1, 2), CPU)
    inputs.fill(numbers(1, 2))
    values, address = inputs.tensors["values"], inputs.tensors["values"].data_ptr()
    inputs.fill(numbers(3, 4))
    assert values.tolist() == [3, 4]
    assert inputs.tensors["scale"].tolist() == [2.0]
    assert inputs.tensors["values"].data_ptr() == address
