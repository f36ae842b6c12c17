"""The paper's overview figure, drawn from a real run: what each model did when, and what became of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.evaluation.pictures import new_figure

_FATES = {"held": "#4d9a6a", "rejected": "#b0413e", "dropped": "#cbd5e0", "own": "#3b5b92"}
_NAMES = {
    "held": "drafted token, held", "rejected": "drafted, rejected", "dropped": "drafted, in vain",
    "own": "the target's own token",
}  # fmt: skip
_TARGET, _DRAFT = 1.0, 0.0
_INCHES = 1.75  # of a run
_LONGEST = 6  # characters of a token that are shown
_NARROWEST = 0.009  # of the axis: a token of less gets no text


def token_timeline(runs: Mapping[str, Sequence[Mapping[str, Any]]], milliseconds: float) -> Any:
    """``runs``: rounds as of ``bench.evaluation.trace``. A panel for each, all on one time axis; a bar is a forward of
    the target, with the tokens that it judged, or a window of the draft, with those that it drafted.
    """
    from matplotlib.patches import Patch

    figure, axes = new_figure(0.7 + _INCHES * len(runs), nrows=len(runs), squeeze=False, sharex=True, width=11.5)
    for axis, (name, rounds) in zip(axes[:, 0], runs.items(), strict=True):
        tokens, prepared = _draw_run(axis, rounds, milliseconds)
        ahead = f", {prepared} windows came prepared" if prepared else ""
        axis.set_title(f"{name}: {tokens} tokens{ahead}", loc="left", fontsize=9)
        axis.set_yticks([_DRAFT, _TARGET], ["draft", "target"])
        axis.set_ylim(-0.55, 1.55)
        axis.set_xlim(0, milliseconds)
    axes[-1, 0].set_xlabel("milliseconds", fontsize=8)
    handles = [Patch(color=paint, label=_NAMES[fate]) for fate, paint in _FATES.items()]
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside upper center", ncols=4)
    return figure


def _draw_run(axis: Any, rounds: Sequence[Mapping[str, Any]], milliseconds: float) -> tuple[int, int]:
    """Tokens that were committed in the time, and windows that had been prepared."""
    tokens = prepared = 0
    start = _begin(rounds[0])
    for row in rounds:
        end = (row["end"] - start) * 1e3
        if end > milliseconds:
            break
        if row["target"]:
            own = [] if row["own"] is None else [{"text": row["own"], "fate": "own"}]
            _bar(axis, row["target"], start, _TARGET, [*row["tested"], *own], milliseconds)
        if row["draft"] and row["drafted"]:
            _bar(axis, row["draft"], start, _DRAFT, row["drafted"], milliseconds)
        if row["tested"] or row["own"] is not None:
            axis.axvline(end, color="#a0aec0", linewidth=0.5, linestyle=":", zorder=0)
        tokens += sum(token["fate"] == "held" for token in row["tested"]) + (row["own"] is not None)
        prepared += row["hit"]
    return tokens, prepared


def _begin(row: Mapping[str, Any]) -> float:
    return float(min(span[0] for span in (row["target"], row["draft"]) if span))


def _bar(
    axis: Any,
    span: Sequence[float],
    start: float,
    lane: float,
    tokens: Sequence[Mapping[str, str]],
    milliseconds: float,
) -> None:
    begin, length = (span[0] - start) * 1e3, span[1] * 1e3
    each = length / max(1, len(tokens))
    for index, token in enumerate(tokens):
        left, paint = begin + index * each, _FATES[token["fate"]]
        axis.broken_barh([(left, each)], (lane - 0.36, 0.72), facecolors=paint, edgecolor="white", linewidth=0.5)
        if each > _NARROWEST * milliseconds:
            ink = "black" if token["fate"] == "dropped" else "white"
            axis.text(
                left + each / 2, lane, _shown(token["text"]), rotation=90, fontsize=6.5, ha="center", va="center",
                color=ink, family="monospace", parse_math=False, clip_on=True,
            )  # fmt: skip


def _shown(text: str) -> str:
    """White space as signs, and not more than fits."""
    signs = text.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    return signs if len(signs) <= _LONGEST else signs[: _LONGEST - 1] + "…"


def span_of(runs: Mapping[str, Sequence[Mapping[str, Any]]], rounds: int) -> float:
    """Milliseconds in which the run with the longest rounds has so many of them."""
    return max(float(run[min(rounds, len(run)) - 1]["end"] - _begin(run[0])) * 1e3 for run in runs.values() if run)
