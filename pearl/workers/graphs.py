"""Captured calls and the memory they read: one for each shape, made when it is first needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pearl.host_tensors import Array, Layout
from pearl.workers.queue import DeviceQueue


class StaticInputs:
    """Tensors that stay where they are, and that one transfer fills."""

    def __init__(self, arrays: Mapping[str, Array], device: torch.device) -> None:
        """Shapes and dtypes of ``arrays`` are those of every ``fill``."""
        self._layout = Layout.of(list(arrays.values()))
        self._buffer = torch.empty(self._layout.offsets[-1], dtype=torch.uint8, device=device)
        self.tensors: dict[str, Tensor] = dict(zip(arrays, self._layout.views(self._buffer), strict=True))

    def fill(self, arrays: Mapping[str, Array]) -> None:
        pinned = self._buffer.device.type == "cuda"
        self._buffer.copy_(self._layout.pack(list(arrays.values()), pinned), non_blocking=True)


T = TypeVar("T")
Calls = tuple[Callable[[], None], ...]
Bind = Callable[[Mapping[str, Tensor]], tuple[Calls, T]]


@dataclass(frozen=True)
class Graph(Generic[T]):
    """Captured calls that read the same inputs. ``outputs``: tensors that each replay fills again."""

    inputs: StaticInputs
    calls: Calls  # a replay knows addresses only: what a call made for itself lives as long as the call
    replays: Calls
    outputs: T


class Graphs(Generic[T]):
    """Of one queue. The ones longest unused are dropped beyond ``most``."""

    def __init__(self, queue: DeviceQueue, most: int) -> None:
        self._queue, self._most = queue, most
        self._graphs: OrderedDict[Hashable, Graph[T]] = OrderedDict()

    def run(
        self, key: Hashable, arrays: Mapping[str, Array], bind: Bind[T], launching: Callable[[], None] | None = None
    ) -> T:
        """Run a key's calls once, in order, on these values; returns their outputs. ``launching`` is called when all
        is prepared, right before the first.
        """
        graph = self.ready(key, arrays, bind)
        if launching is not None:
            launching()
        for replay in graph.replays:
            replay()
        return graph.outputs

    def ready(self, key: Hashable, arrays: Mapping[str, Array], bind: Bind[T]) -> Graph[T]:
        """A key's graph, with these values as its inputs.

        ``bind`` makes the calls, and their outputs, of the inputs' tensors; it is asked once for a key. A call must do
        the same, on the same memory, whatever the values. To be captured each is also run, once or twice, before the
        first replay: that must change nothing of what the replays do.
        """
        graph = self._graphs.get(key)
        if graph is not None:
            graph.inputs.fill(arrays)
            self._graphs.move_to_end(key)
            return graph
        inputs = StaticInputs(arrays, self._queue.device)
        inputs.fill(arrays)
        calls, outputs = bind(inputs.tensors)
        replays = tuple(self._queue.capture(call) for call in calls)
        graph = self._graphs[key] = Graph(inputs, calls, replays, outputs)
        if len(self._graphs) > self._most:
            self._queue.synchronize()  # it may be running
            self._graphs.popitem(last=False)
        return graph

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)
