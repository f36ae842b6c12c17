"""The ``pearl`` command: its subcommands.

``--help`` and refusals do not wait for torch: a command imports what it works with when it works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from pearl.cli.bench import PASSES_ON, bench
from pearl.cli.chat import chat
from pearl.cli.demo import demo
from pearl.cli.generate import generate
from pearl.cli.info import info, installed
from pearl.cli.plan import plan
from pearl.cli.program import exit_code, run_and_leave
from pearl.cli.serve import serve
from pearl.installed import DISTRIBUTION


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pearl {installed(DISTRIBUTION)}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options of ``pearl`` itself."""


def application() -> typer.Typer:
    """The command line, built anew for each use: it is no module state."""
    app = typer.Typer(
        name="pearl",
        help="Parallel speculative decoding: a draft model makes a large one faster, and never different.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for command in (generate, chat, demo, serve, plan, info):
        app.command()(command)
    app.command(context_settings=PASSES_ON)(bench)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (``pearl.cli.program``)."""
    return exit_code(lambda: application()(arguments, standalone_mode=False))


def main() -> None:
    """The entry point."""
    run_and_leave(lambda: application()(standalone_mode=False))
