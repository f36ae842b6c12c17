"""Where a model's description, tensors and tokenizer come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pearl.models.gguf.source import GgufSource
from pearl.models.model_files import is_gguf
from pearl.models.model_folder import ModelFolder
from pearl.models.quantization import Quantization
from pearl_kernels import QuantizedMatrix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pearl.models.plain_files import PlainConfig


class StoredValues(Protocol):
    """A tensor that is read, whole or in part, when it is indexed."""

    def get_shape(self) -> Sequence[int]: ...

    def get_dtype(self) -> str:
        """safetensors' name of it."""
        ...

    def __getitem__(self, part: slice | tuple[slice, ...] | EllipsisType) -> Tensor: ...


class ModelSource(Protocol):
    """A model under the name that a user gave it. All of it raises ModelLoadError or UnsupportedModelError.

    ``place``: where it lies on this machine, fetched if need be. ``description``: what errors call what says its shape.
    """

    @property
    def place(self) -> Path: ...

    @property
    def description(self) -> str: ...

    def config(self) -> PretrainedConfig | PlainConfig: ...

    def dtype(self) -> torch.dtype:
        """To compute in, where the user asks for none."""
        ...

    def quantization(self) -> Quantization | None:
        """How matrices are quantised, by the description alone; None: they are plain, or decoded as they are read."""
        ...

    def fetch_weights(self) -> Path:
        """``place``, with all weights there; none of them is read."""
        ...

    def naming(self) -> AbstractContextManager[None]:
        """Errors raised inside name the description, and its fields by their names there."""
        ...

    def open(self, stack: ExitStack) -> Iterator[tuple[str, StoredValues]]:
        """All tensors, under transformers' names; their files stay open until ``stack`` closes."""
        ...

    def quantized(self, values: StoredValues) -> QuantizedMatrix | None:
        """A whole matrix that ``open`` gave, where one tensor holds it in few bits; None: it is to be decoded."""
        ...

    def spell(self, name: str) -> str:
        """What the tensor is called where it is stored."""
        ...

    def may_lack(self, name: str) -> bool:
        """Whether a tensor that transformers fills with constants may be missing."""
        ...

    def load_tokenizer(self) -> Any:
        """transformers' tokenizer, or what does for one (``PlainTokenizer``)."""
        ...

    def end_of_text_ids(self, tokenizer: Any) -> frozenset[int]: ...


def source_of(path: str) -> ModelSource:
    """Of a local folder, a hub id, a local GGUF file, or one on the hub (``repository:file.gguf``)."""
    return GgufSource(path) if is_gguf(path) else ModelFolder(path)
