"""A model's files on this machine. From the hub come those that are read: no other formats, variants or subfolders."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from pearl.errors import ModelLoadError
from pearl.models.gguf.parts import part_names
from pearl.models.model_files import first_line
from pearl.models.quantization import HF_QUANT_CONFIG
from pearl.models.weight_files import CONFIG, entries, files_of, no_weights


def fetch_description(path: str) -> Path:
    """The folder with a model's config.json and what stands beside it to explain the weights. ModelLoadError."""
    return Path(path) if Path(path).is_dir() else _fetch(path, [CONFIG, HF_QUANT_CONFIG])


def fetch_weights(path: str) -> Path:
    """The folder with a model's config.json and weights, nothing of which is read yet. ModelLoadError."""
    if Path(path).is_dir():
        return Path(path)
    folder = fetch_description(path)
    revision = folder.name  # the commit: files of one model do not come from two
    for entry in entries(folder):
        _fetch(path, [entry], revision)
        if (folder / entry).is_file():
            _fetch(path, files_of(folder, entry), revision)
            return folder
    raise no_weights(repr(path), _names(path, revision), entries(folder))


def fetch_gguf(path: str) -> Path:
    """The GGUF file, local or ``repository:file.gguf``, or the first of its parts with the others beside it.

    Raises ModelLoadError.
    """
    file = Path(path)
    if file.is_file():
        return file
    repository, colon, name = path.rpartition(":")
    if not colon:
        raise ModelLoadError(f"there is no file {path!r}; of the hub give repository:file.gguf")
    folder, _, last = name.rpartition("/")
    wanted = [f"{folder}/{part}" if folder else part for part in part_names(last)]
    place = _fetch(repository, wanted)
    if missing := [each for each in wanted if not (place / each).is_file()]:
        there = sorted(each for each in _names(repository, place.name) if each.lower().endswith(".gguf"))
        known = f"; its GGUF files are {', '.join(there)}" if there else ""
        raise ModelLoadError(f"{repository!r} holds no {missing[0]}{known}")
    return place / wanted[0]


def _fetch(path: str, names: Sequence[str], revision: str | None = None) -> Path:
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:  # no hub id begins so, or has two
        raise ModelLoadError(f"there is no folder {path!r}: give one with a config.json, a GGUF file, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        # Patterns, of which "*" would match folders too: these match the names themselves.
        return Path(snapshot_download(path, revision=revision, allow_patterns=[escape(name) for name in names]))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise ModelLoadError(
            f"{path!r} is no folder, and the hub could not provide it: give a folder with a config.json, a GGUF file, "
            f"or a hub id that is reachable or cached ({first_line(error)})"
        ) from error


def _names(path: str, revision: str) -> list[str]:
    """What the repository has at its top; nothing if it cannot be asked."""
    from huggingface_hub import list_repo_files

    try:
        return [name for name in list_repo_files(path, revision=revision) if "/" not in name]
    except Exception:  # as above; the caller has something to say without it
        return []
