"""Text that a user gives: on the command line, in a file, on standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from pearl.errors import InvalidRequestError

LONGEST_TEXT = 1 << 26  # characters: more than any context holds, less than any memory
_BYTE_ORDER_MARK = "\ufeff"


def checked_text(text: str, what: str, encoding: str = "utf-8") -> str:
    """``text``, which ``what`` names in the error; ``encoding`` is the one that it was read in.

    Raises InvalidRequestError if it holds bytes that are no character: Python gives them as lone surrogates
    (``surrogateescape``), which no tokenizer takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        wrong = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
        utf8 = encoding.lower() in ("utf-8", "utf8")
        advice = "convert it to UTF-8" if utf8 else "if it is UTF-8, set PYTHONIOENCODING=utf-8"
        raise InvalidRequestError(
            f"{what} is not {encoding.upper()} text: {wrong} after {error.start} characters; {advice}"
        ) from error
    return text


def without_mark(text: str) -> str:
    """The text of a file without the byte order mark that some editors put at its beginning."""
    return text.removeprefix(_BYTE_ORDER_MARK)


def require_standard_input() -> None:
    """Raises InvalidRequestError if it is closed; Python then has none."""
    if sys.stdin is None:
        raise InvalidRequestError("standard input is closed, nothing can be read from it")


def stdin_encoding() -> str:
    return getattr(sys.stdin, "encoding", None) or "utf-8"


def read_text(file: Path | None) -> str:
    """All of a file, which must be UTF-8, or of standard input (None). Raises InvalidRequestError."""
    source, encoding = ("standard input", stdin_encoding()) if file is None else (str(file), "utf-8")
    if file is None:
        require_standard_input()
    try:
        text = _read_bounded(file)
    except (OSError, ValueError) as error:  # ValueError: no text, and paths that no system call takes
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError(f"cannot read the prompt from {source}: {reason}") from error
    if len(text) > LONGEST_TEXT:
        raise InvalidRequestError(f"{source} is longer than the {LONGEST_TEXT} characters that a prompt may have")
    return without_mark(checked_text(text, source, encoding))


def _read_bounded(file: Path | None) -> str:
    """One character more than a prompt may have, of what may have no end."""
    if file is None:
        return sys.stdin.read(LONGEST_TEXT + 1)
    with file.open(encoding="utf-8", errors="surrogateescape") as opened:
        return opened.read(LONGEST_TEXT + 1)
