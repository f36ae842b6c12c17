"""An EAGLE-3 head in C++: its forwards are a decoder's of one layer, which reads a feature beside each token.

The kernels and their order are those of ``EagleHead``, so the results are the same to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from pearl.heads.eagle import EagleHead
from pearl.heads.loader import Head
from pearl.models import KVCache
from pearl.models.fused_decoder import BoundDecoder, address_of, native_matrix, runs_in_one_call

if TYPE_CHECKING:
    from pearl_kernels.cpu import _core


def can_fuse_head(head: Head) -> TypeGuard[EagleHead]:
    """Whether it is one whose operators the C++ provider runs, and whose embeddings it can read."""
    return isinstance(head, EagleHead) and head.embeddings is not None and runs_in_one_call(head.kernels)


class FusedEagle(BoundDecoder):
    """A head bound to its KV tensors, for whole windows in one call. ``can_fuse_head`` must hold for it."""

    def __init__(self, head: EagleHead, cache: KVCache, threads: int = 1, beside: int | None = None) -> None:
        """``threads``, ``beside``: as of a ``FusedDecoder``."""
        from pearl_kernels.checks import DTYPE_CODES
        from pearl_kernels.cpu import _core

        assert head.embeddings is not None
        self._head, self._cache = head, cache  # the C++ side holds addresses only
        config, weights = head.config.shape, head.weights
        pages, page_size, _, _ = cache.layers[0][0].shape
        shape = _core.Shape(
            DTYPE_CODES[weights.norm.dtype], config.hidden, config.heads, config.kv_heads, config.head_dim, config.ffn,
            config.vocab_size, head.cos_sin.shape[0], pages, page_size, config.eps, config.eps, config.head_dim**-0.5,
            0.0, False, 0, head.embeddings.factor, 1.0, 0.0, 1.0,
        )  # fmt: skip
        native = _core.Decoder(
            shape,
            [_layer(head, cache)],
            head.embeddings.native(),
            _core.Head(address_of(weights.norm), native_matrix(weights.head, None), address_of(weights.target_ids)),
            threads,
            beside or threads,
            _core.FeatureInput(
                address_of(weights.token_norm), address_of(weights.feature_norm), head.config.norm_before_residual
            ),
        )
        super().__init__(native, page_size, weights.norm, config.vocab_size)


def _layer(head: EagleHead, cache: KVCache) -> _core.Layer:
    from pearl_kernels.cpu import _core

    weights, (keys, values) = head.weights, cache.layers[0]
    return _core.Layer(
        0,
        native_matrix(weights.qkv, weights.qkv_bias),
        0,
        0,
        native_matrix(weights.output, weights.output_bias),
        0,
        address_of(weights.post_norm),
        native_matrix(weights.gate_up, None),
        native_matrix(weights.down, None),
        0,
        address_of(head.cos_sin),
        address_of(keys),
        address_of(values),
        0,
        0,
        None,
    )
