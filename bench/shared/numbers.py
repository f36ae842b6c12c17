"""Lists of numbers in an option."""

from __future__ import annotations

from pearl.bench.options import whole_number
from pearl.errors import ConfigurationError
from pearl.user_values import shown


def positive_numbers(option: str, text: str) -> list[int]:
    """Of "1,8,32", each once. Raises ConfigurationError."""
    numbers = [whole_number(name.strip()) or 0 for name in text.split(",")]
    if not all(numbers):
        raise ConfigurationError(f"{option} takes integers >= 1, separated by commas, not {shown(text)}")
    return list(dict.fromkeys(numbers))
