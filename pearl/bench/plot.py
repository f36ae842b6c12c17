"""The picture of a contest: tokens per second over the batch, or bars where there is one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pearl.bench.measure import MethodResult

_COLOURS = {"autoregressive": "#4a5568", "speculative": "#c05621", "pearl": "#2f855a"}
_THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.55, "zorder": 1}
_THICK: dict[str, Any] = {"linewidth": 2.4, "marker": "o", "markersize": 5, "zorder": 2}
_LABEL_GAP = 0.024  # between labels of lines, of the axis' height


def draw_speeds(results: Sequence[MethodResult], title: str, path: Path) -> None:
    """PNG or SVG, by the name's ending. A method has one colour; a fixed window of it is a thin line, numbered at its
    end. Whiskers are the spread of the repeats.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    several = len({r.batch for r in results}) > 1
    height = 5.5 if several else 1.6 + 0.3 * len(results)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    (_draw_lines if several else _draw_bars)(axes, results)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_lines(axes: Any, results: Sequence[MethodResult]) -> None:
    lines: dict[str, list[MethodResult]] = {}
    for r in results:
        lines.setdefault(r.method, []).append(r)
    legend: dict[str, Any] = {}
    ends: dict[str, MethodResult] = {}  # of fixed windows, whose labels stand there
    for name, points in lines.items():
        method, at, _ = name.partition("@")
        fixed = _is_fixed(name)
        style = _THIN if fixed else _THICK
        xs, ys, whiskers = [r.batch for r in points], [r.tok_s for r in points], [_whisker(r) for r in points]
        drawn = axes.errorbar(
            xs, ys, None if fixed else whiskers, color=_COLOURS[method], linestyle="--" if at and not fixed else "-",
            capsize=3, elinewidth=0.8, **style,
        )  # fmt: skip
        legend.setdefault(f"{method} at fixed windows" if fixed else name, drawn)
        if fixed:
            ends[name] = points[-1]
    batches = sorted({r.batch for r in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.set(xlabel="requests that run at once", ylabel="tokens per second")
    axes.grid(True, linewidth=0.3)
    axes.legend(legend.values(), legend.keys(), fontsize=8, frameon=False, loc="upper left")
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Mapping[str, MethodResult]) -> None:
    """Windows at the right ends of their lines: one column for each method, and labels apart from each other."""
    gap = _LABEL_GAP * axes.get_ylim()[1]
    methods = list(dict.fromkeys(name.partition("@")[0] for name in ends))
    for column, method in enumerate(methods):
        mine = sorted((r.tok_s, name) for name, r in ends.items() if name.startswith(f"{method}@"))
        places = spread_out([speed for speed, _ in mine], gap)
        for place, (speed, name) in zip(places, mine, strict=True):
            axes.annotate(
                name.partition("@")[2], (ends[name].batch, speed), (14 + 26 * column, place),
                textcoords=("offset points", "data"), fontsize=7, va="center", color=_COLOURS[method],
                arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": _COLOURS[method], "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def spread_out(values: Sequence[float], gap: float) -> list[float]:
    """Ascending ones, moved as a group around their mean where they are nearer to each other than ``gap``."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + gap * index for group in groups for index in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def _draw_bars(axes: Any, results: Sequence[MethodResult]) -> None:
    colours = [_COLOURS[r.method.partition("@")[0]] for r in results]
    drawn = axes.barh(
        [r.method for r in results], [r.tok_s for r in results], color=colours,
        xerr=[_whisker(r) for r in results], error_kw={"linewidth": 0.8, "capsize": 2},
    )  # fmt: skip
    for bar, r in zip(drawn, results, strict=True):
        bar.set_alpha(0.55 if _is_fixed(r.method) else 1.0)
    axes.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("tokens per second")


def _is_fixed(name: str) -> bool:
    return name.partition("@")[2].replace("+", "").isdecimal()


def _whisker(result: MethodResult) -> float:
    """To each side: together the interquartile range."""
    return (result.spread or 0.0) * result.tok_s / 2
