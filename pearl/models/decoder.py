"""One decoder for all supported families, which differ in data (ModelConfig, LayerWeights), not in code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.models.collective import Collective
from pearl.models.draft_vocabulary import spread
from pearl.models.forward_batch import ForwardBatch
from pearl.models.hidden_states import HiddenStates
from pearl.models.kv_cache import KVCache
from pearl.models.model_config import ModelConfig
from pearl_kernels import ExpertWeights, KernelSet, LinearWeight


@dataclass(frozen=True)
class MixtureWeights:
    """What a mixture of experts has beside the feed-forward layer of its model, or in its place."""

    router: LinearWeight  # [E, D]
    experts: ExpertWeights
    router_bias: Tensor | None = None  # [E]
    shared_gate: LinearWeight | None = None  # [1, D], of what all tokens meet


@dataclass(frozen=True)
class LayerWeights:
    """``qkv`` stacks the q, k and v projections, ``gate_up`` gate and up: one matrix product each.

    gate_up and down of a mixture are of the expert that all tokens meet; None: there is none.
    """

    input_norm: Tensor | None  # [D], before the attention; None: it reads the residual as it is
    qkv: LinearWeight  # [(Hq + 2 Hk) * head_dim, D]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim], or [Hq * head_dim]: of all heads of a token together
    k_norm: Tensor | None  # [head_dim] or [Hk * head_dim]
    output: LinearWeight  # [D, Hq * head_dim]
    output_bias: Tensor | None
    mlp_norm: Tensor | None  # [D], before the feed-forward layer
    gate_up: LinearWeight | None = None  # [2F, D]
    gate_up_bias: Tensor | None = None
    down: LinearWeight | None = None  # [D, F]
    down_bias: Tensor | None = None
    attention_post_norm: Tensor | None = None  # [D], of what the attention adds to the residual; None: as it is
    mlp_post_norm: Tensor | None = None
    sinks: Tensor | None = None  # fp32 [Hq], of the attention's softmax
    mixture: MixtureWeights | None = None


@dataclass(frozen=True)
class DecoderWeights:
    embedding: Tensor | None  # [V, D]; None: the rows of the head
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [D]
    head: LinearWeight  # [V, D], or [Vd, D] of a reduced vocabulary
    head_bias: Tensor | None = None  # [V], of a widened vocabulary
    draft_ids: Tensor | None = None  # int64 [Vd], of a reduced one: see draft_vocabulary


class Decoder:
    """Weights and operators; stateless between forwards. Call it in torch.inference_mode."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        cos_sin: Sequence[Tensor],
        kernels: KernelSet,
        collective: Collective | None = None,
    ) -> None:
        """``cos_sin``: a table for each layer, ``[max_model_len, head_dim]`` (``rope_tables``).
        ``collective``: of a tensor-parallel rank, whose weights and ``config`` are a part of the model's.
        """
        self.config, self.weights, self.kernels, self.collective = config, weights, kernels, collective
        self.cos_sin = tuple(cos_sin)
        self._activate = kernels.silu_and_mul if config.activation == "silu" else kernels.gelu_and_mul
        self._embedding_factor = config.embedding_factor(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.norm.dtype

    @property
    def max_model_len(self) -> int:
        return self.cos_sin[0].shape[0]

    def forward(self, batch: ForwardBatch, cache: KVCache, hidden: HiddenStates | None = None) -> Tensor:
        """Compute all N tokens, write their keys and values, fill ``hidden``, and return logits ``[M, V]`` of
        batch.logits_rows.
        """
        residual = self.embed(batch.input_ids)
        x: Tensor | None = None  # what the sublayer before adds to the residual
        for index, layer in enumerate(self.weights.layers):
            entered = self._enter(x, residual, layer.input_norm)
            if hidden is not None:
                hidden.keep(index, self._as_in_transformers(residual))
            x = self._attention(index, entered, batch, cache.layers[index])
            x = self._leave(x, layer.attention_post_norm)
            x = self._feed_forward(layer, self._enter(x, residual, layer.mlp_norm))
            x = self._leave(x, layer.mlp_post_norm)
        assert x is not None  # ModelConfig has at least one layer
        return self._logits(x, residual, batch.logits_rows, hidden)

    def new_hidden(self, rows: int, layers: tuple[int, ...]) -> HiddenStates:
        """Uninitialised, for a forward of so many tokens."""
        return HiddenStates(layers, self.weights.norm.new_empty(rows, len(layers), self.config.hidden))

    def embed(self, ids: Tensor) -> Tensor:
        """``[N, D]`` for int64 ids ``[N]``: the first residual."""
        embedding = self.weights.embedding
        rows: Tensor = self.kernels.weight_rows(self.weights.head, ids) if embedding is None else embedding[ids]
        if self._embedding_factor != 1.0:
            self.kernels.scale_and_cap(rows, self._embedding_factor)
        return rows

    def _as_in_transformers(self, residual: Tensor) -> Tensor:
        """Which does not keep it divided by residual_multiplier."""
        if self.config.residual_multiplier == 1.0:
            return residual
        states = residual.clone()
        self.kernels.scale_and_cap(states, self.config.residual_multiplier)
        return states

    def _enter(self, x: Tensor | None, residual: Tensor, norm: Tensor | None) -> Tensor:
        """residual += x, where there is one; returns what the next sublayer reads: the residual, normed if it is."""
        kernels, eps = self.kernels, self.config.residual_eps
        if norm is None:
            return residual if x is None else residual.add_(x)
        entered: Tensor = (
            kernels.rms_norm(residual, norm, eps) if x is None else kernels.add_rms_norm(x, residual, norm, eps)
        )
        return entered

    def _leave(self, x: Tensor, norm: Tensor | None) -> Tensor:
        """What a sublayer adds to the residual."""
        left: Tensor = x if norm is None else self.kernels.rms_norm(x, norm, self.config.eps)
        return left

    def _feed_forward(self, layer: LayerWeights, x: Tensor) -> Tensor:
        return self._add_up(self._dense(layer, x) if layer.mixture is None else self._mix(layer, layer.mixture, x))

    def _dense(self, layer: LayerWeights, x: Tensor) -> Tensor:
        kernels = self.kernels
        x = self._activate(kernels.linear(x, layer.gate_up, layer.gate_up_bias))
        out: Tensor = kernels.linear(x, layer.down, layer.down_bias)
        return out

    def _mix(self, layer: LayerWeights, weights: MixtureWeights, x: Tensor) -> Tensor:
        kernels, mixture = self.kernels, self.config.mixture
        assert mixture is not None
        logits = kernels.linear(x, weights.router, weights.router_bias)
        routing = kernels.route(logits, mixture.top_k, mixture.renormalise)
        shared, gate = None, None
        if weights.shared_gate is not None:
            shared, gate = self._dense(layer, x), kernels.linear(x, weights.shared_gate)
        out: Tensor = kernels.experts(x, routing, weights.experts, shared, gate)
        return out

    def _logits(self, x: Tensor, residual: Tensor, rows: Tensor, hidden: HiddenStates | None) -> Tensor:
        """``[M, V]`` of rows M; x is what the last sublayer adds to the residual."""
        kernels, last = self.kernels, len(self.weights.layers)
        whole = hidden is not None and last in hidden.layers
        if hidden is not None and whole:
            x = self._enter(x, residual, self.weights.norm)
            hidden.keep(last, x)
        if rows.shape[0] == 0:
            embedding = self.weights.embedding  # of a rank whole, while its head is a part
            return x.new_empty(0, self.config.vocab_size if embedding is None else embedding.shape[0])
        if rows.shape[0] < x.shape[0]:
            x, residual = x[rows], residual[rows]
        normed = x if whole else self._enter(x, residual, self.weights.norm)
        logits: Tensor = kernels.linear(normed, self.weights.head, self.weights.head_bias)
        if self.config.logits_scale != 1.0 or self.config.logits_softcap > 0:
            kernels.scale_and_cap(logits, self.config.logits_scale, self.config.logits_softcap)
        logits = spread(logits, self.weights.draft_ids, self.config.vocab_size)
        return logits if self.collective is None else self.collective.gather_logits(logits)

    def _add_up(self, part: Tensor) -> Tensor:
        return part if self.collective is None else self.collective.add_up(part)

    def _attention(self, index: int, x: Tensor, batch: ForwardBatch, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Of layer ``index``."""
        config, kernels, layer = self.config, self.kernels, self.weights.layers[index]
        keys, values = cache
        qkv = kernels.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, config.head_dim)
        q, k, v = qkv.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        norms = (layer.q_norm, layer.k_norm)
        if config.qk_norm == "projection":
            q = kernels.rms_norm(q.flatten(1), layer.q_norm, config.eps).view(q.shape)
            k = kernels.rms_norm(k.flatten(1), layer.k_norm, config.eps).view(k.shape)
            norms = (None, None)
        kernels.rope_and_cache(
            q, k, v, batch.positions, self.cos_sin[index], keys, values, batch.slot_mapping, *norms, config.eps
        )
        attended = kernels.verify_attention(
            q, keys, values, batch.block_tables, batch.query_start, batch.context_lens,
            config.attention_scale, config.windows[index], config.attention_softcap, batch.most_rows, layer.sinks,
        )  # fmt: skip
        return self._add_up(kernels.linear(attended.view(x.shape[0], -1), layer.output, layer.output_bias))
