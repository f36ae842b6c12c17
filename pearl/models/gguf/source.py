"""A GGUF file as the source of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.config_file import made_by_transformers
from pearl.models.gguf.architectures import (
    KEYS,
    ROPE_FACTORS,
    Architecture,
    Fields,
    architecture_of,
    configuration_fields,
)
from pearl.models.gguf.blocks import block_quantization
from pearl.models.gguf.header import StoredTensor
from pearl.models.gguf.metadata import Metadata
from pearl.models.gguf.package import require_decodable
from pearl.models.gguf.parts import read_parts
from pearl.models.gguf.values import PLAIN, TensorValues
from pearl.models.gguf.vocabulary import GgufVocabulary
from pearl.models.hub import fetch_gguf
from pearl.models.quantization import Quantization
from pearl_kernels import QuantizedMatrix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EMBEDDING = "token_embd.weight"
_FIELD = re.compile(rf"(?<![.\w])({'|'.join(KEYS)})\b")


class GgufSource:
    """See ``ModelSource``. The file's header is read when anything of it is asked for."""

    description = "metadata"

    def __init__(self, path: str) -> None:
        self._path = path

    @cached_property
    def place(self) -> Path:
        return fetch_gguf(self._path)

    def config(self) -> PretrainedConfig:
        with self.naming(), made_by_transformers():
            return self._config()

    def dtype(self) -> torch.dtype:
        """The type of the matrices where they have one of torch's, all the same; bfloat16 where any is quantised."""
        kinds = {tensor.kind.name for tensor in self._tensors.values() if len(tensor.shape) > 1}
        return PLAIN.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16

    def quantization(self) -> Quantization | None:
        """Of matrices that are kept in few bits. Others are decoded as they are read, or refused in ``open``."""
        with self.naming():
            theirs = {self._architecture.names.theirs(name): tensor.kind.name for name, tensor in self._tensors.items()}
        return block_quantization(
            {name.removesuffix(".weight"): kind for name, kind in theirs.items() if name is not None}
        )

    def quantized(self, values: Any) -> QuantizedMatrix | None:
        matrix: QuantizedMatrix | None = values.quantized()
        return matrix

    def fetch_weights(self) -> Path:
        return self.place

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors raised inside name the file, and metadata where they name a field of a configuration."""
        try:
            yield
        except (ModelLoadError, UnsupportedModelError) as error:
            text = str(error)
            if not text.startswith(str(self.place)):
                text = f"{self.place}: {_FIELD.sub(lambda field: self._key(field[0]), text)}"
            raise type(error)(text) from error

    def open(self, stack: ExitStack) -> Iterator[tuple[str, TensorValues]]:
        with self.naming():
            config = self._config()
            for name, tensor in self._tensors.items():
                if name == ROPE_FACTORS:
                    continue
                theirs = self._architecture.names.theirs(name)
                if theirs is None:
                    raise ModelLoadError(
                        f"it holds tensor {name!r}, of which a {self._name} makes no use here: its output would be "
                        "wrong; take the model's safetensors"
                    )
                require_decodable(tensor.kind, name)
                yield theirs, self._values(theirs, tensor, config)

    def spell(self, name: str) -> str:
        return self._architecture.names.ours(name)

    def may_lack(self, name: str) -> bool:
        """A bias that no layer has, where the architecture does not call for it."""
        if not self._architecture.optional_biases or not name.endswith(".bias"):
            return False
        end = self.spell(name).split(".", 2)[-1]
        return not any(stored.endswith(f".{end}") for stored in self._tensors)

    def load_tokenizer(self) -> Any:
        with self.naming():
            return self._vocabulary.tokenizer()

    def end_of_text_ids(self, tokenizer: Any) -> frozenset[int]:
        with self.naming():
            return self._vocabulary.end_ids()

    @cached_property
    def _parts(self) -> tuple[Metadata, dict[str, StoredTensor]]:
        metadata, tensors = read_parts(self.place)
        return Metadata(metadata), tensors

    @property
    def _metadata(self) -> Metadata:
        return self._parts[0]

    @property
    def _tensors(self) -> dict[str, StoredTensor]:
        return self._parts[1]

    @property
    def _name(self) -> str:
        return self._metadata.text("general.architecture")

    @property
    def _architecture(self) -> Architecture:
        return architecture_of(self._name)

    @cached_property
    def _vocabulary(self) -> GgufVocabulary:
        own, rows = self._metadata.under("tokenizer."), self._embedding().shape[0]
        return GgufVocabulary(own, rows, self._architecture.merges_by_place)

    def _key(self, field: str) -> str:
        return f"{self._name}.{KEYS[field]}"

    def _config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        fields = configuration_fields(self._name, self._metadata, self._tensors.keys(), self._embedding().shape[0])
        factors = self._rope_factors(fields)
        return AutoConfig.for_model(fields.pop("model_type"), **fields | factors)

    def _embedding(self) -> StoredTensor:
        if _EMBEDDING not in self._tensors:
            raise ModelLoadError(f"it has no tensor {_EMBEDDING!r}; take a file that holds a whole model")
        return self._tensors[_EMBEDDING]

    def _rope_factors(self, fields: Fields) -> Fields:
        """Llama 3's scaling is stored as what each lane's wavelength is multiplied by."""
        stored = self._tensors.get(ROPE_FACTORS)
        if stored is None:
            return {}
        rope, lanes = fields["rope_parameters"], (fields["head_dim"] // 2,)
        if rope.get("rope_type") != "default":
            raise UnsupportedModelError(f"it has {ROPE_FACTORS!r} and {rope.get('rope_type')} scaling of RoPE too")
        if stored.shape != lanes or stored.kind.name not in PLAIN:
            raise ModelLoadError(f"tensor {ROPE_FACTORS!r} must be {lanes} numbers, not {stored.shape}")
        factors = TensorValues(stored)[...].float().tolist()
        if not all(0 < factor < math.inf for factor in factors):
            raise ModelLoadError(f"tensor {ROPE_FACTORS!r} must be {lanes[0]} numbers above 0, not {factors}")
        # factor has no meaning beside attention_factor, but transformers warns where there is none.
        longrope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0,
                    "attention_factor": 1.0,
                    "original_max_position_embeddings": fields["max_position_embeddings"]}  # fmt: skip
        return {"rope_parameters": rope | longrope}

    def _values(self, theirs: str, tensor: StoredTensor, config: PretrainedConfig) -> TensorValues:
        heads = 0
        if self._architecture.rotates_pairs:
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                theirs.split(".")[-2], 0
            )
        return TensorValues(tensor, heads, -self._architecture.norm_shift if "norm" in theirs else 0.0)
