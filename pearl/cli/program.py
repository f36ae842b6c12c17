"""How a program runs and ends: ``pearl``, and each benchmark."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from pearl.cli.exits import FAILED, REFUSED
from pearl.cli.streams import flush_output, settle
from pearl.cli.terminal import Terminal
from pearl.errors import PearlError, RankError, RoundError
from pearl.interrupts import INTERRUPTED


def exit_code(work: Callable[[], object]) -> int:
    """Run a command line and return its exit code: 0, 2 for what we refuse, 1 where the system failed (a full disk, a
    closed output, a failed forward), 130 after Ctrl-C.

    What a user can act on is one line; a traceback means a bug.
    """
    try:
        code = work()
    except (PearlError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        message = message.replace("Value error, ", "")  # pydantic's word, which typer passes on
        if message:  # `pearl` alone has shown its help instead
            Terminal.open().error(message)
        return FAILED if isinstance(error, (RoundError, RankError)) else REFUSED
    except OSError as error:
        return _failed(error)
    except SystemExit as stop:  # a second Ctrl-C, and typer's own for a reader that has gone
        return stop.code if isinstance(stop.code, int) else FAILED
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def run_and_leave(work: Callable[[], object]) -> NoReturn:
    """The whole of a process: ``work``, and what is still to be written."""
    settle()
    code = exit_code(work)
    try:
        flush_output()
    except OSError as error:
        code = code or _failed(error)
    sys.exit(code)


def _failed(error: OSError) -> int:
    if error.errno == errno.EPIPE:  # whoever read has enough, as `head` has
        return FAILED
    what = error.filename if error.filename is not None else "standard output"
    Terminal.open().error(f"{what}: {error.strerror or error}")
    return FAILED
