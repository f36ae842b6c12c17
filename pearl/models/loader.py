"""Weights from safetensors, single or sharded, local or from the hub, straight into the merged matrices."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models.decoder import Decoder, DecoderWeights, LayerWeights
from pearl.models.model_config import ModelConfig
from pearl.models.rope import cos_sin_table
from pearl_kernels import KernelSet, LinearWeight

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_model(
    path: str | Path, *, device: torch.device, dtype: torch.dtype, max_model_len: int, kernels: KernelSet
) -> Decoder:
    """Load a model from a local folder or a hub id.

    One matrix, as stored and as packed, is in memory beside the model at any time. A tied head that a provider packs
    is a second copy of the embedding. Raises ModelLoadError (missing files, missing tensors, shapes that contradict
    the configuration) or UnsupportedModelError.
    """
    config = ModelConfig.from_pretrained(str(path))
    with ExitStack() as stack:
        checkpoint = _Checkpoint(_resolve(str(path)), stack)
        weights = _Assembler(config, checkpoint, dtype, device, kernels).decoder()
    cos_sin = cos_sin_table(config.rope, config.head_dim, config.max_position_embeddings, max_model_len)
    return Decoder(config, weights, cos_sin.to(device), kernels)


def _resolve(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        patterns = ["*.safetensors", _INDEX, "*.json"]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise ModelLoadError(f"{path!r} is no folder, and the hub could not provide it: {error}") from error


class _Checkpoint:
    """Tensors by name, whichever file each lies in. Files stay open until ``stack`` closes."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        index = folder / _INDEX
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        elif (folder / _SINGLE).is_file():
            shards = [_SINGLE]
        else:
            raise ModelLoadError(
                f"{folder} holds neither {_SINGLE} nor {_INDEX}; convert its weights to safetensors first"
            )
        self._files = {}
        for shard in shards:
            try:
                file = stack.enter_context(safe_open(folder / shard, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(f"{folder / shard} is missing or damaged: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._files:
            raise ModelLoadError(f"{self._folder} has no tensor {name!r}, which its config.json calls for")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelLoadError(
                f"{self._folder}: {name!r} has shape {tuple(tensor.shape)}, its config.json calls for {shape}"
            )
        return tensor


class _Assembler:
    def __init__(
        self,
        config: ModelConfig,
        checkpoint: _Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
    ) -> None:
        self._config, self._checkpoint, self._dtype, self._device = config, checkpoint, dtype, device
        self._kernels = kernels

    def decoder(self) -> DecoderWeights:
        config = self._config
        embedding = self._read("model.embed_tokens.weight", config.vocab_size, config.hidden)
        layers = tuple(self._layer(f"model.layers.{index}.") for index in range(config.layers))
        norm = self._read("model.norm.weight", config.hidden)
        head = embedding if config.tied else self._read("lm_head.weight", config.vocab_size, config.hidden)
        return DecoderWeights(embedding, layers, norm, self._kernels.pack_linear(head))

    def _layer(self, prefix: str) -> LayerWeights:
        config = self._config
        d, f, head_dim = config.hidden, config.ffn, config.head_dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        q, kv = config.heads * head_dim, config.kv_heads * head_dim
        projections = [(attention + "q_proj", q), (attention + "k_proj", kv), (attention + "v_proj", kv)]
        gates = [(mlp + "gate_proj", f), (mlp + "up_proj", f)]
        return LayerWeights(
            input_norm=self._read(prefix + "input_layernorm.weight", d),
            qkv=self._matrix(projections, d),
            qkv_bias=self._stack(projections, ".bias") if config.qkv_bias else None,
            q_norm=self._read(attention + "q_norm.weight", head_dim) if config.qk_norm else None,
            k_norm=self._read(attention + "k_norm.weight", head_dim) if config.qk_norm else None,
            output=self._matrix([(attention + "o_proj", d)], q),
            output_bias=self._read(attention + "o_proj.bias", d) if config.output_bias else None,
            post_norm=self._read(prefix + "post_attention_layernorm.weight", d),
            gate_up=self._matrix(gates, d),
            gate_up_bias=self._stack(gates, ".bias") if config.mlp_bias else None,
            down=self._matrix([(mlp + "down_proj", d)], f),
            down_bias=self._read(mlp + "down_proj.bias", d) if config.mlp_bias else None,
        )

    def _read(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.read(name, shape).to(self._device, self._dtype)

    def _matrix(self, parts: list[tuple[str, int]], columns: int) -> LinearWeight:
        packed: LinearWeight = self._kernels.pack_linear(self._stack(parts, ".weight", columns))
        return packed

    def _stack(self, parts: list[tuple[str, int]], suffix: str, *columns: int) -> Tensor:
        """Several projections of one input as one matrix (or their biases as one vector)."""
        merged = torch.empty((sum(rows for _, rows in parts), *columns), dtype=self._dtype, device=self._device)
        begin = 0
        for name, rows in parts:
            merged[begin : begin + rows].copy_(self._checkpoint.read(name + suffix, (rows, *columns)))
            begin += rows
        return merged
