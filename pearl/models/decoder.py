"""One decoder for Llama, Mistral, Qwen2 and Qwen3: the families differ in data (ModelConfig), not in code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.models.collective import Collective
from pearl.models.forward_batch import ForwardBatch
from pearl.models.hidden_states import HiddenStates
from pearl.models.kv_cache import KVCache
from pearl.models.model_config import ModelConfig
from pearl_kernels import KernelSet, LinearWeight


@dataclass(frozen=True)
class LayerWeights:
    """``qkv`` stacks the q, k and v projections, ``gate_up`` gate and up: one matrix product each."""

    input_norm: Tensor  # [D]
    qkv: LinearWeight  # [(Hq + 2 Hk) * head_dim, D]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    output: LinearWeight  # [D, Hq * head_dim]
    output_bias: Tensor | None
    post_norm: Tensor  # [D]
    gate_up: LinearWeight  # [2F, D]
    gate_up_bias: Tensor | None
    down: LinearWeight  # [D, F]
    down_bias: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    embedding: Tensor | None  # [V, D]; None: the rows of the head
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [D]
    head: LinearWeight  # [V, D]
    head_bias: Tensor | None = None  # [V], of a widened vocabulary


class Decoder:
    """Weights and operators; stateless between forwards. Call it in torch.inference_mode."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        cos_sin: Tensor,
        kernels: KernelSet,
        collective: Collective | None = None,
    ) -> None:
        """``collective``: of a tensor-parallel rank, whose weights and ``config`` are a part of the model's."""
        self.config, self.weights, self.kernels, self.collective = config, weights, kernels, collective
        self.cos_sin = cos_sin  # [max_model_len, head_dim]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.norm.dtype

    def forward(self, batch: ForwardBatch, cache: KVCache, hidden: HiddenStates | None = None) -> Tensor:
        """Compute all N tokens, write their keys and values, fill ``hidden``, and return logits ``[M, V]`` of
        batch.logits_rows.
        """
        kernels, eps = self.kernels, self.config.eps
        x = self.embed(batch.input_ids)
        residual: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            if residual is None:
                residual, x = x, kernels.rms_norm(x, layer.input_norm, eps)
            else:
                x = kernels.add_rms_norm(x, residual, layer.input_norm, eps)
            if hidden is not None:
                hidden.keep(index, residual)
            x = self._attention(layer, x, batch, cache.layers[index], self.config.windows[index])
            x = kernels.add_rms_norm(x, residual, layer.post_norm, eps)
            x = kernels.silu_and_mul(kernels.linear(x, layer.gate_up, layer.gate_up_bias))
            x = self._add_up(kernels.linear(x, layer.down, layer.down_bias))
        assert residual is not None  # ModelConfig has at least one layer
        rows, last = batch.logits_rows, len(self.weights.layers)
        whole = False
        if hidden is not None and last in hidden.layers:
            whole = True
            x = kernels.add_rms_norm(x, residual, self.weights.norm, eps)
            hidden.keep(last, x)
        if rows.shape[0] == 0:
            embedding = self.weights.embedding  # of a rank whole, while its head is a part
            return x.new_empty(0, self.config.vocab_size if embedding is None else embedding.shape[0])
        if rows.shape[0] < x.shape[0]:
            x, residual = x[rows], residual[rows]
        normed = x if whole else kernels.add_rms_norm(x, residual, self.weights.norm, eps)
        logits: Tensor = kernels.linear(normed, self.weights.head, self.weights.head_bias)
        return logits if self.collective is None else self.collective.gather_logits(logits)

    def new_hidden(self, rows: int, layers: tuple[int, ...]) -> HiddenStates:
        """Uninitialised, for a forward of so many tokens."""
        return HiddenStates(layers, self.weights.norm.new_empty(rows, len(layers), self.config.hidden))

    def embed(self, ids: Tensor) -> Tensor:
        """``[N, D]`` for int64 ids ``[N]``."""
        embedding = self.weights.embedding
        rows: Tensor = self.kernels.weight_rows(self.weights.head, ids) if embedding is None else embedding[ids]
        return rows

    def _add_up(self, part: Tensor) -> Tensor:
        return part if self.collective is None else self.collective.add_up(part)

    def _attention(
        self, layer: LayerWeights, x: Tensor, batch: ForwardBatch, cache: tuple[Tensor, Tensor], window: int
    ) -> Tensor:
        config, kernels = self.config, self.kernels
        keys, values = cache
        qkv = kernels.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, config.head_dim)
        q, k, v = qkv.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        kernels.rope_and_cache(
            q, k, v, batch.positions, self.cos_sin, keys, values, batch.slot_mapping,
            layer.q_norm, layer.k_norm, config.eps,
        )  # fmt: skip
        attended = kernels.verify_attention(
            q, keys, values, batch.block_tables, batch.query_start, batch.context_lens,
            config.head_dim**-0.5, window, 0.0, batch.most_rows,
        )  # fmt: skip
        return self._add_up(kernels.linear(attended.view(x.shape[0], -1), layer.output, layer.output_bias))
