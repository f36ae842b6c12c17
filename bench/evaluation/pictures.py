"""The report's pictures, from summaries (``bench.evaluation.summary``): every function returns a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.evaluation.anatomy import Anatomy
from bench.evaluation.setups import REFERENCE
from bench.evaluation.summary import ALL, Row

_FAMILIES = (  # by how a setup's name begins
    ("autoregressive", "#4a5568"), ("speculative", "#c05621"), ("pearl", "#2f855a"), ("coupled", "#2b6cb0"),
    ("n-gram", "#8a6fb0"), ("lookahead", "#b7791f"), ("ouroboros", "#b7791f"), ("transformers", "#a0aec0"),
)  # fmt: skip
_PARTS = (("target", "#3b5b92"), ("draft", "#e08e45"), ("verify", "#7a4fc4"), ("host", "#718096"), ("idle", "#e2e8f0"))
_KINDS = (
    ("post", "#2f855a"), ("pre", "#9ac7a8"), ("verify", "#c05621"), ("draft", "#e08e45"), ("plain", "#4a5568"),
)  # fmt: skip
KIND_NAMES = {
    "post": "post-verify: both models, a window pending", "pre": "pre-verify: both models, nothing pending",
    "verify": "target alone, a window pending", "draft": "draft alone", "plain": "target alone, nothing drafted",
}  # fmt: skip
_LINES = ("#2f855a", "#c05621", "#2b6cb0", "#8a6fb0", "#b7791f", "#4a5568")
_WIDTH = 9.6


def new_figure(height: float, **options: Any) -> tuple[Any, Any]:
    """And its axes, without lines above and at the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(options.pop("width", _WIDTH), height), layout="constrained", **options)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def colour(setup: str) -> str:
    return next((found for beginning, found in _FAMILIES if setup.startswith(beginning)), "#4a5568")


