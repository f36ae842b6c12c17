"""The ``pearl`` command: its subcommands, and how errors leave it.

``--help`` and refusals do not wait for torch: a command imports what it works with when it works.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pearl.cli.bench import PASSES_ON, bench
from pearl.cli.chat import chat
from pearl.cli.exits import FAILED, REFUSED
from pearl.cli.generate import generate
from pearl.cli.info import DISTRIBUTION, info, installed
from pearl.cli.streams import flush_output, settle
from pearl.cli.terminal import Terminal
from pearl.errors import PearlError
from pearl.interrupts import INTERRUPTED


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
    app.command(context_settings=PASSES_ON)(bench)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for what we refuse, 1 where the system failed (a full disk,
    a closed output), 130 after Ctrl-C.

    What a user can act on is one line; a traceback means a bug.
    """
    try:
        code = application()(arguments, standalone_mode=False)
    except (PearlError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message:  # `pearl` alone has shown its help instead
            Terminal.open().error(message)
        return REFUSED
    except OSError as error:
        return _failed(error)
    except SystemExit as stop:  # a second Ctrl-C, and typer's own for a reader that has gone
        return stop.code if isinstance(stop.code, int) else FAILED
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _failed(error: OSError) -> int:
    if error.errno == errno.EPIPE:  # whoever read has enough, as `head` has
        return FAILED
    what = error.filename if error.filename is not None else "standard output"
    Terminal.open().error(f"{what}: {error.strerror or error}")
    return FAILED


def main() -> None:
    """The entry point."""
    settle()
    code = run()
    try:
        flush_output()
    except OSError as error:
        code = code or _failed(error)
    sys.exit(code)
