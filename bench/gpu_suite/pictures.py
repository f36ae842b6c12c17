"""Pictures of the GPU suite: a round beside the longer of its forwards, and the kernels' share of the bandwidth.

A process of its own, ``python -m bench.gpu_suite.pictures OUT ROUND.png KERNELS.png``, that reads OUT/summary.json:
matplotlib may be missing, and the first time it runs it looks for fonts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_suite.latency import SYNTHETIC, RoundBars, round_bars
from bench.gpu_suite.stages import DRY

_REACHED, _MISSED, _OTHER = "#2f855a", "#c53030", "#a0aec0"
_INCHES = 0.24  # of a bar


def stage_numbers(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Sequence[Mapping[str, Any]] = [stage["numbers"] for stage in summary["stages"] if stage["name"] == name]
    return found[0] if found else {}


def draw_kernels(kernels: Mapping[str, Any], path: Path, dry: bool) -> None:
    """Our fastest provider of each operator and shape; a line marks the aim."""
    from matplotlib import pyplot

    shapes = kernels["shapes"]
    aimed = [s for s in shapes if s["aim"] is not None]
    others = [s for s in shapes if s["aim"] is None]
    bars = [*aimed, *others]
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + _INCHES * len(bars)), layout="constrained")
    colours = [_OTHER if s["aim"] is None else _REACHED if s["reached"] else _MISSED for s in bars]
    names = [f"{s['op']}  {s['shape']}  ({s['provider']})" for s in bars]
    drawn = axes.barh(range(len(bars)), [100 * s["share"] for s in bars], color=colours)
    axes.bar_label(drawn, [f"{100 * s['share']:.1f}" for s in bars], padding=3, fontsize=7)
    axes.set_yticks(range(len(bars)), names, fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)  # the first one on top
    if aimed:
        axes.axvline(100 * aimed[0]["aim"], color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"% of the measured read bandwidth, {kernels['device']}")
    _title(axes, "Kernels, fastest provider; green reaches the aim, red misses it, grey has none", dry)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_rounds(bars: Sequence[RoundBars], path: Path, dry: bool) -> None:
    """For each pair, batch and context: both forwards alone, and the rounds that hold them."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1.8 + 4.2 * _INCHES * len(bars)), layout="constrained")
    places = range(len(bars))
    groups = (
        ("target's verification alone", "#2b6cb0", [bar.verify for bar in bars]),
        ("draft's window alone", "#c05621", [bar.draft for bar in bars]),
        ("PEARL round: both at once", _REACHED, [bar.pearl for bar in bars]),
        ("speculative round: in turns", _OTHER, [bar.speculative for bar in bars]),
    )
    for index, (label, colour, values) in enumerate(groups):
        offset = 0.2 * (index - 1.5)
        drawn = axes.barh([place + offset for place in places], values, 0.19, color=colour, label=label)
        axes.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3, fontsize=7)
    names = [f"{bar.name}\nPEARL round / longer forward: {bar.over_longer:.2f}" for bar in bars]
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("ms, median")
    axes.margins(x=0.08)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(groups))
    _title(axes, f"A round beside its forwards; {SYNTHETIC}", dry)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _title(axes: Any, text: str, dry: bool) -> None:
    axes.set_title(f"{DRY}: {text}" if dry else text, fontsize=10, loc="right")


def main(out: Path, rounds: str, kernels: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    summary = json.loads((out / "summary.json").read_text())
    if bars := [bar for name in ("latency", "latency_32b") for bar in round_bars(stage_numbers(summary, name))]:
        draw_rounds(bars, out / rounds, summary["dry_run"])
    if found := stage_numbers(summary, "kernels"):
        draw_kernels(found, out / kernels, summary["dry_run"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
