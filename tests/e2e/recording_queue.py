"""A device for tests: work is captured operator by operator, and replayed on the same memory without its Python.

What a CUDA graph would not do is not done here either: a number that was computed while capturing stays what it was, a
tensor that was made then stays where it was, and memory of others is used but not kept alive (``captured_calls``). What
a stream would have to wait for is refused: inside ``enter`` nobody may look at a value. And a replay is done as late as
the order allows: when its queue works on, or somebody waits for a mark behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from captured_calls import CapturedCalls
from torch.overrides import TorchFunctionMode

from pearl.errors import CaptureError
from pearl.messages import Busy, Mark
from pearl.workers.queue import HostMark, HostQueue
from pearl_kernels import KernelSet

# Of a tensor on a GPU each of these waits for the device.
_LOOKS = {
    "tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "__bool__", "__int__", "__float__", "__index__",
    "__array__", "__iter__", "__contains__",
}  # fmt: skip
# These take memory, and fill it with nothing.
_MAKES_ROOM = {"empty", "empty_like", "new_empty"}


class Looked(AssertionError):
    """Somebody looked at a value that a device has not computed yet."""


class _Recorder(TorchFunctionMode):
    """Refuses looks; while there is a list, writes down every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: CapturedCalls | None = None
        self.may_look = False
        self.waiting: deque[Callable[[], None]] = deque()  # replays, in order
        self.done = 0

    def catch_up(self, count: int | None = None) -> None:
        """Do what waits, until ``count`` replays were done in all; None: everything."""
        while self.waiting and (count is None or self.done < count):
            replay = self.waiting.popleft()
            self.done += 1
            with torch._C.DisableTorchFunction(), torch.inference_mode():
                replay()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _LOOKS and not self.may_look:
            raise Looked(name)
        if self.calls is not None and name in ("tensor", "from_numpy", "as_tensor"):
            raise Looked(f"{name}: a capture may not bring numbers from the host")
        if name != "__get__":  # shapes, dtypes and the like
            self.catch_up()
        result = func(*args, **kwargs)
        if self.calls is not None:
            with torch._C.DisableTorchFunction():
                if name in _MAKES_ROOM:
                    self.calls.take(result)
                else:
                    self.calls.add(func, args, kwargs, result)
        return result

    def operator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel is one call, whatever it does inside."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                self.catch_up()
                result = function(*args, **kwargs)
                if self.calls is not None:
                    self.calls.add(function, args, kwargs, result)
            return result

        return call


@dataclass(frozen=True)
class CountedMark(HostMark):
    queue: RecordingQueue
    behind: int  # so many replays

    def wait(self) -> None:
        self.queue.waits += 1
        self.queue._recorder.catch_up(self.behind)


@dataclass
class RecordingQueue:
    """Counts what a test may want to bound.

    ``waits``: how often the host waited for this device. ``followed``: the marks that it itself waited for. ``late``:
    replays are done as late as possible; where several devices wait for each other they must be done at once.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    asynchronous: bool = True
    late: bool = True
    captured: int = 0
    replayed: int = 0
    waits: int = 0
    followed: list[Mark] = field(default_factory=list)
    _recorder: _Recorder = field(default_factory=_Recorder)
    _depth: int = 0

    def operator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """To be called on this device, as one call."""
        return self._recorder.operator(function)

    def kernels(self, kernels: KernelSet) -> KernelSet:
        operators = [f.name for f in fields(KernelSet) if f.name != "providers"]
        return replace(kernels, **{op: self.operator(getattr(kernels, op)) for op in operators})

    @contextmanager
    def enter(self, what: str) -> Iterator[None]:
        self._depth += 1
        try:
            if self._depth > 1:
                yield
            else:
                with self._recorder:
                    yield
        finally:
            self._depth -= 1

    @contextmanager
    def looking(self) -> Iterator[None]:
        """For tests of what must read values on the host."""
        self._recorder.may_look = True
        try:
            yield
        finally:
            self._recorder.may_look = False

    def aside(self, what: str) -> RecordingQueue:
        return RecordingQueue(self.device, late=self.late)

    def mark(self) -> CountedMark:
        return CountedMark(HostQueue(self.device).mark().at, self, self.replayed)

    def follow(self, mark: Mark) -> None:
        self.followed.append(mark)
        if isinstance(mark, CountedMark):
            mark.queue._recorder.catch_up(mark.behind)

    def since(self, begin: Mark) -> Busy:
        assert isinstance(begin, HostMark)
        return Busy.since(begin.at)

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        with self.enter("capture"), torch.inference_mode():
            call()  # as on a GPU: what is made at a first call is not captured
            calls = self._recorder.calls = CapturedCalls()
            try:
                call()
            except Exception as error:
                raise CaptureError(str(error)) from error
            finally:
                self._recorder.calls = None
                calls.seal()

        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            self._recorder.waiting.append(calls.replay)
            if not self.late:
                self._recorder.catch_up()

        return replay

    def synchronize(self) -> None:
        self.waits += 1
        self._recorder.catch_up()
