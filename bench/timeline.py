"""Draw when each model works, method by method, from one measured run: `python bench/timeline.py docs/timeline.png`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pearl import LLM, SamplingParams
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.timeline import draw_timeline
from pearl.engine.engine import RoundRecord

_RUNS: dict[str, dict[str, Any]] = {
    "autoregressive": {"method": "autoregressive"},
    "speculative": {"method": "speculative"},
    "pearl": {"method": "pearl"},
    "pearl, window rule fastest": {"method": "pearl", "window_rule": "fastest"},
}


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
    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder {output.parent} does not exist")
    runs: dict[str, list[RoundRecord]] = {}
    with LLM(draft_threads=1, target_threads=1, prefix_caching=False) as first:
        for name, options in _RUNS.items():
            rounds: list[RoundRecord] = []
            with first.variant(**options) as llm:
                llm.generate(prompts[prompt], SamplingParams(max_tokens=64))
                llm.engine.observer = rounds.append
                llm.generate(prompts[prompt], SamplingParams(max_tokens=128))
            if len(rounds) <= skip:
                raise typer.BadParameter(f"--skip {skip} leaves nothing of the {len(rounds)} rounds of {name}")
            runs[name] = rounds[skip:]
    draw_timeline(runs, output, milliseconds)


if __name__ == "__main__":
    typer.run(main)
