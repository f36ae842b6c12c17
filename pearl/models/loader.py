"""Weights from safetensors, single or sharded, local or from the hub, straight into the merged matrices."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models.collective import Collective
from pearl.models.decoder import Decoder, DecoderWeights, LayerWeights
from pearl.models.model_config import ModelConfig
from pearl.models.rope import cos_sin_table
from pearl.models.sharding import Sharding, Span, shard
from pearl_kernels import KernelSet, LinearWeight

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_model(
    path: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    kernels: KernelSet,
    sharding: Sharding | None = None,
    collective: Collective | None = None,
) -> Decoder:
    """Load a model from a local folder or a hub id; with ``sharding`` the part of one tensor-parallel rank.

    One matrix, as stored and as packed, is in memory beside the model at any time. A tied head that a provider packs
    is a second copy of the embedding. Raises ModelLoadError (missing files, missing tensors, shapes that contradict
    the configuration) or UnsupportedModelError.
    """
    config = ModelConfig.from_pretrained(str(path))
    with ExitStack() as stack:
        checkpoint = _Checkpoint(_resolve(str(path)), stack)
        sharding = sharding or shard(config, 0, 1)
        weights = _Assembler(config, sharding, checkpoint, dtype, device, kernels).decoder()
    cos_sin = cos_sin_table(config.rope, config.head_dim, config.max_position_embeddings, max_model_len)
    return Decoder(sharding.config, weights, cos_sin.to(device), kernels, collective)


def _resolve(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", _INDEX, "*.json"]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        raise ModelLoadError(f"{path!r} is no folder, and the hub could not provide it: {error}") from error


_Part = tuple[str, int, Span]


class _Checkpoint:
    """Tensors by name, whichever file each lies in. Files stay open until ``stack`` closes."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        index = folder / _INDEX
        if index.is_file():
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        elif (folder / _SINGLE).is_file():
            names = [_SINGLE]
        else:
            raise ModelLoadError(
                f"{folder} holds neither {_SINGLE} nor {_INDEX}; convert its weights to safetensors first"
            )
        self._files = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(f"{folder / name} is missing or damaged: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def read(self, name: str, shape: tuple[int, ...], *spans: Span) -> Tensor:
        """The tensor ``name``, which must have this shape; of its leading dimensions only the spans, unpadded."""
        if name not in self._files:
            raise ModelLoadError(f"{self._folder} has no tensor {name!r}, which its config.json calls for")
        stored = self._files[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ModelLoadError(
                f"{self._folder}: {name!r} has shape {tuple(stored.get_shape())}, its config.json calls for {shape}"
            )
        tensor: Tensor = stored[tuple(slice(span.begin, span.end) for span in spans) or ...]
        return tensor


class _Assembler:
    """Reads one rank's weights. A part: a projection's name, its outputs in all, and the rank's span of them."""

    def __init__(
        self,
        config: ModelConfig,
        sharding: Sharding,
        checkpoint: _Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
    ) -> None:
        self._config, self._sharding, self._checkpoint = config, sharding, checkpoint
        self._dtype, self._device, self._kernels = dtype, device, kernels

    def decoder(self) -> DecoderWeights:
        config, vocab = self._config, self._sharding.vocab
        embedding = self._read("model.embed_tokens.weight", config.vocab_size, config.hidden)
        layers = tuple(self._layer(f"model.layers.{index}.") for index in range(config.layers))
        norm = self._read("model.norm.weight", config.hidden)
        if config.tied and vocab.size == config.vocab_size:
            return DecoderWeights(embedding, layers, norm, self._kernels.pack_linear(embedding))
        head = ("model.embed_tokens" if config.tied else "lm_head", config.vocab_size, vocab)
        return DecoderWeights(embedding, layers, norm, self._columns([head], config.hidden))

    def _layer(self, prefix: str) -> LayerWeights:
        config, sharding = self._config, self._sharding
        d, f, head_dim = config.hidden, config.ffn, config.head_dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        q, kv = config.heads * head_dim, config.kv_heads * head_dim
        q_span, kv_span = sharding.heads.times(head_dim), sharding.kv_heads.times(head_dim)
        projections = [
            (attention + "q_proj", q, q_span),
            (attention + "k_proj", kv, kv_span),
            (attention + "v_proj", kv, kv_span),
        ]
        gates = [(mlp + "gate_proj", f, sharding.ffn), (mlp + "up_proj", f, sharding.ffn)]
        # A bias of an output projection is added once, by the first rank.
        output_bias, down_bias = config.output_bias and sharding.is_first, config.mlp_bias and sharding.is_first
        return LayerWeights(
            input_norm=self._read(prefix + "input_layernorm.weight", d),
            qkv=self._columns(projections, d),
            qkv_bias=self._stack(projections, ".bias") if config.qkv_bias else None,
            q_norm=self._read(attention + "q_norm.weight", head_dim) if config.qk_norm else None,
            k_norm=self._read(attention + "k_norm.weight", head_dim) if config.qk_norm else None,
            output=self._rows(attention + "o_proj", d, q, q_span),
            output_bias=self._read(attention + "o_proj.bias", d) if output_bias else None,
            post_norm=self._read(prefix + "post_attention_layernorm.weight", d),
            gate_up=self._columns(gates, d),
            gate_up_bias=self._stack(gates, ".bias") if config.mlp_bias else None,
            down=self._rows(mlp + "down_proj", d, f, sharding.ffn),
            down_bias=self._read(mlp + "down_proj.bias", d) if down_bias else None,
        )

    def _read(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.read(name, shape).to(self._device, self._dtype)

    def _columns(self, parts: list[_Part], inputs: int) -> LinearWeight:
        """Column-parallel: the rank's outputs of several projections of one input, as one matrix."""
        packed: LinearWeight = self._kernels.pack_linear(self._stack(parts, ".weight", inputs))
        return packed

    def _rows(self, name: str, outputs: int, inputs: int, span: Span) -> LinearWeight:
        """Row-parallel: all outputs, the rank's inputs."""
        matrix = torch.zeros((outputs, span.size), dtype=self._dtype, device=self._device)
        whole = Span(0, outputs, outputs)
        matrix[:, : span.end - span.begin].copy_(
            self._checkpoint.read(name + ".weight", (outputs, inputs), whole, span)
        )
        packed: LinearWeight = self._kernels.pack_linear(matrix)
        return packed

    def _stack(self, parts: list[_Part], suffix: str, *inputs: int) -> Tensor:
        merged = torch.zeros((sum(span.size for _, _, span in parts), *inputs), dtype=self._dtype, device=self._device)
        begin = 0
        for name, outputs, span in parts:
            live = merged[begin : begin + span.end - span.begin]
            live.copy_(self._checkpoint.read(name + suffix, (outputs, *inputs), span))
            begin += span.size
        return merged
