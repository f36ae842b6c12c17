"""``pearl chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from pearl.cli.grouping import spread
from pearl.cli.options import EngineOptions, OutputOptions, SamplingOptions
from pearl.cli.streams import require_output
from pearl.cli.terminal import Terminal
from pearl.cli.text_input import checked_text, require_standard_input


@spread
def chat(
    system: Annotated[str | None, typer.Option(help="System message, before everything else.")] = None,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Talk with a model that has a chat template.

    Ctrl-C stops an answer and keeps it in the conversation; Ctrl-D leaves.
    """
    params = sampling.params()
    if system is not None:
        checked_text(system, "the system message")
    require_standard_input()
    require_output()
    from pearl.cli.loading import loaded
    from pearl.cli.repl import Repl

    terminal = Terminal.open(output.no_color)
    with loaded(engine, terminal) as llm:
        Repl(terminal, llm, params, engine.method, system).run()
