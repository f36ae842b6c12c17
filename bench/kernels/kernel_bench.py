"""Checks a contender against the reference, times it, and relates its time to the memory's speed.

What is timed. On CPU: the call as a user makes it, by pytest-benchmark's clock, on one thread. On CUDA: the device's
work between two events, with the L2 cache overwritten before each call, so that operands come from memory; the call is
replayed from a CUDA graph, as the engine runs it, or launched where it cannot be captured. The launch hides behind the
kernel that overwrites. pytest-benchmark cannot time devices: its own columns hold the host's time of a call that is
waited for, ``extra_info`` holds the device's.

What it is compared with. ``bytes`` is the least that must move: inputs read once, outputs written once. The limit is
the read bandwidth of this session: on CUDA of memory, on CPU of a buffer as large as all that the calls cycle through.
Operators that stream weights or KV cycle through so many copies of them that the cache cannot hold them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.shared.bandwidth import last_level_cache, read_bandwidth
from pearl.bench.report import machine
from pearl_kernels import (
    ExpertWeights,
    LinearWeight,
    QuantizedMatrix,
    Routing,
    Situation,
    reference,
    stack_weights,
)
from pearl_kernels.provider import Provider
from pearl_kernels.registry import PROVIDERS
from pearl_kernels.triton import interpreting

HEAD_DIM = 128  # of the shapes with heads
Call = Callable[[], Any]
Matrices = Tensor | Sequence[QuantizedMatrix]  # of all experts
Prepare = Callable[..., Call]  # the operator's arguments -> a call without any; what it does is not timed

_SECONDS = {"tiny": 0.01, "small": 0.2, "real": 0.5}  # of timing, each
_MOST_ROUNDS = 2000
_NO_REFERENCE = ("linear",)  # it is torch's own product, which is there as the rival
_SLOW_REFERENCE = ("verify_attention", "sample", "verify")
_GPU_BUFFER = 1 << 30


@dataclass(frozen=True)
class Contender:
    name: str
    role: str  # "provider" of ours, or "rival": what a user would call otherwise
    prepare: Prepare
    page_size: int = 16
    capturable: bool = True  # in a CUDA graph
    devices: tuple[str, ...] = ("cpu", "cuda")
    missing: Callable[[], bool] = lambda: False

    def runs_on(self, device: str) -> bool:
        return device in self.devices and not self.missing()


def rival(name: str, prepare: Prepare, **options: Any) -> Contender:
    return Contender(name, "rival", prepare, **options)


def plain(function: Callable[..., Any]) -> Prepare:
    """For a function that takes the operator's own arguments."""

    def prepare(*args: Any) -> Call:
        return lambda: function(*args)

    return prepare


def providers(op: str, device: str, dtype: torch.dtype, sizes: str) -> list[Contender]:
    """Those of the registry that run ``op`` natively here; the reference where it does not take seconds a call."""
    found = []
    for provider in PROVIDERS:
        if provider.name == "reference" and (op in _NO_REFERENCE or (op in _SLOW_REFERENCE and sizes == "real")):
            continue
        page_size = 256 if provider.name == "flash_attn" else 16
        situation = Situation(device, dtype, HEAD_DIM, threads=1, page_size=page_size)
        emulated = provider.name == "triton" and interpreting()
        if op not in provider.operators or emulated or provider.refuses(op, situation) is not None:
            continue
        prepare = _prepare(op, provider)
        capturable = provider.name not in ("reference", "flashinfer")
        found.append(Contender(provider.name, "provider", prepare, page_size, capturable))
    return found


def _prepare(op: str, provider: Provider) -> Prepare:
    """Matrices, plain or of few bits, are packed for the operators that read packed ones."""
    function = provider.operators[op]
    # Who packs none reads the reference's.
    pack_plain = provider.operators.get("pack_linear", reference.pack_linear)
    pack_few_bits = provider.operators.get("pack_quantized", reference.pack_quantized)

    def pack(matrix: Tensor | QuantizedMatrix, dtype: torch.dtype) -> LinearWeight:
        packed: LinearWeight = pack_plain(matrix) if isinstance(matrix, Tensor) else pack_few_bits(matrix, dtype)
        return packed

    def prepare_linear(x: Tensor, weight: Tensor | QuantizedMatrix) -> Call:
        packed = pack(weight, x.dtype)
        return lambda: function(x, packed)

    def prepare_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Matrices, down: Matrices) -> Call:
        gates, downs = (stack_weights([pack(matrix, x.dtype) for matrix in stack]) for stack in (gate_up, down))
        packed = ExpertWeights(gates, downs)
        return lambda: function(x, Routing(experts, weights), packed)

    packing: dict[str, Prepare] = {"linear": prepare_linear, "experts": prepare_experts}
    return packing.get(op) or plain(function)


