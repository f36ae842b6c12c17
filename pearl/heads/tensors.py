"""The tensors in a head's files, by name. Pickled ones are read as plain tensors only: no code of theirs runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.model_files import LFS_ADVICE, find_file, first_line, is_lfs_pointer, listed

_CONSTANTS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


class HeadTensors:
    """Checked against a table of shapes before one is read. Files stay open until ``stack`` closes."""

    def __init__(self, path: str, files: Sequence[str], rename: Callable[[str], str], stack: ExitStack) -> None:
        """``files``: where they may lie, the first that is there. ``rename``: a stored name to the table's."""
        self._stored: dict[str, _Stored] = {}
        found = next(filter(None, (find_file(path, name) for name in files)), None)
        if found is None:
            raise ModelLoadError(f"{path} holds none of {', '.join(files)}: a head's weights are in one of them")
        self._file = found
        for name, stored in _open(found, stack).items():
            if _CONSTANTS.search(name):
                continue
            known = rename(name)
            if known in self._stored:
                raise ModelLoadError(f"{found} holds {known!r} twice, under two names")
            self._stored[known] = stored

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def require(self, table: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]) -> None:
        """ModelLoadError if one is missing, has another shape, or is in neither table."""
        known = {**table, **optional}
        if missing := sorted(table.keys() - self.names):
            raise ModelLoadError(f"{self._file} has no tensor {listed(missing)}, which its config.json calls for")
        if others := sorted(self.names - known.keys()):
            raise ModelLoadError(
                f"{self._file} holds {listed(others)}, of which nothing is known: what it drafts would be wrong"
            )
        for name in sorted(self.names):
            shape, wanted = self._stored[name].shape, known[name]
            if shape != wanted:
                raise ModelLoadError(f"{self._file}: {name!r} has shape {shape}, its config.json calls for {wanted}")

    def read(self, name: str) -> Tensor:
        return self._stored[name].read()

    def weight(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """UnsupportedModelError if it is not stored as plain numbers."""
        tensor = self.read(name)
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"{self._file} is quantised: {name!r} is stored as {tensor.dtype}; take the unquantised head"
            )
        return tensor.to(device, dtype)


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _open(file: Path, stack: ExitStack) -> Mapping[str, _Stored]:
    if is_lfs_pointer(file):
        raise ModelLoadError(f"{file} {LFS_ADVICE}")
    try:
        if file.suffix == ".safetensors":
            opened = stack.enter_context(safe_open(file, framework="pt"))
            return {
                name: _Stored(tuple(opened.get_slice(name).get_shape()), partial(opened.get_tensor, name))
                for name in list(opened.keys())
            }
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ModelLoadError(f"{file} is damaged ({first_line(error)}); download it again") from error
    except UnpicklingError as error:  # torch's own sentence advises to run whatever it holds
        raise ModelLoadError(f"{file} is damaged, or holds more than tensors, which is not read") from error
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise ModelLoadError(f"{file} is no table of tensors by name")
    return {name: _Stored(tuple(tensor.shape), partial(stored.__getitem__, name)) for name, tensor in stored.items()}
