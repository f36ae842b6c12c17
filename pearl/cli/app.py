"""The ``pearl`` command: its subcommands, and how errors leave it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pearl.bench.throughput import throughput
from pearl.cli.chat import chat
from pearl.cli.generate import generate
from pearl.cli.info import DISTRIBUTION, info, installed
from pearl.cli.terminal import Terminal
from pearl.errors import PearlError
from pearl.interrupts import INTERRUPTED

REFUSED = 2


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
    for command in (generate, chat, info):
        app.command()(command)
    app.command("bench")(throughput)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for what we refuse, 130 after Ctrl-C.

    What a user can act on is one line; a traceback means a bug.
    """
    try:
        code = application()(arguments, standalone_mode=False)
    except (PearlError, typer.TyperException) as error:
        Terminal.open().error(error.format_message() if isinstance(error, typer.TyperException) else str(error))
        return REFUSED
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> None:
    """The entry point."""
    sys.exit(run())
