"""What the CPU roofline measured, as tables for people, JSON for programs, and a picture."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from bench.roofline.generators import LeftOut
from pearl.bench.report import machine, provenance, write_whole

MEMORY = "memory"  # the buffer that no cache holds


@dataclass(frozen=True)
class Bandwidth:
    buffer: str  # "memory", or the model whose weights are as large
    threads: int
    bytes: int
    gb_s: float


@dataclass(frozen=True)
class Forward:
    """``share_of_limit``: of the read bandwidth of a buffer as large as the model's weights, on one thread."""

    model: str
    rows: int
    ms: float
    bytes: int
    gb_s: float
    share_of_limit: float
    share_of_memory_bandwidth: float
    flops: int
    gflop_s: float


@dataclass(frozen=True)
class Operator:
    """``us``: of one call without what Python and its checks cost, which ``call_us`` includes.

    share_of_limit is None where the kernel is too short to be told from the cost of its call.
    """

    model: str
    rows: int
    op: str
    calls: int
    us: float
    call_us: float
    bytes: int
    share_of_limit: float | None


@dataclass(frozen=True)
class Generation:
    """``speedup`` is over the fastest ``generate`` of transformers. ``decode_tok_s``: without the prompts, up to each
    first token; None where the engine does not tell. ``same_tokens``: share of the prompts for which all tokens are
    those of our autoregressive decoding. Other engines round elsewhere: in bf16 a near tie ends the equality."""

    engine: str
    method: str
    threads: int
    dtype: str
    tok_s: float
    decode_tok_s: float | None
    tokens: int
    seconds: float
    speedup: float | None
    same_tokens: float | None


@dataclass
class Report:
    """What is known so far; an interrupted run has a part of it."""

    settings: dict[str, Any]
    dtype: str = ""
    peak_gflop_s: float = 0.0
    bandwidths: list[Bandwidth] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    generation: list[Generation] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    interrupted: bool = False

    def bandwidth(self, buffer: str, threads: int = 1) -> float:
        return next((b.gb_s for b in self.bandwidths if (b.buffer, b.threads) == (buffer, threads)), 0.0)