class Limits:
    """Read bandwidths of the device, each measured once a session."""

    def __init__(self, device: str) -> None:
        self.device, self.cache = device, last_level_cache(device)
        self.name = torch.cuda.get_device_name() if device == "cuda" else machine()["cpu"]
        self._known: dict[int, float] = {}

    def gb_s(self, working_set: int) -> float:
        """Of a buffer of the working set's size, to a factor of 1.4."""
        size = _GPU_BUFFER
        if self.device == "cpu":
            size = 4096
            while size < working_set and size < 8 * self.cache:
                size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
        if size not in self._known:
            self._known[size] = read_bandwidth(size, self.device)
        return self._known[size]


@dataclass
class Bench:
    """Of one test. ``measure`` is called once."""

    benchmark: Any
    limits: Limits
    dtype: torch.dtype
    sizes: str
    device: str = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.limits.device

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def measure(
        self,
        contender: Contender,
        op: str,
        shape: object,
        make: Callable[[], tuple[Any, ...]],
        bytes_moved: int,
        agree: Callable[[Any, Any, tuple[Any, ...], tuple[Any, ...]], None] | None,
        streams: int = 0,
    ) -> None:
        """Check and time ``contender`` on the arguments that ``make`` makes.

        ``agree(result, expected, arguments, reference's arguments)`` asserts that they are the same; None for a rival
        that draws other random numbers. ``streams`` of the bytes are weights or KV, which come from memory.
        """
        checked = agree is not None and (self.sizes != "real" or self.device == "cuda")
        if agree is not None and checked:
            check(contender, op, make(), agree)
        copies = -(-2 * self.limits.cache // streams) if streams and self.device == "cpu" else 1
        copies = 1 if self.sizes == "tiny" else min(copies, 64)
        calls = [contender.prepare(*make()) for _ in range(copies)]
        if self.device == "cuda":
            seconds, timing = self._on_cuda(calls[0], contender.capturable)
        else:
            seconds, timing = self._on_cpu(calls), "CPU: host clock, one thread"
        if seconds is None:  # --benchmark-disable
            return
        limit, gb_s = self.limits.gb_s(copies * bytes_moved), bytes_moved / seconds / 1e9
        self.benchmark.extra_info.update(
            op=op, shape=str(shape), contender=contender.name, role=contender.role, dtype=str(self.dtype),
            device=self.limits.name, bytes=bytes_moved, seconds=seconds, gb_s=gb_s, limit_gb_s=limit,
            share_of_limit=gb_s / limit, checked=checked, working_set=copies * bytes_moved, timing=timing,
        )  # fmt: skip

    def _on_cpu(self, calls: Sequence[Call]) -> float | None:
        turn = itertools.cycle(calls)
        for _ in range(2):  # the first pass warms up
            begin = time.perf_counter()
            for call in calls:
                call()
            once = (time.perf_counter() - begin) / len(calls)
        iterations = max(1, int(1e-4 / once))
        rounds = min(max(5, int(_SECONDS[self.sizes] / (once * iterations))), _MOST_ROUNDS)
        self.benchmark.pedantic(lambda: next(turn)(), rounds=rounds, iterations=iterations, warmup_rounds=1)
        return None if self.benchmark.disabled else float(self.benchmark.stats.stats.median)

    def _on_cuda(self, call: Call, capturable: bool) -> tuple[float | None, str]:
        work = _captured(call) if capturable else call

        def wait_for_it() -> None:
            work()
            torch.cuda.synchronize()

        self.benchmark.pedantic(wait_for_it, rounds=3, warmup_rounds=1)
        timing = "CUDA: events, cold L2, " + ("graph" if capturable else "launched")
        return None if self.benchmark.disabled else time_on_cuda(work, self.limits.cache, _SECONDS[self.sizes]), timing


def check(contender: Contender, op: str, args: tuple[Any, ...], agree: Callable[..., None]) -> None:
    """Run contender and reference on equal arguments; what they change in place is compared too."""
    mine, theirs = (tuple(a.clone() if isinstance(a, Tensor) else a for a in args) for _ in range(2))
    expected = _prepare(op, PROVIDERS[-1])(*theirs)()
    agree(contender.prepare(*mine)(), expected, mine, theirs)


def time_on_cuda(work: Call, cache: int, seconds: float) -> float:
    """Median seconds of the device's work, each time behind a kernel that overwrites twice the L2 cache."""
    overwritten = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def timed(rounds: int) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]  # type: ignore[no-untyped-call]
        for begin, end in pairs:
            overwritten.zero_()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    once = statistics.median(timed(5))
    return statistics.median(timed(min(max(10, int(seconds / once)), _MOST_ROUNDS)))


def _captured(call: Call) -> Call:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and settles what is allocated once
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def close(result: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of a dtype with few bits, and of sums in another order."""
    assert result.shape == expected.shape
    exact = result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-4 if exact else 2e-2, atol=1e-4 if exact else 2e-2)
