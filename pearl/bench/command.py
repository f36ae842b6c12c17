"""How a benchmark runs as a program."""

from __future__ import annotations

from collections.abc import Callable

import typer

from pearl.cli.program import run_and_leave


def benchmark(function: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command()(function)
    return app


def run_command(function: Callable[..., None]) -> None:
    """With options from the command line; it ends as ``pearl`` does."""
    run_and_leave(lambda: benchmark(function)(standalone_mode=False))
