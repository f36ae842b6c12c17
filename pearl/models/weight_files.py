"""Which files of a folder hold a model's weights: those that transformers would choose. And why none of them do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pearl.errors import ModelLoadError
from pearl.models.model_files import read_json_if_there

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"

_VARIANT = re.compile(
    r"model\.(?P<file>[^.]+?)(?:-\d+-of-\d+)?\.safetensors"  # as in model.fp16-00001-of-00002.safetensors
    r"|model-\d+-of-\d+\.(?P<shard>[^.]+)\.safetensors"
    r"|model\.safetensors\.index\.(?P<index>[^.]+)\.json"
)
_SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
# In the order in which they are looked for: (what a name must match, what to say; {} is the first such name).
_OTHERS = (
    (
        re.compile(r"adapter_model\..*"),
        "it is an adapter ({}), not a model; merge it into its base model with peft's merge_and_unload and save that",
    ),
    (
        re.compile(r"consolidated.*\.(safetensors|pth)"),
        "its {} is in the format of the model's maker, with other names; take the folder that is made for transformers",
    ),
    (
        re.compile(r"(pytorch_)?model.*\.(bin|pt|pth)"),
        "its weights are pickled ({}), which is not read because loading it may run code; convert them once: "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), then copy the tokenizer's files",
    ),
    (
        re.compile(r".*\.gguf"),
        "its weights are GGUF ({}); give that file itself (of the hub: repository:file)",
    ),
    (
        re.compile(r".*\.(h5|msgpack|onnx)"),
        "its weights ({}) belong to another framework; take the model's safetensors",
    ),
    (re.compile(r".*\.safetensors"), f"rename {{}} to {SINGLE} if it holds the whole model"),
)


def entries(folder: Path) -> tuple[str, ...]:
    """Files that may say where the weights are, by precedence: a file with all of them, or the index of its shards."""
    named = read_json_if_there(folder / CONFIG).get("transformers_weights")
    if named is None:
        return SINGLE, INDEX
    if not _is_inside(named) or not named.endswith((".safetensors", _INDEX_SUFFIX)):
        raise ModelLoadError(
            f"{folder / CONFIG}: transformers_weights is {named!r}; it must name a safetensors file of the folder, or "
            "an index of them"
        )
    return (named,)


def files_of(folder: Path, entry: str) -> tuple[str, ...]:
    """The safetensors files that an entry, which must be there, stands for. ModelLoadError if it is no index."""
    if not entry.endswith(_INDEX_SUFFIX):
        return (entry,)
    index = folder / entry
    shards = read_json_if_there(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelLoadError(
            f"{index} has no weight_map that says in which file each tensor lies; download it again, or delete it if "
            f"the weights are in one file, and name that {SINGLE}"
        )
    for tensor, shard in shards.items():
        if not _is_inside(shard) or not shard.endswith(".safetensors"):
            raise ModelLoadError(
                f"{index} gives {shard!r} for {tensor!r}, not the name of a safetensors file of its folder"
            )
    return tuple(sorted(set(shards.values())))


def _is_inside(name: Any) -> bool:
    """Whether it names a file of a model's folder, or of a folder in there."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def weight_files(folder: Path) -> tuple[Path, ...]:
    """All safetensors files of the model in a folder. Raises ModelLoadError, which says what the folder has instead."""
    for entry in entries(folder):
        if (folder / entry).is_file():
            return _present(folder, entry)
    raise no_weights(str(folder), (path.name for path in folder.iterdir()), entries(folder))


def no_weights(place: str, names: Iterable[str], wanted: Sequence[str]) -> ModelLoadError:
    """What to say of a folder or repository that has these files and none of its ``entries``."""
    if SINGLE not in wanted:
        return ModelLoadError(f"{place} holds no {wanted[0]}, which its {CONFIG} names in transformers_weights")
    return ModelLoadError(f"{place} holds no {' and no '.join(wanted)}: {_instead(sorted(names))}")


def _present(folder: Path, entry: str) -> tuple[Path, ...]:
    files = tuple(folder / name for name in files_of(folder, entry))
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(
            f"{folder / entry} names {missing[0]}{more}, of {len(files)} files, missing from the folder; "
            "download what is missing"
        )
    return files


def _instead(names: list[str]) -> str:
    if special := [name for name in (SINGLE, INDEX) if name in names]:
        return f"{special[0]} is there, but is no file, or a link to one that is gone; download it again"
    variants = {name: match for name in names if (match := _VARIANT.fullmatch(name))}
    if shards := [name for name in names if _SHARD.fullmatch(name) and name not in variants]:
        return f"there are shards ({shards[0]}, ...) but not their index; download {INDEX} too"
    for name, match in variants.items():
        variant = next(group for group in match.group("file", "shard", "index") if group)
        return (
            f"only the variant {variant!r} is there ({name}); download the files without {variant!r} in their names, "
            f"or rename it to {SINGLE}, and of shards their index to {INDEX}"
        )
    for pattern, sentence in _OTHERS:
        if found := [name for name in names if pattern.fullmatch(name)]:
            return sentence.format(found[0])
    return "there are no weights; download the model again, weights included"
