"""What goes to the screen: the two consoles, colours, and text that cannot take over the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

DRAFTED, OWN = Style(color="green"), Style(color="yellow", bold=True)

# Control characters a model may write, as visible symbols; newline and tab stay.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass
class Terminal:
    """Standard output for the text, standard error for everything that is about it.

    ``escaped``: standard output's encoding lacked characters of the text.
    """

    out: Console
    err: Console
    escaped: bool = False

    @classmethod
    def open(cls, no_color: bool = False) -> Terminal:
        """rich honours NO_COLOR, FORCE_COLOR and TERM=dumb; ``no_color`` switches colours off in any case."""
        off = True if no_color else None
        return cls(Console(no_color=off, highlight=False), Console(stderr=True, no_color=off, highlight=False))

    @property
    def interactive(self) -> bool:
        return self.out.is_terminal

    @property
    def colored(self) -> bool:
        return self.out.is_terminal and not self.out.no_color and self.out.color_system is not None

    def write(self, text: str, style: Style | None = None) -> None:
        """Show text at once. A terminal gets control characters as symbols, a file or pipe exactly the text.

        Not through ``Console.print``, which would wrap lines, expand tabs and drop characters.
        """
        if self.interactive:
            text = text.translate(_VISIBLE)
        text = self._encodable(text)
        if style is not None and self.colored:
            text = style.render(text, color_system=ColorSystem.STANDARD)
        self.out.file.write(text)
        self.out.file.flush()

    def _encodable(self, text: str) -> str:
        """With escapes for characters that the output's encoding lacks; said once."""
        encoding = getattr(self.out.file, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            if not self.escaped:
                self.escaped = True
                self.error(
                    f"standard output is {encoding}, which lacks characters of the text: they are written as escapes; "
                    "set PYTHONIOENCODING=utf-8"
                )
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def note(self, text: str, style: str = "dim") -> None:
        """A line about the output, on standard error."""
        with suppress(OSError):  # the output does not depend on what is said about it
            self.err.print(text, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """A spinner while something takes long, on a terminal only."""
        if not self.err.is_terminal:
            yield
            return
        with self.err.status(f"[dim]{doing}[/]", spinner_style="dim"):
            yield

    def legend(self) -> None:
        """What the colours mean, where there are any."""
        if self.colored:
            legend = Text.assemble(("■", DRAFTED), (" drafted  ", "dim"), ("■", OWN), (" target's own", "dim"))
            with suppress(OSError):
                self.err.print(legend, soft_wrap=True)

    def error(self, message: str) -> None:
        """One line on standard error, red where it can be."""
        line = Text.assemble(("error: ", "bold red"), (" ".join(message.split()), "red"))
        with suppress(OSError):
            self.err.print(line, soft_wrap=True)
