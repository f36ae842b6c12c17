"""A folder with config.json and safetensors, or such a repository of the hub, as the source of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from pearl.errors import ModelLoadError
from pearl.models.config_file import naming_config, read_config
from pearl.models.hub import fetch_description, fetch_weights
from pearl.models.model_dtype import checkpoint_dtype
from pearl.models.model_files import LFS_ADVICE, is_lfs_pointer
from pearl.models.quantization import Quantization, read_quantization
from pearl.models.tokenizer_files import end_of_text_ids, load_tokenizer
from pearl.models.weight_files import CONFIG, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pearl.models.plain_files import PlainConfig


class ModelFolder:
    """See ``ModelSource``."""

    description = f"its {CONFIG}"

    def __init__(self, path: str) -> None:
        self._path = path

    @cached_property
    def place(self) -> Path:
        return fetch_description(self._path)

    def config(self) -> PretrainedConfig | PlainConfig:
        return self._described[1]

    def dtype(self) -> torch.dtype:
        return checkpoint_dtype(self._path, self._described[0])

    def quantization(self) -> Quantization | None:
        return read_quantization(self.place)

    def fetch_weights(self) -> Path:
        return fetch_weights(self._path)

    def naming(self) -> AbstractContextManager[None]:
        return naming_config(self._path)

    def open(self, stack: ExitStack) -> Iterator[tuple[str, Any]]:
        for path in weight_files(self.fetch_weights()):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                names = list(file.keys())
            except (OSError, SafetensorError) as error:
                reason = LFS_ADVICE if is_lfs_pointer(path) else f"is missing or damaged ({error}); download it again"
                raise ModelLoadError(f"{path} {reason}") from error
            for name in names:
                yield name, file.get_slice(name)

    def quantized(self, values: Any) -> None:
        """What a folder stores quantised is several tensors (``QuantizedTensors``)."""

    def spell(self, name: str) -> str:
        return name

    def may_lack(self, name: str) -> bool:
        return True

    def load_tokenizer(self) -> Any:
        return load_tokenizer(self._path)

    def end_of_text_ids(self, tokenizer: Any) -> frozenset[int]:
        return end_of_text_ids(self._path, tokenizer)

    @cached_property
    def _described(self) -> tuple[Mapping[str, Any], PretrainedConfig | PlainConfig]:
        return read_config(self._path, self.place)
