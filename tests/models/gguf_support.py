"""GGUF files of random models, whole and in parts, beside transformers' classes with the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from families import build
from gguf_files import GgufFile, gguf_of
from transformers import PreTrainedModel

from pearl.models.gguf.parts import part_names


def written(family: str, folder: Path) -> tuple[GgufFile, PreTrainedModel]:
    file, judge = gguf_of(build(family))
    file.write(folder / "model.gguf")
    return file, judge


def in_parts(file: GgufFile, folder: Path, count: int) -> list[Path]:
    paths = [folder / name for name in part_names(f"m-00001-of-{count:05}.gguf")]
    split = {"split.count": np.uint16(count), "split.tensors.count": np.int32(len(file.tensors))}
    names = list(file.tensors)
    for number, path in enumerate(paths):
        part = GgufFile(
            file.architecture, {**(file.fields if number == 0 else {}), "split.no": np.uint16(number), **split}
        )
        part.tensors = {name: file.tensors[name] for name in names[number::count]}
        part.write(path)
    return paths
