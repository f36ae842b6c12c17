"""GGUF files of small models, written field by field and tensor by tensor, so that tests can change any of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFValueType
from torch import Tensor
from transformers import PreTrainedModel

from pearl.models.gguf.architectures import ARCHITECTURES

F32 = GGUFValueType.FLOAT32
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
# Where a block's fp16 numbers begin, and by what ratios of them its numbers are about 0 in the mean.
_BLOCK_SCALES = {"Q4_K": (0, (1.0, 7.5)), "Q5_K": (0, (1.0, 15.5)), "Q6_K": (208, (1.0,))}


Tensors = dict[str, tuple[np.ndarray[Any, Any], str]]


class GgufFile:
    """``fields``: values, whose types are inferred. ``tensors``: what is written, and its type."""

    def __init__(self, architecture: str, fields: Mapping[str, Any], tensors: Tensors | None = None) -> None:
        self.architecture, self.fields, self.tensors = architecture, dict(fields), tensors or {}

    def write(self, path: Path, endianess: GGUFEndian = GGUFEndian.LITTLE) -> str:
        writer = gguf.GGUFWriter(str(path), self.architecture, endianess=endianess)
        for name, value in self.fields.items():
            writer.add_key_value(name, value, _type_of(value), _type_of(value[0]) if isinstance(value, list) else None)
        for name, (data, kind) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    def changed(self, fields: Mapping[str, Any] | None = None, **tensors: Any) -> GgufFile:
        """With other fields, and tensors; None takes one away."""
        result = copy.copy(self)
        result.fields = {k: v for k, v in {**self.fields, **(fields or {})}.items() if v is not None}
        result.tensors = {k: v for k, v in {**self.tensors, **tensors}.items() if v is not None}
        return result


def _type_of(value: Any) -> GGUFValueType:
    if isinstance(value, np.generic):
        return {np.int32: GGUFValueType.INT32, np.uint16: GGUFValueType.UINT16}[type(value)]
    if isinstance(value, list):
        return GGUFValueType.ARRAY
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    return GGUFValueType[kinds[type(value)]]


def gguf_of(
    model: PreTrainedModel,
    kind: str | Callable[[str], str] = "F32",
    vocabulary: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> tuple[GgufFile, PreTrainedModel]:
    """A model as llama.cpp's converter would write it, and the same model with the numbers that were stored.

    kind: the type of matrices, or of each by its GGUF name; everything else is F32.
    """
    config = model.config
    architecture = architecture or _ARCHITECTURES.get(config.model_type, config.model_type)
    names = ARCHITECTURES[architecture].names
    judge = copy.deepcopy(model)
    file = GgufFile(architecture, {**_shape(config, architecture), **(vocabulary or {}), **(fields or {})})
    if config.rope_parameters.get("rope_type") == "llama3":
        file.tensors["rope_freqs.weight"] = _llama3_factors(config.rope_parameters, config.head_dim), "F32"
    generator = np.random.default_rng(5)
    for name, parameter in judge.named_parameters():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        ours, pairs = names.ours(name), _pairs(name, config) if architecture == "llama" else None
        shift = 1.0 if architecture.startswith("gemma") and "norm" in name else 0.0
        values = (parameter.data if pairs is None else parameter.data[pairs]) + shift
        wanted = "F32" if values.dim() == 1 else kind if isinstance(kind, str) else kind(ours)
        data = encoded(values.numpy(), wanted, generator)
        file.tensors[ours] = data, wanted
        stored = torch.from_numpy(gguf.quants.dequantize(data, GGMLQuantizationType[wanted]).copy())
        parameter.data[slice(None) if pairs is None else pairs] = stored - shift
    return file, judge


def encoded(values: np.ndarray[Any, Any], kind: str, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """In the type's blocks. The package quantises to some types; of others blocks are random, and so are the numbers,
    with about the spread that they had."""
    wanted = GGMLQuantizationType[kind]
    if kind not in _BLOCK_SCALES:
        return gguf.quants.quantize(values, wanted)
    numbers, size = gguf.GGML_QUANT_SIZES[wanted]
    rows, blocks = values.shape[0], values.shape[1] // numbers
    data = generator.integers(0, 256, (rows, blocks, size), np.uint8)
    begin, ratios = _BLOCK_SCALES[kind]
    scales = generator.uniform(0.5, 1.5, (rows, blocks, 1)) * ratios
    probe = gguf.quants.dequantize(_with_scales(data, begin, scales), wanted)
    return _with_scales(data, begin, scales * values.std() / probe.std())


def _with_scales(data: np.ndarray[Any, Any], begin: int, scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    data = data.copy()
    data[..., begin : begin + 2 * scales.shape[-1]] = scales.astype("<f2").view(np.uint8)
    return data.reshape(data.shape[0], -1)


def _pairs(name: str, config: Any) -> Tensor | None:
    """Rows of queries and keys in the order of llama's files: lanes i and i + D/2 are neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
    if not heads:
        return None
    rows = torch.arange(heads * config.head_dim).view(heads, 2, config.head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What the wavelength of each pair of lanes is multiplied by (Llama 3.1's interpolation)."""
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    factors: np.ndarray[Any, Any] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _shape(config: Any, architecture: str) -> dict[str, Any]:
    by_layer, prefix = config.rope_parameters, f"{architecture}."
    rope = by_layer.get("full_attention", by_layer)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    if config.model_type in ("mistral", "gemma2", "gemma3_text") and config.sliding_window:
        fields["attention.sliding_window"] = config.sliding_window
    if "sliding_attention" in by_layer:
        fields["rope.freq_base_swa"] = float(by_layer["sliding_attention"]["rope_theta"])
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            fields[name] = getattr(config, name)
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {prefix + name: value for name, value in fields.items()}


def byte_level_fields(tokenizer: Any, rows: int, pre: str = "gpt-2") -> dict[str, Any]:
    """Of a transformers tokenizer of byte-level BPE, padded to the embedding's rows."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in stored["added_tokens"]}
    texts = {i: text for text, i in stored["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}

    def kind(i: int) -> int:
        return 5 if i not in texts else 1 if i not in added else 3 if added[i]["special"] else 4

    ids = {name: getattr(tokenizer, f"{short}_token_id") for name, short in
           {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}.items()}  # fmt: skip
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(rows)],
        "tokenizer.ggml.token_type": [np.int32(kind(i)) for i in range(rows)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in stored["model"]["merges"]],
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items() if token is not None},
        "tokenizer.ggml.add_bos_token": False,
    }
