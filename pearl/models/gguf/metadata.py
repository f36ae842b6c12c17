"""A GGUF file's metadata, read field by field: each has the type that it must have, or a sentence names it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.gguf.header import Texts
from pearl.user_values import shown

_MAX = 2**31 - 1


class Metadata:
    """``prefix`` stands before the names of the fields asked for, and counts those that never are."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix
        self._asked: set[str] = set()

    def under(self, prefix: str) -> Metadata:
        return Metadata(self._values, prefix)

    def value(self, name: str) -> Any:
        """As it is; None if it is not there."""
        self._asked.add(self._prefix + name)
        return self._values.get(self._prefix + name)

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._or(name, default)
        if type(value) is not int or not least <= value <= _MAX:
            raise self._wrong(name, f"an integer from {least} to {_MAX}", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._or(name, default)
        if type(value) is not float or not math.isfinite(value):
            raise self._wrong(name, "a finite floating-point number", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._or(name, default)
        if type(value) is not bool:
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._or(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return value

    def texts(self, name: str) -> list[str]:
        value = self.value(name)
        if not isinstance(value, Texts):
            raise self._missing(name) if value is None else self._wrong(name, "a list of texts", value)
        try:
            return list(value)
        except UnicodeDecodeError as error:
            raise ModelLoadError(
                f"{self._prefix + name} has a text that is not UTF-8; download the file again"
            ) from error

    def numbers(self, name: str, count: int) -> tuple[float, ...] | None:
        """An array of ``count`` numbers; None if it is not there."""
        value = self.value(name)
        if value is not None and not (isinstance(value, tuple) and len(value) == count):
            raise self._wrong(name, f"a list of {count} numbers", value)
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change nothing."""
        self._asked.update(self._prefix + name for name in names)

    def unread(self) -> Iterator[str]:
        """Names, with the prefix, of what was not asked for."""
        return (name for name in self._values if name.startswith(self._prefix) and name not in self._asked)

    def refuse(self, name: str, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._prefix + name} is {_short(self._values.get(self._prefix + name))}: {why}")

    def _or(self, name: str, default: Any) -> Any:
        value = self.value(name)
        if value is None and default is None:
            raise self._missing(name)
        return default if value is None else value

    def _missing(self, name: str) -> ModelLoadError:
        return ModelLoadError(f"the metadata has no {self._prefix + name}; take a file that is complete")

    def _wrong(self, name: str, wanted: str, value: Any) -> ModelLoadError:
        hint = "; layers that differ are not supported" if isinstance(value, tuple) else ""
        return ModelLoadError(f"{self._prefix + name} must be {wanted}, not {_short(value)}{hint}")


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, tuple | Texts) else shown(value)
