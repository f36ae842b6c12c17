"""Options that commands share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer

from pearl import ConfigurationError, SamplingParams
from pearl.cli.grouping import spread
from pearl.cli.options import EngineOptions, SamplingOptions, parse_size
from pearl.config import EngineConfig


@dataclass(frozen=True)
class Pair:
    left: Annotated[int, typer.Option(help="L")] = 1
    right: Annotated[int, typer.Option(help="R")] = 2


@spread
def command(name: str, *, pair: Pair) -> tuple[str, Pair]:
    return name, pair


def test_a_group_becomes_options_and_comes_back_as_one() -> None:
    assert list(inspect.signature(command).parameters) == ["name", "left", "right"]
    assert command(name="x", left=3, right=4) == ("x", Pair(3, 4))


def test_defaults_are_the_library_s() -> None:
    assert SamplingOptions().params() == SamplingParams()
    config = EngineConfig()
    assert EngineOptions().keywords() == {field.name: getattr(config, field.name) for field in fields(EngineOptions)}


def test_window_is_a_number_or_auto() -> None:
    assert EngineOptions(window="5").keywords()["window"] == 5
    assert EngineOptions(window="-5").keywords()["window"] == -5  # refused by EngineConfig, by name


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("512M", 512 << 20), ("1.5g", 3 << 29), ("2 GiB", 2 << 30), ("4kb", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1 parsec", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match="a size is"):
        parse_size(text)
