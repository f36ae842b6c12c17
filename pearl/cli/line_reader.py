"""Lines that the user types, with editing and history where there is a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress


class LineReader:
    """``prompt`` is shown on a terminal only. Raises EOFError at the end of input, KeyboardInterrupt on Ctrl-C."""

    def __init__(self, prompt: str, bold: bool = False) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._prompt = prompt
        if not self.interactive:
            return
        with suppress(ImportError):  # not on Windows; there the console edits lines itself
            import readline  # noqa: F401  (importing it is what makes input() editable)

            # \001 and \002 tell readline that what is between takes no room.
            self._prompt = f"\001\033[1m\002{prompt}\001\033[0m\002" if bold else prompt

    def read(self) -> str:
        if self.interactive:
            return input(self._prompt)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.rstrip("\n")
