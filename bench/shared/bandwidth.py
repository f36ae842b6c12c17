"""How fast this machine reads memory: the limit of every kernel that has to read its data once. GB are 10^9 bytes."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pearl.errors import PearlError

_LINE = 64  # bytes of a cache line
_STREAMS = (1, 8)  # ways of reading; the faster one counts
_LONG_ENOUGH = 0.02  # seconds of one timed stretch, at the least: as long as a burst of forwards
_DEFAULT_CACHE = 32 << 20


def read_bandwidth(size: int, device: str = "cpu", threads: int = 1, repeats: int = 5) -> float:
    """GB/s at which ``size`` bytes are read again and again, the median of ``repeats`` stretches.

    A buffer much larger than ``last_level_cache`` measures memory; one as large as a model's weights measures what a
    model that is used again and again finds, part of it in the cache. ``threads`` CPU threads read a part each.
    """
    if device.startswith("cuda"):
        return _cuda(size, device, repeats)
    with CpuStream(size, threads) as stream:
        return statistics.median(stream.gb_s() for _ in range(repeats))


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache: of the first core, or of the GPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=_DEFAULT_CACHE)


def _bytes(text: str) -> int:
    """Of the kernel's notation: 512K, 32M."""
    number, unit = text.strip()[:-1], text.strip()[-1]
    return int(number) << {"K": 10, "M": 20, "G": 30}[unit]


class CpuStream:
    """A buffer and the threads that read it, a part each; a context manager, for measuring more than once.

    Raises PearlError without the C++ core, ValueError for less than a cache line a thread.
    """

    def __init__(self, size: int, threads: int = 1) -> None:
        try:
            from pearl_kernels.cpu import _core
        except ImportError as error:
            raise PearlError(f"the C++ core is not built ({error}); pip install -e . builds it") from error
        self._part = size // threads // _LINE * _LINE
        if self._part <= 0:
            raise ValueError(f"{size} bytes are too few for {threads} threads to read")
        self._read = _core.stream_read
        self._threads, self._start = threads, threading.Barrier(threads)
        self._buffer = torch.ones(self._part * threads, dtype=torch.uint8)  # written, so each page is one of its own
        self._pool = ThreadPoolExecutor(threads, "stream")
        self._streams = min(_STREAMS, key=self._seconds)
        self._passes = 1 + int(_LONG_ENOUGH / min(self._stretch(1) for _ in range(3)))

    def gb_s(self) -> float:
        """Of one stretch of some tens of milliseconds."""
        return self._part * self._threads * self._passes / self._stretch(self._passes) / 1e9

    def _seconds(self, streams: int) -> float:
        """Of the fastest of a few passes with so many streams."""
        self._streams = streams
        return min(self._stretch(1) for _ in range(5))

    def _stretch(self, passes: int) -> float:
        spans = list(self._pool.map(self._passes_of, range(self._threads), [passes] * self._threads))
        return max(end for _, end in spans) - min(begin for begin, _ in spans)

    def _passes_of(self, index: int, passes: int) -> tuple[float, float]:
        address = self._buffer.data_ptr() + index * self._part
        self._start.wait()
        begin = time.perf_counter()
        for _ in range(passes):
            self._read(address, self._part, self._streams)
        return begin, time.perf_counter()

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _cuda(size: int, device: str, repeats: int) -> float:
    """The better of a reduction, which only reads, and a copy, whose reads and writes both count."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    moved = source.numel() * 4
    candidates: tuple[tuple[int, Callable[[], Tensor]], ...] = (
        (moved, lambda: source.sum()),
        (2 * moved, lambda: target.copy_(source)),
    )
    best = 0.0
    for count, operation in candidates:
        operation()
        times = []
        for _ in range(repeats):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            operation()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        best = max(best, count / statistics.median(times) / 1e9)
    return best
