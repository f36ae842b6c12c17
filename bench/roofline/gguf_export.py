"""A Llama checkpoint as GGUF, so that llama.cpp can be measured on the same weights. Needs the package ``gguf``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pearl.errors import ConfigurationError
from pearl.models.gguf.names import TensorNames
from pearl.models.model_config import ModelConfig

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write the model of ``folder`` (one model.safetensors, a byte-level BPE tokenizer.json), matrices in ``dtype``.

    Raises ConfigurationError for what this does not convert: another family, biases, scaled RoPE, sharded weights.
    """
    gguf = importlib.import_module("gguf")
    config = ModelConfig.from_pretrained(str(folder))
    biased = config.qkv_bias or config.output_bias or config.mlp_bias or config.qk_norm != "none"
    if config.architecture != "LlamaForCausalLM" or biased or config.rope["rope_type"] != "default":
        raise ConfigurationError(f"{folder} is not a plain Llama model, which is all that is converted for llama.cpp")
    if not (folder / "model.safetensors").is_file() or not (folder / "tokenizer.json").is_file():
        raise ConfigurationError(f"{folder} has no single model.safetensors with a tokenizer.json to convert")
    writer = gguf.GGUFWriter(str(path), "llama")
    _describe(writer, config)
    _vocabulary(writer, gguf, (folder / "tokenizer.json").read_text("utf-8"), config.vocab_size)
    names = TensorNames()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if config.tied and name == "lm_head.weight":
            continue
        matrix = _rotated_pairs(name, tensor, config)
        kind = _TYPES[dtype] if tensor.dim() == 2 else "F32"
        stored = matrix.to(dtype if tensor.dim() == 2 else torch.float32).contiguous()
        data = (stored.view(torch.uint16) if kind == "BF16" else stored).numpy()
        if kind == "BF16":  # numpy has no such type: its bytes
            data = data.view("uint8")
        writer.add_tensor(names.ours(name), data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_vocab_size(config.vocab_size)


def _vocabulary(writer: Any, gguf: Any, stored: str, size: int) -> None:
    """llama.cpp is given token ids, and needs texts to load; how they are split is in the JSON alone."""
    tokenizer = json.loads(stored)
    texts = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}
    special = {token["id"] for token in tokenizer.get("added_tokens", ())}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kinds.CONTROL if index in special else kinds.NORMAL for index in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_string("tokenizer.huggingface.json", stored)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _rotated_pairs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """llama.cpp rotates lanes 2i and 2i + 1 together where the checkpoint rotates i and i + D/2."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)
