"""Draw what the pace does while the load changes, from one measured run: `python bench/pace_trace.py docs/pace.png`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from pearl import LLM, SamplingParams
from pearl.bench.command import run_command
from pearl.bench.measure import answered
from pearl.bench.options import check_picture, positive_numbers
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.engine.rounds import RoundRecord
from pearl.methods import Mode

COLOURS: dict[Mode, str] = {
    "autoregressive": "#4a5568", "speculative": "#c05621", "pearl": "#2f855a", "whole-windows": "#68a37f",
    "pre-verify-only": "#9ac7a8", "two-halves": "#8a6fb0",
}  # fmt: skip
PREDICTED = "#111111"


class Span(NamedTuple):
    """Rounds one after another: when they ended, in seconds, and what they were."""

    at: float
    requests: float
    window: float
    measured: float  # tokens per second
    predicted: float  # likewise; 0: nothing was


def spans(rounds: Sequence[RoundRecord], seconds: float) -> list[Span]:
    """Means of about so many seconds each."""
    found: list[Span] = []
    since: list[RoundRecord] = []
    took = 0.0
    for record in rounds:
        since.append(record)
        took += record.whole.seconds
        if took >= seconds:
            found.append(_span(since, took, rounds[0].whole.begin))
            since, took = [], 0.0
    return found


def _span(rounds: Sequence[RoundRecord], took: float, start: float) -> Span:
    whole = rounds[-1].whole
    tokens = sum(len(d.committed) for record in rounds for d in record.result.decisions.values())
    paces = [record.plan.pace for record in rounds if record.plan.pace is not None]
    requests = [len(pace.windows) for pace in paces]
    windows = [len(window) for record in rounds for window in record.result.windows.values()]
    predicted = [pace.tokens_per_second for pace in paces if pace.tokens_per_second]
    return Span(
        whole.begin + whole.seconds - start, _mean(requests), _mean(windows), tokens / took, _mean(predicted)
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def draw_pace(rounds: Sequence[RoundRecord], path: Path, seconds: float) -> None:
    """Three panels over time, PNG or SVG: tokens per second beside what was predicted, on the colours of the modes;
    requests that run; drafted tokens of a window. ``seconds``: over which means are taken.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, panels = pyplot.subplots(
        3, 1, figsize=(10, 5.6), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )  # fmt: skip
    points, shown = spans(rounds, seconds), _shade(panels[0], rounds)
    xs = [point.at for point in points]
    panels[0].plot(xs, [point.measured for point in points], color=PREDICTED, linewidth=1.6)
    panels[0].plot(xs, [point.predicted or None for point in points], color=PREDICTED, linewidth=1.2, linestyle=":")
    panels[1].step(xs, [point.requests for point in points], color=PREDICTED, linewidth=1.2, where="mid")
    panels[2].plot(xs, [point.window for point in points], color=PREDICTED, linewidth=1.2)
    for axis, label in zip(panels, ("tokens per second", "requests", "window"), strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(0)
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds")
    lines = [
        Line2D([], [], color=PREDICTED, linewidth=1.6, label="measured"),
        Line2D([], [], color=PREDICTED, linewidth=1.2, linestyle=":", label="predicted"),
    ]
    patches = [Patch(color=COLOURS[mode], alpha=0.35, label=mode) for mode in COLOURS if mode in shown]
    figure.legend(handles=[*lines, *patches], loc="outside upper center", ncols=8, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _shade(axis: Any, rounds: Sequence[RoundRecord]) -> set[Mode]:
    """The modes' colours behind the axis' lines, and which there are."""
    start, shown = rounds[0].whole.begin, set[Mode]()
    begin, mode = 0.0, None
    for record in [*rounds, None]:
        now = record.plan.pace.mode if record is not None and record.plan.pace is not None else None
        if record is not None and now == mode:
            continue
        last = rounds[-1].whole
        end = (record.whole.begin if record is not None else last.begin + last.seconds) - start
        if mode is not None:
            axis.axvspan(begin, end, color=COLOURS[mode], alpha=0.35, linewidth=0)
            shown.add(mode)
        begin, mode = end, now
    return shown


def main(
    output: Annotated[Path, typer.Argument(help="PNG or SVG")],
    load: Annotated[str, typer.Option(help="Requests at once, one phase after another")] = "1,4,16,64,16,1",
    seconds: Annotated[float, typer.Option(min=0.01, help="Over which means are taken")] = 0.1,
    tokens: Annotated[int, typer.Option(min=1, help="Longest output")] = 96,
    lasting: Annotated[int, typer.Option(min=1, help="Tokens of each phase, at least")] = 6000,
) -> None:
    """Run the bundled pair under a load that changes, with the automatic pace."""
    check_picture("pace_trace.py", output)
    phases = [number for part in load.split(",") for number in positive_numbers("--load", part)]
    prompts, rounds = load_prompts(BUILT_IN), list[RoundRecord]()
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with LLM(max_num_seqs=max(phases), prefix_caching=False) as llm:
        answered(llm.generate(prompts[0], params))
        llm.engine.observer = rounds.append
        for batch in phases:
            count = max(batch, -(-lasting // tokens // batch) * batch)
            for first in range(0, count, batch):  # all of a batch begin and end together
                answered(llm.generate([*islice(cycle(prompts), first, first + batch)], params))
    draw_pace(rounds, output, seconds)


if __name__ == "__main__":
    run_command(main)
