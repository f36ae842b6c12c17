"""The three standard streams of a command, as a shell may leave them: closed, full, or of a narrow encoding."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO


def settle() -> None:
    """Once, before anything is read or written: what is no text is found by us, not by Python.

    Bytes on standard input that are no character come through, marked (``pearl.cli.text_input.checked_text`` refuses
    them); characters that standard output's encoding lacks are written as escapes.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def require_output() -> None:
    """Raises OSError if standard output is closed; Python then has none, and text would go nowhere."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")


def flush_output() -> None:
    """Write out what is buffered. Whatever happens, Python finds nothing left to flush when it ends.

    Raises OSError if standard output took not all of it; what standard error is told is not missed.
    """
    require_output()
    failure = None
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            if stream is sys.stdout:
                failure = error
            _discard(stream)
    if failure is not None:
        raise failure


def _discard(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
