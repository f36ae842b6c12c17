"""Draw when each model works, method by method, from one measured run: `python bench/timeline.py docs/timeline.png`."""

from pathlib import Path
from typing import Annotated

import typer

from pearl import LLM, SamplingParams
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.timeline import draw_timeline
from pearl.engine.engine import RoundRecord


def main(
    output: Annotated[Path, typer.Argument(help="PNG or SVG")],
    milliseconds: Annotated[float, typer.Option(help="Length of the time axis")] = 80,
    prompt: Annotated[int, typer.Option(help="Number of the built-in prompt")] = 0,
    skip: Annotated[int, typer.Option(help="Rounds of the beginning to leave out")] = 8,
) -> None:
    """Run the bundled pair on one built-in prompt with every method."""
    text = load_prompts(BUILT_IN)[prompt]
    runs: dict[str, list[RoundRecord]] = {}
    with LLM(draft_threads=1, target_threads=1, prefix_caching=False) as first:
        for method in ("autoregressive", "speculative", "pearl"):
            rounds: list[RoundRecord] = []
            with first.variant(method=method) as llm:
                llm.generate(text, SamplingParams(max_tokens=64))
                llm.engine.observer = rounds.append
                llm.generate(text, SamplingParams(max_tokens=128))
            runs[method] = rounds[skip:]
    draw_timeline(runs, output, milliseconds)


if __name__ == "__main__":
    typer.run(main)
