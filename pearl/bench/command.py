"""How a benchmark runs as a program."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from pearl.errors import PearlError
from pearl.interrupts import INTERRUPTED


def run_command(function: Callable[..., None]) -> None:
    """With options from the command line. An error of ours is a sentence and status 1, Ctrl-C is status 130."""
    try:
        typer.run(function)
    except PearlError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
