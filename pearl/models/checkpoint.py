"""A model's tensors in its files, checked against its configuration before any of them is read."""

from __future__ import annotations

import warnings
from collections.abc import Container
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models.decoder_tensors import EMBEDDING, HEAD, canonical_name, decoder_tensors, is_decoders
from pearl.models.draft_vocabulary import TARGET_IDS
from pearl.models.model_config import ModelConfig
from pearl.models.model_files import listed
from pearl.models.model_source import ModelSource, StoredValues, source_of
from pearl.models.quantization import refuse_quantized_tensors
from pearl.models.quantized_tensors import QuantizedTensors, quantized_names
from pearl.models.sharding import Span
from pearl.models.stored_forms import own_tensors
from pearl_kernels import QuantizedMatrix

_WEIGHT = ".weight"
_COMPARED = 1 << 22  # numbers of two matrices that are compared at a time


def stored_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """Check a checkpoint by its files' headers; returns ``Checkpoint.config``. Raises as ``Checkpoint`` does.

    folder: or a file, as ``ModelSource.fetch_weights`` gave it.
    """
    with ExitStack() as stack:
        return Checkpoint(folder, config, stack).config


class Checkpoint:
    """The decoder's tensors by their names, whichever file each lies in. Files stay open until ``stack`` closes.

    ``config`` is the model's configuration as its files fulfil it: a head that is to be tied but is stored with other
    numbers than the embedding is a head of its own, as in transformers. These two are compared; nothing else is read.
    A draft with a reduced vocabulary may lack the embedding: it is its target's.
    What transformers fills in the same way every time (biases with 0, norms with 1) may be missing, with a warning.
    Which matrices are quantised is what the files say, within what ``config.quantization`` says.

    Raises ModelLoadError: files or tensors are missing, shapes contradict the configuration, or there are tensors under
    the decoder's layers or head that it does not read. UnsupportedModelError: what is stored is quantised, and the
    configuration does not say how.
    """

    def __init__(self, folder: Path, config: ModelConfig, stack: ExitStack) -> None:
        self._folder = folder
        self._source = source_of(str(folder))
        self._table = decoder_tensors(config)
        quantization = config.quantization
        known = self._table.keys() | quantized_names(quantization, self._table)
        self._stored, others = _open(folder, self._source, known, config, stack)
        own = sorted(name for name in others if is_decoders(name))
        self._quantized: QuantizedTensors | None = None
        if quantization is not None and not quantization.storages:
            self._quantized = QuantizedTensors(folder, quantization, self._stored, self._table)
            quantization = replace(quantization, matrices=self._quantized.matrices, shuffled=self._quantized.shuffled)
        dtypes = {name: slice_.get_dtype() for name, slice_ in self._stored.items() if name != TARGET_IDS}
        refuse_quantized_tensors(folder, dtypes, own, quantization)
        self._require_shapes()
        self.config = self._tie(replace(config, quantization=quantization))
        self._require_all()
        if own:
            raise ModelLoadError(
                f"{folder} holds {self._listed(own)}, of which a {config.architecture} with this "
                f"{self._source.description.removeprefix('its ')} makes no use: its output would be wrong; check the "
                "model's type and the numbers of layers and biases there"
            )

    def read(self, name: str, *spans: Span) -> Tensor:
        """The tensor ``name``; of its leading dimensions only the spans, unpadded."""
        part = tuple(slice(span.begin, span.end) for span in spans)
        if self._quantized is not None and self._is_quantized(name):
            return self._quantized.decoded(name.removesuffix(_WEIGHT))[part or ...]
        if name not in self._stored:
            wanted = self._table[name]
            assert wanted.default is not None  # or the checkpoint would have been refused
            return torch.full(wanted.shape, wanted.default)[part or ...]
        tensor: Tensor = self._stored[name][part or ...]
        return tensor

    def read_quantized(self, name: str) -> QuantizedMatrix:
        """The whole matrix ``name`` as it is stored, of which ``config.quantization`` knows ``few_bits``."""
        stored = self._quantized
        matrix = (
            self._source.quantized(self._stored[name]) if stored is None else stored.read(name.removesuffix(_WEIGHT))
        )
        assert isinstance(matrix, QuantizedMatrix)  # with groups in order
        return matrix

    def _is_quantized(self, name: str) -> bool:
        return self._quantized is not None and name.removesuffix(_WEIGHT) in self._quantized.matrices

    def _require_shapes(self) -> None:
        for name, stored in self._stored.items():
            shape, wanted = tuple(stored.get_shape()), self._table[name].shape
            if shape != wanted:
                raise ModelLoadError(
                    f"{self._folder}: {self._source.spell(name)!r} has shape {shape}, {self._source.description} calls "
                    f"for {wanted}"
                )

    def _tie(self, config: ModelConfig) -> ModelConfig:
        if config.reduced_vocab:
            return replace(config, borrows_embedding=EMBEDDING not in self._stored)
        if not config.tied:
            return config
        if self._is_quantized(HEAD):
            return replace(config, tied=False)
        embedding, head = self._stored.get(EMBEDDING), self._stored.get(HEAD)
        if embedding is not None and head is not None:
            return config if _equal(embedding, head, self._table[HEAD].shape) else replace(config, tied=False)
        either = embedding if embedding is not None else head
        if either is not None:  # one name, or the other, for both
            self._stored.update({EMBEDDING: either, HEAD: either})
        return config

    def _require_all(self) -> None:
        missing = [name for name in self._table if name not in self._stored and not self._is_quantized(name)]
        if self.config.borrows_embedding:
            missing.remove(EMBEDDING)
        if needed := [name for name in missing if self._is_needed(name)]:
            hint = "; its tie_word_embeddings is false" if needed == [HEAD] else ""
            raise ModelLoadError(
                f"{self._folder} has no tensor {self._listed(needed)}, which {self._source.description} calls for{hint}"
            )
        if missing:
            warnings.warn(
                f"{self._folder} has no tensor {self._listed(missing)}; taken as transformers does: biases are 0, "
                "norms 1",
                stacklevel=2,
            )

    def _is_needed(self, name: str) -> bool:
        return self._table[name].default is None or not self._source.may_lack(name)

    def _listed(self, names: list[str]) -> str:
        return listed([self._source.spell(name) for name in names])


def _open(
    folder: Path, source: ModelSource, table: Container[str], config: ModelConfig, stack: ExitStack
) -> tuple[dict[str, StoredValues], list[str]]:
    """The decoder's tensors by its names, and the names of all other tensors. Reads the files' headers."""
    stored: dict[str, StoredValues] = {}
    names_of: dict[str, str] = {}
    others: list[str] = []
    for whole, tensor in source.open(stack):
        for name, values in own_tensors(whole, tensor, config):
            known = canonical_name(name, table)
            if known not in table:
                others.append(name)
            elif names_of.setdefault(known, whole) != whole:
                raise ModelLoadError(f"{folder} holds {names_of[known]!r} and {whole!r}, which are the same tensor")
            else:
                stored[known] = values
    return stored, others


def _equal(one: StoredValues, other: StoredValues, shape: tuple[int, ...]) -> bool:
    """Whether two stored matrices hold the same numbers; a part of each is in memory at a time."""
    rows = max(1, _COMPARED // shape[1])
    for begin in range(0, shape[0], rows):
        a, b = one[begin : begin + rows], other[begin : begin + rows]
        same = torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())
        if not same:
            return False
    return True
