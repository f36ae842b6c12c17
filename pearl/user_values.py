"""Values that users bring, as Python's own: numpy's numbers and whole floats are numbers, generators are lists.

Each ``as_*`` returns None for what it cannot mean; the caller's error says what was wanted.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from numbers import Integral, Real
from typing import Any

_LONGEST_SHOWN = 80
_MOST_ITEMS = 1 << 20


def as_integer(value: object) -> int | None:
    """Integers of any type and whole floats; no bool, no text."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() else None


def as_number(value: object) -> float | None:
    """Real numbers of any type that a float can hold, NaN and infinities among them; no bool, no text."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return None


def as_flag(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    kind = type(value)  # numpy's is no subclass of bool; naming it would import numpy
    return bool(value) if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_") else None


def as_items(value: object) -> list[Any] | None:
    """The items of anything that is several things, but not without end. A generator is read once, arrays give Python's
    numbers.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(value, Iterable):
        return None
    if getattr(value, "ndim", 1) != 1:
        return None
    items = list(islice(value.tolist() if hasattr(value, "tolist") else value, _MOST_ITEMS + 1))
    return items if len(items) <= _MOST_ITEMS else None


def lone_surrogate(text: str) -> int | None:
    """Where the text is no Unicode: half a character, as bytes that are not UTF-8 leave behind."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def shown(value: object) -> str:
    """The value for an error message: short whatever it is."""
    try:
        text = repr(value)
    except Exception:  # of another's class, or of an integer with too many digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def unknown_names(what: str, given: Iterable[object], known: Collection[str]) -> str | None:
    """The sentence about names that are not known, or None if all are."""
    unknown = sorted({str(name) for name in given} - set(known))
    if not unknown:
        return None
    near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
    meant = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
    return f"unknown {what} {unknown}{meant}; known are {sorted(known)}"
