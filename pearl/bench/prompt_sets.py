"""Prompts to measure with: a built-in set, the public benchmarks, or any JSONL file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pearl.errors import ConfigurationError

BUILT_IN = "builtin"
# Where each public set lives on the hub: (repository, configurations by category, split). Only read if no local file is
# found.
_ONE: Mapping[str, str | None] = {"": None}
_LANGUAGES: Mapping[str, str | None] = {
    "bengali": "bn", "german": "de", "english": "en", "spanish": "es", "french": "fr", "japanese": "ja",
    "russian": "ru", "swahili": "sw", "telugu": "te", "thai": "th", "chinese": "zh",
}  # fmt: skip
HUB_SETS: Mapping[str, tuple[str, Mapping[str, str | None], str]] = {
    "humaneval": ("openai/openai_humaneval", _ONE, "test"),
    "gsm8k": ("openai/gsm8k", {"": "main"}, "test"),
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", _ONE, "train"),
    "mgsm": ("juletxara/mgsm", _LANGUAGES, "test"),
}
_TEXT_KEYS = ("prompt", "question", "turns", "text", "instruction")


def load_prompts(name: str, limit: int | None = None) -> list[str]:
    """``builtin``, a name of HUB_SETS (from ``$PEARL_DATA/NAME.jsonl``, else the hub) or a path to a JSONL file.

    A line is a JSON object whose text is its first key of prompt, question, turns, text, instruction; of a list of
    turns the first is taken. Raises ConfigurationError with the line's number for anything else.
    """
    if name == BUILT_IN:
        text = resources.files("pearl.bench").joinpath("data/prompts.jsonl").read_text("utf-8")
        rows = _parse(text, "the built-in set")
    else:
        rows = load_rows(name)
    return [_text(row, source) for source, row in rows][:limit]


Rows = list[tuple[str, Any]]  # what a row's errors call it, and the row


def load_rows(name: str, folder: str | None = None) -> Rows:
    """Of a set of HUB_SETS, from ``folder`` (None: ``$PEARL_DATA``) if NAME.jsonl is there, else from the hub; or of a
    JSONL file. ConfigurationError.
    """
    folder = folder or os.environ.get("PEARL_DATA")
    path = Path(folder) / f"{name}.jsonl" if folder and name in HUB_SETS else Path(name)
    if path.is_file():
        return _parse(read_text(path), str(path))
    if name in HUB_SETS:
        return [(name, row) for row in _from_hub(name)]
    raise ConfigurationError(f"{name!r} is no file and no known data set; known are {BUILT_IN}, {', '.join(HUB_SETS)}")


def read_text(path: Path) -> str:
    """Of a UTF-8 file. ConfigurationError."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _parse(text: str, source: str) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"{source}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{source}, line {number} is not JSON: {error}") from error
    if not rows:
        raise ConfigurationError(f"{source} holds no prompts")
    return rows


def _text(row: Any, source: str) -> str:
    key = next((key for key in _TEXT_KEYS if isinstance(row, dict) and row.get(key)), None)
    if key is None:
        raise ConfigurationError(f"{source} has none of the keys {', '.join(_TEXT_KEYS)}")
    return text_of(row[key][0] if isinstance(row[key], list) else row[key], f"{source}: {key}")


def text_of(value: Any, name: str) -> str:
    """ConfigurationError unless it is text of whole characters."""
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} is {type(value).__name__}, not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigurationError(f"{name} holds half a surrogate pair, which is no character")
    return value


def _from_hub(name: str) -> list[Any]:
    advice = f"put {name}.jsonl into a folder and set PEARL_DATA to it"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigurationError(f"{advice}, or `pip install datasets` to read the hub") from error
    repository, configurations, split = HUB_SETS[name]
    try:
        return [
            {**row, "category": category} if category else row
            for category, configuration in configurations.items()
            for row in load_dataset(repository, configuration, split=split)
        ]
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise ConfigurationError(f"the hub could not provide {repository}: {error}; {advice}") from error
