"""Model folders whose files already say everything, read without transformers.

Importing transformers' configurations and tokenizers takes longer than all the rest of a small model's run. What
``save_pretrained`` writes for a Llama with a tokenizer.json of its own needs none of it: no default, no older spelling
and no conversion applies. Anything else is left to transformers, and the tests compare the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer as Backend

from pearl.errors import ModelLoadError
from pearl.models.model_files import read_json
from pearl.models.weight_files import CONFIG

# Fields of transformers' LlamaConfig, all of which must be there, with the types that need no conversion.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "head_dim",
)  # fmt: skip
_FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache")
_FLOATS = ("rms_norm_eps", "initializer_range", "attention_dropout")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OTHERS = ("architectures", "dtype", "hidden_act", "model_type", "pretraining_tp", "rope_parameters",
           "transformers_version")  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKENIZER_KEYS = {*_TOKENS, "backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class"}
_MORE_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "tokenizer.model")
_MOST_TOKENS = 100_000  # transformers mends larger vocabularies of some models


class PlainConfig(SimpleNamespace):
    """What transformers' LlamaConfig has, of a file that names all of it."""

    def standardize_rope_params(self) -> None:
        """There is nothing to do: ``rope_parameters`` has its final form."""


def plain_config(path: str) -> PlainConfig | None:
    """The configuration of a local folder; None if only transformers can tell what it means."""
    values = _object(Path(path) / CONFIG)
    if values is None or values.keys() != {*_SIZES, *_FLAGS, *_FLOATS, *_IDS, *_OTHERS}:
        return None
    plain = (
        all(type(values[name]) is int and values[name] > 0 for name in _SIZES)
        and all(type(values[name]) is bool for name in _FLAGS)
        and all(type(values[name]) is float and 0 <= values[name] <= 1 for name in _FLOATS)
        and all(type(values[name]) is int and values[name] >= 0 for name in _IDS)
        and values["model_type"] == "llama"
        and values["architectures"] == ["LlamaForCausalLM"]
        and values["hidden_act"] == "silu"
        and type(values["pretraining_tp"]) is int
        and values["pretraining_tp"] == 1
        and isinstance(values["dtype"], str)
        and values["dtype"] in _DTYPES
        and values["hidden_size"] % values["num_attention_heads"] == 0
        and values["num_attention_heads"] % values["num_key_value_heads"] == 0
        and _is_plain_rope(values["rope_parameters"])
    )
    return PlainConfig(**values | {"dtype": _DTYPES[values["dtype"]]}) if plain else None


def _is_plain_rope(rope: Any) -> bool:
    if not isinstance(rope, Mapping) or rope.keys() != {"rope_type", "rope_theta"}:
        return False
    return rope["rope_type"] == "default" and type(rope["rope_theta"]) is float and rope["rope_theta"] > 0


class PlainTokenizer:
    """What transformers' TokenizersBackend is around a tokenizer.json. The rest of it (chat templates, ...) is
    transformers' own object, loaded when it is asked for."""

    def __init__(self, backend: Backend, named: Mapping[str, str], load_complete: Callable[[], Any]) -> None:
        self._named, self._load_complete = named, load_complete
        self.backend_tokenizer = backend
        self.added_tokens_decoder = backend.get_added_tokens_decoder()
        self.all_special_tokens = list(dict.fromkeys(named.values()))
        self.all_special_ids = [backend.token_to_id(token) for token in self.all_special_tokens]

    @property
    def eos_token_id(self) -> int | None:
        token = self._named.get("eos_token")
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def __len__(self) -> int:
        size: int = self.backend_tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    @functools.cached_property
    def complete(self) -> Any:
        """transformers' tokenizer of the same folder."""
        return self._load_complete()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.complete, name)


def plain_tokenizer(path: str, load_complete: Callable[[], Any]) -> PlainTokenizer | None:
    """The tokenizer of a local folder; None if only transformers can tell how it works.

    ``load_complete`` gives transformers' tokenizer of the folder.
    """
    folder = Path(path)
    settings = _object(folder / "tokenizer_config.json")
    if settings is None or not settings.keys() - {"chat_template"} <= _TOKENIZER_KEYS:
        return None
    if settings.get("tokenizer_class") != "TokenizersBackend" or plain_config(path) is None:
        return None
    if any((folder / name).exists() for name in _MORE_TOKENIZER_FILES):
        return None
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers raises Exception itself
        return None
    named = {name: settings[name] for name in _TOKENS if settings.get(name) is not None}
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if not all(isinstance(token, str) and token in special for token in named.values()):
        return None
    if backend.truncation or backend.padding or backend.post_processor is None:
        return None
    return PlainTokenizer(backend, named, load_complete) if backend.get_vocab_size() <= _MOST_TOKENS else None


def _object(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if it is not there, or anything but an object."""
    try:
        return read_json(file)
    except ModelLoadError:
        return None
