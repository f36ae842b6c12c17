"""EAGLE-3 (arXiv 2503.01840): one decoder layer that reads the target's features and tokens, and drafts.

Row i is of the feature at position i and the token at i + 1; what it gives stands for the target's feature at i + 1,
and tells the token at i + 2. The feature is ``fc`` of the target's hidden states, or, where there are none yet, the
row's before it. Keys and values depend on a row's feature and token alone, as there is one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.heads.config import EagleConfig
from pearl.models import ForwardBatch, KVCache
from pearl.models.draft_vocabulary import spread
from pearl.models.fused_decoder import EmbeddingRows
from pearl_kernels import KernelSet, LinearWeight


@dataclass(frozen=True)
class EagleWeights:
    """Dt: the target's hidden size, of which the head reads T states; D: its own; Vd: ids that it can draft."""

    fc: LinearWeight  # [D, T * Dt]
    token_norm: Tensor  # [D], of the token's embedding
    feature_norm: Tensor  # [D]
    qkv: LinearWeight  # [(Hq + 2 Hk) * head_dim, 2 D]
    qkv_bias: Tensor | None
    output: LinearWeight  # [D, Hq * head_dim]
    output_bias: Tensor | None
    post_norm: Tensor  # [D]
    gate_up: LinearWeight  # [2F, D]
    down: LinearWeight  # [D, F]
    norm: Tensor  # [D]
    head: LinearWeight  # [Vd, D]
    target_ids: Tensor | None  # int64 [Vd], what the head's ids are to the target; None: the same


class EagleHead:
    """Weights and operators; stateless between forwards. Call it in torch.inference_mode."""

    def __init__(
        self,
        config: EagleConfig,
        weights: EagleWeights,
        cos_sin: Tensor,
        kernels: KernelSet,
        embed: Callable[[Tensor], Tensor],
        embeddings: EmbeddingRows | None = None,
    ) -> None:
        """``embed``: int64 ids ``[N]`` of the target to embeddings ``[N, D]``, its own or the target's; ``embeddings``:
        the same ones, where C++ can read them.
        """
        self.config, self.weights, self.kernels, self._embed = config, weights, kernels, embed
        self.embeddings = embeddings
        self.cos_sin = cos_sin  # [max_model_len, head_dim]

    def features(self, states: Tensor) -> Tensor:
        """``[N, D]`` of the target's hidden states ``[N, T, Dt]``."""
        norm = self.weights.norm
        flat = states.to(norm.device, norm.dtype).reshape(states.shape[0], -1)
        features: Tensor = self.kernels.linear(flat, self.weights.fc)
        return features

    def forward(self, batch: ForwardBatch, features: Tensor, cache: KVCache) -> Tensor:
        """Compute all rows of ``features`` ``[N, D]``, write their keys and values; returns what comes out ``[N, D]``.

        ``batch.input_ids``: the tokens behind the features.
        """
        weights, kernels, eps = self.weights, self.kernels, self.config.shape.eps
        tokens = kernels.rms_norm(self._embed(batch.input_ids), weights.token_norm, eps)
        normed = kernels.rms_norm(features, weights.feature_norm, eps)
        residual = (normed if self.config.norm_before_residual else features).clone()
        x = self._attention(torch.cat((tokens, normed), dim=-1), batch, cache)
        x = kernels.add_rms_norm(x, residual, weights.post_norm, eps)
        x = kernels.linear(kernels.silu_and_mul(kernels.linear(x, weights.gate_up)), weights.down)
        outputs: Tensor = residual.add_(x)
        return outputs

    def logits(self, outputs: Tensor) -> Tensor:
        """``[M, V]`` over the target's ids, of rows of ``forward``'s outputs; -inf for ids that it does not draft."""
        weights = self.weights
        normed = self.kernels.rms_norm(outputs, weights.norm, self.config.shape.eps)
        own: Tensor = self.kernels.linear(normed, weights.head)
        return spread(own, weights.target_ids, self.config.shape.vocab_size)

    def _attention(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        shape, weights, kernels = self.config.shape, self.weights, self.kernels
        keys, values = cache.layers[0]
        qkv = kernels.linear(x, weights.qkv, weights.qkv_bias).view(x.shape[0], -1, shape.head_dim)
        q, k, v = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        kernels.rope_and_cache(
            q, k, v, batch.positions, self.cos_sin, keys, values, batch.slot_mapping, None, None, shape.eps
        )
        attended = kernels.verify_attention(
            q, keys, values, batch.block_tables, batch.query_start, batch.context_lens,
            shape.head_dim**-0.5, 0, 0.0, batch.most_rows,
        )  # fmt: skip
        projected: Tensor = kernels.linear(attended.view(x.shape[0], -1), weights.output, weights.output_bias)
        return projected
