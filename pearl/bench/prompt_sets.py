"""Prompts to measure with: a built-in set, the public benchmarks, or any JSONL file."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from pearl.errors import ConfigurationError

BUILT_IN = "builtin"
# Where each public set lives on the hub: (repository, configuration, split). Only read if no local file is found.
HUB_SETS = {
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
    "mgsm": ("juletxara/mgsm", "bn", "test"),
}
_TEXT_KEYS = ("prompt", "question", "turns", "text", "instruction")


def load_prompts(name: str, limit: int | None = None) -> list[str]:
    """``builtin``, a name of HUB_SETS (from ``$PEARL_DATA/NAME.jsonl``, else the hub) or a path to a JSONL file.

    A line is a JSON object whose text is its first key of prompt, question, turns, text, instruction; of a list of
    turns the first is taken. Raises ConfigurationError with the line's number for anything else.
    """
    if name == BUILT_IN:
        text = resources.files("pearl.bench").joinpath("data/prompts.jsonl").read_text("utf-8")
        return _parse(text, "the built-in set")[:limit]
    folder = os.environ.get("PEARL_DATA")
    path = Path(folder) / f"{name}.jsonl" if folder and name in HUB_SETS else Path(name)
    if path.is_file():
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{path} is not UTF-8 text: {error}") from error
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
        return _parse(text, str(path))[:limit]
    if name in HUB_SETS:
        return [_text(row, name) for row in _from_hub(name)][:limit]
    raise ConfigurationError(f"{name!r} is no file and no known data set; known are {BUILT_IN}, {', '.join(HUB_SETS)}")


def _parse(text: str, source: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{source}, line {number} is not JSON: {error}") from error
        prompts.append(_text(row, f"{source}, line {number}"))
    if not prompts:
        raise ConfigurationError(f"{source} holds no prompts")
    return prompts


def _text(row: Any, source: str) -> str:
    key = next((key for key in _TEXT_KEYS if isinstance(row, dict) and row.get(key)), None)
    if key is None:
        raise ConfigurationError(f"{source} has none of the keys {', '.join(_TEXT_KEYS)}")
    value = row[key][0] if isinstance(row[key], list) else row[key]
    if not isinstance(value, str):
        raise ConfigurationError(f"{source}: {key} is {type(value).__name__}, not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigurationError(f"{source}: {key} holds half a surrogate pair, which is no character")
    return value


def _from_hub(name: str) -> Any:
    advice = f"put {name}.jsonl into a folder and set PEARL_DATA to it"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigurationError(f"{advice}, or `pip install datasets` to read the hub") from error
    repository, configuration, split = HUB_SETS[name]
    try:
        return load_dataset(repository, configuration, split=split)
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise ConfigurationError(f"the hub could not provide {repository}: {error}; {advice}") from error
