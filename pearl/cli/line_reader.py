"""Lines that the user types, with editing and history where there is a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress

from pearl.cli.text_input import checked_text, stdin_encoding, without_mark


class LineReader:
    """``prompt`` is shown on a terminal only."""

    def __init__(self, prompt: str, bold: bool = False) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._prompt, self._at_begin = prompt, True
        if not self.interactive:
            return
        with suppress(ImportError):  # not on Windows; there the console edits lines itself
            import readline  # noqa: F401  (importing it is what makes input() editable)

            # \001 and \002 tell readline that what is between takes no room.
            self._prompt = f"\001\033[1m\002{prompt}\001\033[0m\002" if bold else prompt

    def read(self) -> str:
        """The next line. Raises EOFError at the end of input, KeyboardInterrupt on Ctrl-C, InvalidRequestError for a
        line that is no text; the ones after it can still be read."""
        line = input(self._prompt) if self.interactive else sys.stdin.readline()
        if not line and not self.interactive:
            raise EOFError
        if self._at_begin:
            line, self._at_begin = without_mark(line), False
        return checked_text(line.rstrip("\n"), "the line", stdin_encoding())
