"""What benchmarks' options must be: checked before anything is imported that takes long."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

from pearl.choices import ShapeName
from pearl.errors import ConfigurationError
from pearl.user_values import shown

_MOST_DIGITS = 9


def whole_number(text: str) -> int | None:
    """Of decimal digits, not more of them than a count may have; None if it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


def positive_numbers(option: str, text: str) -> list[int]:
    """Of "1,8,32", each once. Raises ConfigurationError."""
    numbers = [whole_number(name.strip()) or 0 for name in text.split(",")]
    if not all(numbers):
        raise ConfigurationError(f"{option} takes integers >= 1, separated by commas, not {shown(text)}")
    return list(dict.fromkeys(numbers))


def check_output(option: str, path: Path | None) -> None:
    """ConfigurationError unless a file may be written there."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigurationError(f"{option}: the folder {path.parent} does not exist")
    if path is not None and path.is_dir():
        raise ConfigurationError(f"{option}: {path} is a folder; name a file")


def check_picture(option: str, path: Path | None) -> None:
    """Likewise, for one that matplotlib draws."""
    check_output(option, path)
    if path is not None and path.suffix not in (".png", ".svg"):
        raise ConfigurationError(f"{option} draws .png and .svg, not {path.name!r}")
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError(f"{option} needs matplotlib: pip install matplotlib")


def check_rate(rate: float) -> None:
    """ConfigurationError unless it lies in (0, 1]."""
    if not 0 < rate <= 1:
        raise ConfigurationError(f"--synthetic-acceptance must be above 0 and at most 1, not {rate}")


def rate_label(rate: float) -> str:
    """For titles and settings: no reader may take such numbers for measured acceptance."""
    return f"synthetic acceptance {rate:.2f}: real forwards, scripted verdicts"


def parse_shapes(text: str) -> tuple[str, str]:
    """``TARGET:DRAFT``. ConfigurationError unless both are names of ``pearl.bench.shapes.SHAPES``."""
    names, known = text.split(":"), get_args(ShapeName)
    if len(names) != 2 or not set(names) <= set(known):
        raise ConfigurationError(f"--shapes must be TARGET:DRAFT, each one of {', '.join(known)}; not {text!r}")
    return names[0], names[1]
