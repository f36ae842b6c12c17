"""Loads a model's tokenizer with transformers, and says what is missing or damaged where it cannot be loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pearl.errors import ModelLoadError
from pearl.models.model_files import LFS_ADVICE, find_file, first_line, is_lfs_pointer, read_json
from pearl.models.plain_files import plain_tokenizer
from pearl.models.weight_files import CONFIG

_SETTINGS = (CONFIG, "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
_ADVICE = "give a folder with a tokenizer.json"
_EXTRA = "pip install 'pearl-engine[sentencepiece]'"


def load_tokenizer(path: str) -> Any:
    """transformers' tokenizer of a local folder or a hub id. No code of the folder is run. Raises ModelLoadError."""
    plain = plain_tokenizer(path, lambda: _load_with_transformers(path))
    return _load_with_transformers(path) if plain is None else plain


def _load_with_transformers(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=_config(path), trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub client raise many kinds
        raise ModelLoadError(f"no tokenizer could be loaded from {path!r}: {_explain(path, error)}") from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # special tokens without a vocabulary
        raise ModelLoadError(f"no tokenizer could be loaded from {path!r}: {_no_vocabulary()}")
    return tokenizer


def end_of_text_ids(path: str, tokenizer: Any) -> frozenset[int]:
    """All ids that end a text: the tokenizer's, and what config.json and generation_config.json say.

    What transformers' configuration class has by default counts only where it does for transformers: where config.json
    names none and there is no generation_config.json. Raises ModelLoadError for ids that are no integers.
    """
    found = _ids(tokenizer.eos_token_id, "the tokenizer")
    config, generation = (find_file(path, name) for name in (CONFIG, "generation_config.json"))
    named = False
    for file in (config, generation):
        if file is not None and "eos_token_id" in (fields := read_json(file)):
            found |= _ids(fields["eos_token_id"], str(file))
            named = True
    if config is not None and generation is None and not named:
        default = _config(str(config.parent))
        found |= _ids(getattr(default, "eos_token_id", None), str(config))
    return found


def _config(path: str) -> Any:
    """What AutoTokenizer would read itself, but without a word about its dtype; None where it would do without."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, dtype=torch.float32)
    except (OSError, ValueError):
        return None


def _ids(value: Any, source: str) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ModelLoadError(f"{source}: eos_token_id must be an integer or a list of integers, not {value!r}")
    return frozenset(each for each in ids if each >= 0)  # a negative one stands for none


def _explain(path: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"it is Python code in the model's folder, and this engine never runs code from there; {_ADVICE}"
    for name in _SETTINGS:
        if (file := find_file(path, name, cached_only=True)) is not None:
            try:
                read_json(file)
            except ModelLoadError as damage:
                return str(damage)
    for name in _VOCABULARIES:
        if (file := find_file(path, name, cached_only=True)) is not None:
            return _explain_file(file, error)
    return _no_vocabulary() if Path(path).is_dir() else first_line(error)


def _no_vocabulary() -> str:
    return f"it has none of {', '.join(_VOCABULARIES[:-1])}, or vocab.json with merges.txt; {_ADVICE}"


def _explain_file(file: Path, error: Exception) -> str:
    if file.suffix == ".json":
        try:
            read_json(file)
        except ModelLoadError as damage:
            return str(damage)
        return f"{file} does not hold a tokenizer that transformers can read ({_cause(error)}); {_ADVICE}"
    try:
        content = file.read_bytes()
    except OSError as failure:
        return f"{file} cannot be read: {failure.strerror}"
    if is_lfs_pointer(file):
        return f"{file} {LFS_ADVICE}"
    form, packages = ("sentencepiece", ["sentencepiece", "google.protobuf"])
    if _TIKTOKEN_LINE.match(content):
        form, packages = "tiktoken", ["tiktoken"]
    if lacking := _lacking(packages):
        return (
            f"{file} is in {form}'s form, which needs {' and '.join(lacking)}: {_EXTRA}; or {_ADVICE}, "
            "which AutoTokenizer.from_pretrained(..).save_pretrained(..) writes where they are installed"
        )
    return f"{file} is damaged, or in no form that transformers can read ({_cause(error)}); {_ADVICE}"


def _lacking(packages: Sequence[str]) -> list[str]:
    """Names, as PyPI has them, of the packages that are not installed."""
    lacking = []
    for package in packages:
        try:
            there = find_spec(package) is not None
        except ModuleNotFoundError:  # not even the package around it
            there = False
        if not there:
            lacking.append(package.removeprefix("google."))
    return lacking


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