def write_json(path: Path, report: Report) -> None:
    content = {
        **provenance(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "settings": report.settings,
        "dtype": report.dtype,
        "interrupted": report.interrupted,
        "read_bandwidth_gb_s": report.bandwidth(MEMORY),  # of one thread
        "read_bandwidth": [asdict(b) for b in report.bandwidths],
        "peak_gflop_s": report.peak_gflop_s,
        "forwards": [asdict(f) for f in report.forwards],
        "ops": [asdict(o) for o in report.operators],
        "generation": [asdict(g) for g in report.generation],
        "left_out": [asdict(e) for e in report.left_out],
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")


def tables(report: Report) -> RenderableType:
    parts: list[RenderableType] = []
    if report.bandwidths:
        parts.append(_bandwidth_table(report))
    if report.forwards:
        parts.append(_forward_table(report))
    if report.operators:
        parts.append(_operator_table(report))
    if report.generation:
        parts.append(_generation_table(report))
    parts += [f"left out: {entry.engine}: {entry.reason}" for entry in report.left_out]
    if report.interrupted:
        parts.append("interrupted: what is missing was not measured")
    return Group(*parts)


def _table(title: str, left: int, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _bandwidth_table(report: Report) -> Table:
    threads = sorted({b.threads for b in report.bandwidths})
    heads = [f"GB/s, {t} thread{'s' * (t > 1)}" for t in threads]
    table = _table("read bandwidth", 1, "buffer", "MB", *heads)
    for buffer in dict.fromkeys(b.buffer for b in report.bandwidths):
        size = next(b.bytes for b in report.bandwidths if b.buffer == buffer)
        name = buffer if buffer == MEMORY else f"as the {buffer}'s weights"
        table.add_row(name, f"{size / 1e6:.1f}", *(f"{report.bandwidth(buffer, t):.1f}" for t in threads))
    return table


def _forward_table(report: Report) -> Table:
    title = f"a forward, one thread, {report.dtype}; the limit reads a buffer as large as the weights"
    table = _table(title, 1, "model", "rows", "ms", "MB", "GB/s", "of limit", "of memory", "GFLOP/s")
    for f in report.forwards:
        table.add_row(
            f.model, str(f.rows), f"{f.ms:.3f}", f"{f.bytes / 1e6:.1f}", f"{f.gb_s:.1f}", f"{f.share_of_limit:.0%}",
            f"{f.share_of_memory_bandwidth:.0%}", f"{f.gflop_s:.1f}",
        )  # fmt: skip
    return table


def _operator_table(report: Report) -> Table:
    rows = sorted({o.rows for o in report.operators})
    heads = [head for n in rows for head in (f"us, n={n}", "of limit")]
    table = _table("its operators, one call each, n rows", 2, "model", "operator", "calls", "KB", *heads)
    for model, op in dict.fromkeys((o.model, o.op) for o in report.operators):
        mine = {o.rows: o for o in report.operators if (o.model, o.op) == (model, op)}
        first, cells = next(iter(mine.values())), []
        for n in rows:
            share = mine[n].share_of_limit if n in mine else None
            cells += [f"{mine[n].us:.1f}" if n in mine else "", "-" if share is None else f"{share:.0%}"]
        table.add_row(model, op, str(first.calls), f"{first.bytes / 1e3:.1f}", *cells)
    return table


def _generation_table(report: Report) -> Table:
    title = f"greedy generation, one request at a time, {report.dtype}"
    table = _table(title, 2, "engine", "method", "threads", "tok/s", "decoding", "vs generate", "equal")
    for g in report.generation:
        speedup = "-" if g.speedup is None else f"{g.speedup:.2f}x"
        decoding = "-" if g.decode_tok_s is None else f"{g.decode_tok_s:.1f}"
        same = "-" if g.same_tokens is None else f"{g.same_tokens:.0%}"
        table.add_row(g.engine, g.method, str(g.threads), f"{g.tok_s:.1f}", decoding, speedup, same)
    return table


def draw(report: Report, path: Path) -> None:
    """A roofline of the forwards, and bars of the generation speeds. PNG or SVG, by the name's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1))
    _draw_roofline(left, report)
    _draw_bars(right, report.generation)
    figure.suptitle(f"{machine()['cpu']}, {machine()['cores']} cores, {report.dtype}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


_MODEL_COLOURS = {"target": "#2b6cb0", "draft": "#c05621"}


def _draw_roofline(axes: Any, report: Report) -> None:
    """Arithmetic against bytes. A forward's intensity is about its number of rows in bf16, half of it in fp32."""
    axes.set(title="Forwards on one thread", xlabel="flop per byte moved", ylabel="GFLOP/s")
    if not report.forwards:
        return
    intensities = [f.flops / f.bytes for f in report.forwards]
    span = [min(intensities) / 1.6, max(intensities) * 1.6]
    roofs = [(MEMORY, "--", "#718096"), *((model, "-", colour) for model, colour in _MODEL_COLOURS.items())]
    for buffer, style, colour in roofs:
        limit = report.bandwidth(buffer)
        roof = [min(limit * x, report.peak_gflop_s or float("inf")) for x in span]
        label = f"{limit:.0f} GB/s, " + ("memory" if buffer == MEMORY else f"buffer as the {buffer}'s weights")
        knee = report.peak_gflop_s / limit if limit else 0.0
        inside = span[0] < knee < span[1]
        xs = [span[0], knee, span[1]] if inside else span
        ys = [roof[0], report.peak_gflop_s, roof[1]] if inside else roof
        axes.plot(xs, ys, style, color=colour, linewidth=1, label=label)
    for model, colour in _MODEL_COLOURS.items():
        mine = [f for f in report.forwards if f.model == model]
        xs, ys = [f.flops / f.bytes for f in mine], [f.gflop_s for f in mine]
        axes.plot(xs, ys, "o", color=colour, markersize=5, label=f"{model}, rows as numbered")
        for f, x, y in zip(mine, xs, ys, strict=True):
            axes.annotate(str(f.rows), (x, y), textcoords="offset points", xytext=(5, -9), fontsize=8, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right")


def _draw_bars(axes: Any, generation: Sequence[Generation]) -> None:
    axes.set(title="Greedy generation, one request at a time", xlabel="tokens per second")
    names = [f"{g.engine} {g.method}, {g.threads} thread{'s' * (g.threads > 1)}" for g in generation]
    colours = ["#2f855a" if g.engine == "pearl" else "#a0aec0" for g in generation]
    bars = axes.barh(names, [g.tok_s for g in generation], color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(axis="y", labelsize=8)