def speedups(found: Sequence[Row], sets: Sequence[str]) -> Any:
    """As the paper's first figure: a panel for each data set, a bar for each setup, over plain decoding."""
    bars = [row for row in found if row.part == ALL and row.speedup is not None]
    names = list(dict.fromkeys(row.setup for row in bars))
    columns = min(2, len(sets))
    lines = -(-len(sets) // columns)
    figure, axes = new_figure(
        lines * (1.0 + 0.21 * len(names)), nrows=lines, ncols=columns, squeeze=False, sharey=True, sharex=True
    )  # fmt: skip
    for axis, data_set in zip(axes.flat, sets, strict=False):
        _bars(axis, [row for row in bars if row.data_set == data_set], names)
        axis.set_title(data_set, fontsize=10, loc="left")
    for axis in axes.flat[len(sets) :]:
        axis.set_visible(False)
    axes[0, 0].set_xlim(0, 1.14 * max(max(row.speedup or 0.0, row.speedup_high or 0.0) for row in bars))
    for axis in axes[-1]:
        axis.set_xlabel("speedup over autoregressive", fontsize=8)
    return figure


def _bars(axis: Any, those: Sequence[Row], names: Sequence[str]) -> None:
    """Whiskers are the middle half of the answers' ratios; the number stands behind them."""
    for row in those:
        place, speedup = names.index(row.setup), row.speedup or 0.0
        axis.barh(place, speedup, 0.72, color=colour(row.setup))
        end = speedup
        if row.speedup_low is not None and row.speedup_high is not None:
            axis.plot([row.speedup_low, row.speedup_high], [place, place], color="#1a202c", linewidth=0.9)
            end = max(end, row.speedup_high)
        axis.annotate(f"{speedup:.2f}", (end, place), (4, 0), textcoords="offset points", fontsize=7.5, va="center")
    axis.axvline(1, color="#1a202c", linewidth=0.7, linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)


def parts(found: Sequence[Row], data_set: str, chosen: Sequence[str]) -> Any:
    """Speedups of a data set's languages, categories or turns, a dot for each of the chosen setups."""
    rows = [row for row in found if row.data_set == data_set and row.part != ALL and row.speedup is not None]
    names = list(dict.fromkeys(row.part for row in rows))
    figure, axis = new_figure(1.0 + 0.3 * len(names))
    for index, setup in enumerate(chosen):
        own = [row for row in rows if row.setup == setup]
        places = [names.index(row.part) for row in own]
        axis.scatter(
            [row.speedup for row in own], places, s=42, color=_LINES[index % len(_LINES)], label=setup, zorder=3
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(True, axis="y", linewidth=0.3)
    axis.axvline(1, color="#1a202c", linewidth=0.7, linestyle=":")
    axis.set_xlabel("speedup over autoregressive", fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def windows(found: Sequence[Row], sets: Sequence[str]) -> Any:
    """Decoding speed over the fixed window, measured and predicted."""
    figure, axes = new_figure(0.6 + 2.5 * -(-len(sets) // 2), nrows=-(-len(sets) // 2), ncols=2, squeeze=False)
    for axis, data_set in zip(axes.flat, sets, strict=False):
        rows = [row for row in found if row.data_set == data_set and row.part == ALL and row.decode_tok_s]
        for method in ("speculative", "pearl"):
            own = sorted((int(r.setup.partition("@")[2]), r) for r in rows if r.setup.startswith(f"{method}@"))
            if own:
                xs = [window for window, _ in own]
                axis.plot(
                    xs, [row.decode_tok_s for _, row in own], "o-", color=colour(method), markersize=3.5, label=method
                )
                axis.plot(
                    xs, [row.predicted for _, row in own], ":", color=colour(method), label=f"{method}, predicted"
                )
        for row in rows:
            if row.setup == REFERENCE:
                axis.axhline(row.decode_tok_s, color=colour(REFERENCE), linewidth=1, linestyle="--", label=REFERENCE)
        axis.set_title(data_set, fontsize=10, loc="left")
        axis.set(xlabel="drafted tokens a round", ylabel="tokens/s, decoding")
        axis.set_ylim(0)
    for axis in axes.flat[len(sets) :]:
        axis.set_visible(False)
    _legend(figure, axes.flat[0])
    return figure


def over_load(found: Sequence[Row], data_set: str, what: str) -> Any:
    """Two panels: tokens per second, and the speedup. ``what``: over which field, batch or temperature."""
    figure, (speed, ratio) = new_figure(3.4, ncols=2)
    rows = [row for row in found if row.data_set == data_set and row.part == ALL]
    for index, name in enumerate(dict.fromkeys(row.setup.partition(", ")[0] for row in rows)):
        paint = _LINES[index % len(_LINES)]
        own = sorted(
            (row for row in rows if row.setup.partition(", ")[0] == name), key=lambda row: float(getattr(row, what))
        )
        xs, ys = [getattr(row, what) for row in own], [row.speedup or 0.0 for row in own]
        speed.plot(xs, [row.tok_s for row in own], "o-", color=paint, markersize=4, linewidth=1.5, label=name)
        ratio.plot(xs, ys, "o-", color=paint, markersize=4, linewidth=1.5)
        low, high = [row.speedup_low or y for row, y in zip(own, ys, strict=True)], [row.speedup_high for row in own]
        highest = [y if end is None else end for y, end in zip(ys, high, strict=True)]
        ratio.fill_between(xs, low, highest, color=paint, alpha=0.12, linewidth=0)
    for axis, label in ((speed, "tokens/s"), (ratio, "speedup over autoregressive")):
        axis.set(xlabel="requests at once" if what == "batch" else "temperature", ylabel=label)
        axis.grid(True, linewidth=0.3)
        if what == "batch":
            _powers_of_two(axis, sorted({row.batch for row in rows}))
        axis.set_ylim(0)
    _legend(figure, speed)
    return figure


def _powers_of_two(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside upper center", ncols=min(5, len(labels)))


def acceptance(anatomies: Mapping[str, Mapping[str, Anatomy]], setup: str) -> Any:
    """Of a setup: how many of the tokens at each place of a verdict held, a line for each data set."""
    from matplotlib.ticker import MaxNLocator

    figure, axis = new_figure(3.0, width=7)
    for index, (data_set, found) in enumerate(anatomies.items()):
        if setup in found:
            counts = [
                (place + 1, held / tested) for place, (tested, held) in enumerate(found[setup].positions) if tested
            ]
            xs, ys = zip(*counts, strict=True) if counts else ((), ())
            axis.plot(xs, ys, "o-", color=_LINES[index % len(_LINES)], markersize=4, label=data_set)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="place in the verdict", ylabel="share that held")
    axis.set_ylim(0, 1.02)
    axis.grid(True, linewidth=0.3)
    axis.legend(fontsize=8, frameon=False)
    return figure


def kinds(anatomies: Mapping[str, Anatomy]) -> Any:
    """By setup: the share of each kind of round."""
    figure, axis = new_figure(0.9 + 0.32 * len(anatomies))
    for place, found in enumerate(anatomies.values()):
        left, total = 0.0, sum(found.kinds.values()) or 1
        for kind, paint in _KINDS:
            share = found.kinds[kind] / total
            axis.barh(place, share, 0.7, left, color=paint)
            if share > 0.06:
                axis.text(left + share / 2, place, f"{share:.0%}", fontsize=7, va="center", ha="center", color="white")
            left += share
    _stacked(figure, axis, anatomies, [(KIND_NAMES[kind], paint) for kind, paint in _KINDS])
    axis.set_xlabel("share of the rounds", fontsize=8)
    return figure


def times(anatomies: Mapping[str, Anatomy]) -> Any:
    """By setup, both sides of a round: what each model's side did with its time."""
    figure, axis = new_figure(0.9 + 0.52 * len(anatomies))
    for place, found in enumerate(anatomies.values()):
        whole = found.seconds["whole"] or 1.0
        for side, offset in (("target", -0.2), ("draft", 0.2)):
            work, verify, host = (found.seconds[part] / whole for part in (side, "verify", "host"))
            lengths = (("target", work if side == "target" else 0.0), ("draft", work if side == "draft" else 0.0),
                       ("verify", verify), ("host", host), ("idle", max(0.0, 1 - work - verify - host)))  # fmt: skip
            left = 0.0
            for part, length in lengths:
                axis.barh(place + offset, length, 0.36, left, color=dict(_PARTS)[part])
                left += length
    _stacked(figure, axis, anatomies, _PARTS)
    axis.set_xlabel(
        "share of the time of rounds that only decode; upper bar: target's side, lower: draft's", fontsize=8
    )
    return figure


def _stacked(figure: Any, axis: Any, names: Mapping[str, object], legend: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    axis.set_yticks(range(len(names)), list(names))
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    handles = [Patch(color=paint, label=name) for name, paint in legend]
    figure.legend(
        handles=handles, fontsize=8, frameon=False, loc="outside upper center", ncols=min(5, 1 + len(legend) // 2)
    )


def branches(found: Anatomy) -> Any:
    """Prepared windows: of those for so many held tokens and an alternative of this rank, how many came true."""
    cells = {tuple(map(int, key.split())): counts for key, counts in found.branches.items()}
    helds, ranks = (sorted({key[i] for key in cells}) for i in (0, 1))
    figure, axis = new_figure(1.3 + 0.42 * len(ranks), width=7.5)
    grid = [[_rate(cells.get((held, rank))) for held in helds] for rank in ranks]
    picture = axis.imshow(grid, cmap="Greens", vmin=0, vmax=max(0.01, *(v for row in grid for v in row if v == v)))
    axis.set_aspect("auto")
    for y, rank in enumerate(ranks):
        for x, held in enumerate(helds):
            prepared, hit = cells.get((held, rank), (0, 0))
            if prepared:
                dark = hit / prepared > 0.6 * picture.get_clim()[1]
                axis.text(
                    x, y, f"{hit}/{prepared}", fontsize=7, ha="center", va="center", color="white" if dark else "black"
                )
    axis.set_xticks(range(len(helds)), helds)
    axis.set_yticks(range(len(ranks)), [rank + 1 for rank in ranks])
    axis.set(xlabel="tokens that were to hold", ylabel="rank of the correction")
    figure.colorbar(picture, label="share that came true")
    return figure


def _rate(counts: Sequence[int] | None) -> float:
    return counts[1] / counts[0] if counts and counts[0] else float("nan")
