"""Draw when each model works, method by method, from one measured run: `python bench/timeline.py docs/timeline.png`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pearl import LLM, SamplingParams
from pearl.bench.command import run_command
from pearl.bench.measure import answered
from pearl.bench.options import check_picture
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.engine.rounds import RoundRecord, hits

TARGET_COLOUR, DRAFT_COLOUR, ACCEPTED_COLOUR, OWN_COLOUR = "#3b5b92", "#e08e45", "#4d9a6a", "#b0413e"
PREPARED_COLOUR = "#7a4fc4"
_WINDOW = 5  # the pace would choose other modes on the way
RUNS: dict[str, dict[str, Any]] = {
    "autoregressive": {"method": "autoregressive"},
    "speculative": {"method": "speculative", "window": _WINDOW},
    "pearl": {"method": "pearl", "window": _WINDOW},
    "pearl, prepared windows": {"method": "pearl", "window": _WINDOW, "prepared_windows": 3},
}


def draw_timeline(runs: Mapping[str, Sequence[RoundRecord]], path: Path, milliseconds: float) -> None:
    """Draw the first ``milliseconds`` of each run, one panel a method, on one time axis, into a PNG or SVG.

    Bars are measured times of the two models; a line under a draft's bar: it prepared windows too. A dot is a committed
    token, at the end of its round: green if it was drafted and accepted, violet if that was in a prepared window, red
    if the target supplied it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(runs), 1, figsize=(10, 1.5 * len(runs) + 0.9), sharex=True, squeeze=False)
    for axis, (name, rounds) in zip(panels[:, 0], runs.items(), strict=True):
        _draw_run(axis, name, rounds, milliseconds)
    panels[-1, 0].set_xlim(0, milliseconds)
    panels[-1, 0].set_xlabel("milliseconds")
    figure.legend(handles=_legend(), loc="upper right", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_run(axis: Any, name: str, rounds: Sequence[RoundRecord], milliseconds: float) -> None:
    start = rounds[0].whole.begin
    tokens, ahead = 0, dict[int, int]()  # by request: tokens of the prepared window that it went on with
    for record in rounds:
        end = (record.whole.begin + record.whole.seconds - start) * 1e3
        if end > milliseconds:
            break
        for lane, busy, colour in ((1, record.target, TARGET_COLOUR), (0, record.proposal.busy, DRAFT_COLOUR)):
            if busy.seconds:
                span = ((busy.begin - start) * 1e3, busy.seconds * 1e3)
                axis.broken_barh([span], (lane - 0.32, 0.64), facecolors=colour, edgecolor="white", linewidth=0.4)
                if lane == 0 and any(item.branches for item in record.plan.draft.work):
                    axis.broken_barh([span], (-0.5, 0.16), facecolors=PREPARED_COLOUR)
        for request_id, decision in record.result.decisions.items():
            prepared = min(decision.accepted, ahead.pop(request_id, 0))
            for index in range(len(decision.committed)):
                colour = ACCEPTED_COLOUR if index < decision.accepted else OWN_COLOUR
                colour = PREPARED_COLOUR if index < prepared else colour
                axis.plot(end, 1.65 + 0.28 * index, "o", color=colour, markersize=3.2)
            tokens += len(decision.committed)
        ahead |= hits(record)
    axis.set_yticks([0, 1], ["draft", "target"])
    axis.set_ylim(-0.6, 4.2)
    axis.set_title(f"{name}: {tokens} tokens", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = {"target works": TARGET_COLOUR, "draft works": DRAFT_COLOUR, "also ahead": PREPARED_COLOUR}
    dots = {
        "token: drafted, accepted": ACCEPTED_COLOUR,
        "in a prepared window": PREPARED_COLOUR,
        "token: the target's own": OWN_COLOUR,
    }
    return [
        *(Patch(color=colour, label=label) for label, colour in bars.items()),
        *(Line2D([], [], marker="o", linestyle="", color=colour, label=label) for label, colour in dots.items()),
    ]


def main(
    output: Annotated[Path, typer.Argument(help="PNG or SVG")],
    milliseconds: Annotated[float, typer.Option(help="Length of the time axis")] = 20,
    prompt: Annotated[int, typer.Option(min=0, help="Number of the built-in prompt")] = 0,
    skip: Annotated[int, typer.Option(min=0, help="Rounds of the beginning to leave out")] = 8,
) -> None:
    """Run the bundled pair on one built-in prompt with every method."""
    prompts = load_prompts(BUILT_IN)
    if prompt >= len(prompts):
        raise typer.BadParameter(f"--prompt {prompt}: the built-in set has prompts 0 to {len(prompts) - 1}")
    check_picture("timeline.py", output)
    runs: dict[str, list[RoundRecord]] = {}
    with LLM(draft_threads=1, target_threads=1, prefix_caching=False) as first:
        for name, options in RUNS.items():
            rounds: list[RoundRecord] = []
            with first.variant(**options) as llm:
                answered(llm.generate(prompts[prompt], SamplingParams(max_tokens=64)))
                llm.engine.observer = rounds.append
                answered(llm.generate(prompts[prompt], SamplingParams(max_tokens=128)))
            if len(rounds) <= skip:
                raise typer.BadParameter(f"--skip {skip} leaves nothing of the {len(rounds)} rounds of {name}")
            runs[name] = rounds[skip:]
    draw_timeline(runs, output, milliseconds)


if __name__ == "__main__":
    run_command(main)
