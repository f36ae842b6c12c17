"""The first half of the CPU roofline: read bandwidths, forwards and operators, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from bench.roofline.forwards import ForwardBench, OperatorTime
from bench.roofline.report import MEMORY, Bandwidth, Forward, Operator, Report
from bench.shared.bandwidth import CpuStream, last_level_cache
from pearl.llm import LLM
from pearl_kernels.checks import DTYPE_CODES

ROUNDS = 3  # of forwards, which are short, for each repeat of the generation

_OPERATOR_ROWS = (1, 8)
_PASSES = 10  # forwards made of single calls, in a round
_TOO_SHORT = 0.1  # of the call without rows: a kernel shorter than that drowns in its jitter
_PEAK_STEPS = 100_000  # some tenths of a millisecond


@dataclass
class _Samples:
    """Of rounds in which everything is measured once, so that one mood of the machine meets all of it."""

    dtype: torch.dtype
    peaks: list[float] = field(default_factory=list)
    speeds: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))  # buffer, threads
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))  # model, rows
    operators: dict[tuple[str, int, str], list[OperatorTime]] = field(default_factory=lambda: defaultdict(list))

    def add_round(
        self, benches: Sequence[ForwardBench], streams: Mapping[tuple[str, int], CpuStream], rows: Sequence[int]
    ) -> None:
        self.peaks.append(_peak_gflop_s(self.dtype))
        for key, stream in streams.items():
            self.speeds[key].append(stream.gb_s())
        for bench in benches:
            for count in rows:
                self.seconds[bench.name, count].append(bench.seconds(count))
            for count in _OPERATOR_ROWS:
                for timed in bench.operators(count, _PASSES) if count <= bench.context else ():
                    self.operators[bench.name, count, timed.op].append(timed)


def measure_forwards(
    report: Report,
    llm: LLM,
    rows: Sequence[int],
    cores: int,
    stopped: Callable[[], bool],
    advance: Callable[[str], None],
) -> None:
    """Fill the report's bandwidths (on one thread and on all cores), forwards and operators (on one thread).

    ``llm`` is idle and has a draft model; its KV memory is overwritten. Call it in torch.inference_mode, on one thread.
    """
    assert llm.models.draft is not None
    models = {"target": llm.models.target, "draft": llm.models.draft}
    benches = {name: ForwardBench(name, runner, report.settings["context"]) for name, runner in models.items()}
    sizes = {MEMORY: 8 * last_level_cache(), **{name: bench.weight_bytes for name, bench in benches.items()}}
    samples = _Samples(models["target"].model.dtype)
    with ExitStack() as stack:
        streams = {
            (buffer, threads): stack.enter_context(CpuStream(size, threads))
            for buffer, size in sizes.items()
            for threads in sorted({1, cores})
        }
        for _ in range(ROUNDS * report.settings["repeats"]):
            if not stopped():
                samples.add_round(list(benches.values()), streams, rows)
                advance("forwards")
    report.peak_gflop_s = statistics.median(samples.peaks or [0.0])
    report.bandwidths = [Bandwidth(b, t, sizes[b], statistics.median(s)) for (b, t), s in samples.speeds.items()]
    report.forwards = [
        _forward(report, benches[name], count, statistics.median(seconds))
        for (name, count), seconds in samples.seconds.items()
    ]
    report.operators = [_operator(report, name, count, times) for (name, count, _), times in samples.operators.items()]


def _forward(report: Report, bench: ForwardBench, rows: int, seconds: float) -> Forward:
    moved, flops = bench.bytes(rows), bench.flops(rows)
    gb_s = moved / seconds / 1e9
    limit, memory = report.bandwidth(bench.name), report.bandwidth(MEMORY)
    return Forward(
        bench.name, rows, seconds * 1e3, moved, gb_s, gb_s / limit, gb_s / memory, flops, flops / seconds / 1e9
    )  # fmt: skip


def _operator(report: Report, model: str, rows: int, times: Sequence[OperatorTime]) -> Operator:
    timed = replace(
        times[0],
        seconds=statistics.median(t.seconds for t in times),
        overhead=statistics.median(t.overhead for t in times),
    )
    us, call_us = timed.kernel_seconds * 1e6, timed.seconds * 1e6
    gb_s = timed.bytes / timed.kernel_seconds / 1e9
    share = gb_s / report.bandwidth(model) if timed.kernel_seconds > _TOO_SHORT * timed.overhead else None
    return Operator(model, rows, timed.op, timed.calls, us, call_us, timed.bytes, share)


def _peak_gflop_s(dtype: torch.dtype) -> float:
    """Of one thread that multiplies and adds as ``linear`` does, registers alone."""
    from pearl_kernels.cpu import _core

    speeds = []
    for _ in range(10):
        begin = time.perf_counter()
        operations = _core.multiply_registers(DTYPE_CODES[dtype], _PEAK_STEPS)
        speeds.append(operations / (time.perf_counter() - begin) / 1e9)
    return max(speeds)
