"""What competes in a benchmark: methods, as a user names them, each with a fixed window or a pace of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pearl.bench.options import whole_number
from pearl.choices import LONGEST_WINDOW, MethodName, PaceName
from pearl.errors import ConfigurationError
from pearl.user_values import shown

BALANCED = "pearl@balanced"
FORMS = f"NAME, NAME@WINDOW, NAME@FIRST-LAST (windows), pearl@WINDOW+PREPARED (windows), {BALANCED}"


@dataclass(frozen=True)
class Contender:
    """``name``: as it is shown, METHOD or METHOD@WHAT."""

    name: str
    method: MethodName
    window: int | Literal["auto"] = "auto"
    pace: PaceName = "auto"
    prepared: int | Literal["auto"] = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """Of an EngineConfig."""
        return {"method": self.method, "window": self.window, "pace": self.pace, "prepared_windows": self.prepared}


def parse_contenders(text: str, window: int | Literal["auto"] = "auto") -> list[Contender]:
    """Of "autoregressive,pearl,pearl@1-4": five. ``window``: of those that draft and have none of their own.

    Raises ConfigurationError.
    """
    found: list[Contender] = []
    for part in filter(None, map(str.strip, text.split(","))):
        for contender in _contenders(part, window):
            if same := next((other for other in found if other.options == contender.options), None):
                raise ConfigurationError(f"--methods: {contender.name} is there twice, first as {same.name}")
            found.append(contender)
    if not found:
        raise ConfigurationError(f"--methods must name methods, separated by commas, not {shown(text)}")
    return found


def _contenders(part: str, window: int | Literal["auto"]) -> Iterator[Contender]:
    name, at, own = part.partition("@")
    method = next((known for known in get_args(MethodName) if known == name), None)
    if method is None:
        raise ConfigurationError(f"--methods: {shown(name)} is none of {', '.join(get_args(MethodName))}")
    if method == "autoregressive":
        if at:
            raise ConfigurationError(f"--methods: autoregressive drafts nothing and takes no window: {shown(part)}")
        yield Contender(name, method)
    elif not at:
        yield Contender(name, method, window)
    elif part == BALANCED:
        yield Contender(name=part, method=method, pace="balanced")
    else:
        windows, plus, count = own.partition("+") if method == "pearl" else (own, "", "")
        prepared: int | Literal["auto"] = _prepared(part, count) if plus else "auto"
        for number in _windows(part, windows):
            yield Contender(f"{name}@{number}" + (f"+{prepared}" if plus else ""), method, number, prepared=prepared)


def _windows(part: str, text: str) -> range:
    first, dash, last = text.partition("-")
    begin = whole_number(first) or 0
    end = (whole_number(last) or 0) if dash else begin
    if not 1 <= begin <= end <= LONGEST_WINDOW:
        raise ConfigurationError(
            f"--methods: {shown(part)}: behind @ stand a window or FIRST-LAST, from 1 to {LONGEST_WINDOW}, "
            f"or, for pearl, balanced"
        )
    return range(begin, end + 1)


def _prepared(part: str, text: str) -> int:
    number = whole_number(text)
    if number is None or number > LONGEST_WINDOW:
        raise ConfigurationError(
            f"--methods: {shown(part)}: behind + stands how many windows to prepare, from 0 to {LONGEST_WINDOW}"
        )
    return number
