"""A whole forward in one C++ call: the CPU's kernels in the order of ``Decoder.forward``, without Python between them.

What Python costs between two operators (5 us and more, and the GIL, for which draft and target compete) is as much as
a small model's arithmetic. The kernels and their order are the same, so the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from pearl.messages import ForwardWork
from pearl.models.causal_model import CausalModel
from pearl.models.decoder import Decoder, LayerWeights, MixtureWeights
from pearl.models.forward_batch import ForwardBatch
from pearl.models.hidden_states import HiddenStates
from pearl.models.kv_cache import KVCache
from pearl.models.mixture import Mixture
from pearl_kernels import KernelSet, LinearWeight

if TYPE_CHECKING:
    from pearl_kernels.cpu import _core

_OPERATORS = (
    "rms_norm",
    "add_rms_norm",
    "silu_and_mul",
    "gelu_and_mul",
    "scale_and_cap",
    "linear",
    "route",
    "experts",
    "rope_and_cache",
    "verify_attention",
)
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # csrc/include/pearl/params.h


def can_fuse(model: CausalModel) -> TypeGuard[Decoder]:
    """Whether it is our decoder, all of whose operators the C++ provider runs, and no other rank has a part in it."""
    if not isinstance(model, Decoder):
        return False
    return model.collective is None and runs_in_one_call(model.kernels)


def runs_in_one_call(kernels: KernelSet) -> bool:
    """Whether the C++ provider runs all operators of a decoder."""
    return all(kernels.providers[op] == "cpu" for op in _OPERATORS)


@dataclass(frozen=True)
class EmbeddingRows:
    """Where a forward in C++ finds embeddings: in ``table`` ``[V, D]``, or, None, in the rows of ``packed``."""

    table: Tensor | None
    packed: LinearWeight | None = None
    factor: float = 1.0  # that they are multiplied by

    @classmethod
    def of(cls, model: Decoder) -> EmbeddingRows:
        return cls(model.weights.embedding, model.weights.head, model.config.embedding_factor(model.dtype))

    def native(self) -> _core.Embedding:
        from pearl_kernels.cpu import _core

        return _core.Embedding(address_of(self.table), native_matrix(self.packed, None))


class BoundDecoder:
    """A C++ decoder, bound to its weights and KV tensors, with what its batches are made of. Belongs to one worker."""

    def __init__(self, native: _core.Decoder, page_size: int, like: Tensor, vocab_size: int) -> None:
        """Its logits are ``vocab_size`` wide, in the dtype of ``like``."""
        from pearl_kernels.cpu import _core

        self.native, self.vocab_size, self._like = native, vocab_size, like
        self._batch = _core.WorkBatch(page_size)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    def share_cores(self, shared: bool) -> None:
        """Whether it works beside another model from now on."""
        self.native.share_cores(shared)

    def work_batch(self, work: Sequence[ForwardWork]) -> _core.WorkBatch:
        """The batch of these items: always the same object, which holds it until the next call."""
        self._batch.set(work)
        return self._batch

    def new_logits(self, rows: int) -> Tensor:
        """Uninitialised, ``[rows, V]``."""
        return self._like.new_empty(rows, self.vocab_size)


class FusedDecoder(BoundDecoder):
    """A decoder bound to its KV tensors. Belongs to one worker; ``can_fuse`` must hold for the model.

    The calling thread computes, helped by ``threads - 1`` of the decoder's own, which sleep between forwards; while it
    shares cores with another model by ``beside - 1`` (None: as many).
    """

    def __init__(self, model: Decoder, cache: KVCache, threads: int = 1, beside: int | None = None) -> None:
        from pearl_kernels.checks import DTYPE_CODES
        from pearl_kernels.cpu import _core

        self._model, self._cache = model, cache  # the C++ side holds addresses only
        self._core = _core
        config, weights = model.config, model.weights
        pages, page_size, _, _ = cache.layers[0][0].shape
        embedding = EmbeddingRows.of(model)
        shape = _core.Shape(
            DTYPE_CODES[model.dtype], config.hidden, config.heads, config.kv_heads, config.head_dim,
            config.ffn, config.vocab_size, model.max_model_len, pages, page_size, config.residual_eps, config.eps,
            config.attention_scale, config.attention_softcap, config.qk_norm == "projection",
            _ACTIVATIONS[config.activation], embedding.factor, config.logits_scale,
            config.logits_softcap, config.residual_multiplier,
        )  # fmt: skip
        parts = zip(weights.layers, model.cos_sin, cache.layers, config.windows, strict=True)
        layers = [_layer(*part, _mixture(config.mixture, part[0].mixture)) for part in parts]
        matrix = native_matrix(weights.head, weights.head_bias)
        head = _core.Head(address_of(weights.norm), matrix, address_of(weights.draft_ids))
        native = _core.Decoder(shape, layers, embedding.native(), head, threads, beside or threads, None)
        super().__init__(native, page_size, weights.norm, config.vocab_size)

    def forward(self, batch: ForwardBatch, hidden: HiddenStates | None = None) -> Tensor:
        """As ``Decoder.forward``. Raises ValueError, with nothing written, if an index of the batch is out of range."""
        sequences, table_width = batch.block_tables.shape
        return self._forward(
            self._core.Batch(
                batch.input_ids.shape[0],
                sequences,
                table_width,
                batch.logits_rows.shape[0],
                address_of(batch.input_ids),
                address_of(batch.positions),
                address_of(batch.slot_mapping),
                address_of(batch.block_tables),
                address_of(batch.query_start),
                address_of(batch.context_lens),
                address_of(batch.logits_rows),
            ),
            batch.logits_rows.shape[0],
            hidden,
        )

    def forward_work(self, work: Sequence[ForwardWork], hidden: HiddenStates | None = None) -> Tensor:
        """As ``forward``, of the batch that these items make, without a tensor for each of its arrays."""
        return self._forward(self.work_batch(work), sum(item.num_logits for item in work), hidden)

    def _forward(self, batch: _core.AnyBatch, rows: int, hidden: HiddenStates | None) -> Tensor:
        logits = self.new_logits(rows)
        layers, address = ((), 0) if hidden is None else (hidden.layers, address_of(hidden.rows))
        self.native.forward(batch, logits.data_ptr(), layers, address)
        return logits


def _layer(
    layer: LayerWeights,
    cos_sin: Tensor,
    keys_values: tuple[Tensor, Tensor],
    window: int,
    mixture: _core.Mixture | None,
) -> _core.Layer:
    from pearl_kernels.cpu import _core

    keys, values = keys_values
    return _core.Layer(
        address_of(layer.input_norm),
        native_matrix(layer.qkv, layer.qkv_bias),
        address_of(layer.q_norm),
        address_of(layer.k_norm),
        native_matrix(layer.output, layer.output_bias),
        address_of(layer.attention_post_norm),
        address_of(layer.mlp_norm),
        native_matrix(layer.gate_up, layer.gate_up_bias),
        native_matrix(layer.down, layer.down_bias),
        address_of(layer.mlp_post_norm),
        address_of(cos_sin),
        address_of(keys),
        address_of(values),
        window,
        address_of(layer.sinks),
        mixture,
    )


def _mixture(shape: Mixture | None, weights: MixtureWeights | None) -> _core.Mixture | None:
    if shape is None or weights is None:
        return None
    from pearl_kernels.cpu import _core
    from pearl_kernels.cpu.experts import native_experts

    return _core.Mixture(
        native_matrix(weights.router, weights.router_bias), native_experts(weights.experts),
        native_matrix(weights.shared_gate, None), shape.top_k, shape.renormalise,
    )  # fmt: skip


def native_matrix(weight: LinearWeight | None, bias: Tensor | None) -> _core.Matrix:
    from pearl_kernels.cpu import _core
    from pearl_kernels.cpu.linear import weight_format

    if weight is None:
        return _core.Matrix(0, 0, 0, 0, 0, 0, 0, 0)

    return _core.Matrix(
        weight_format(weight), weight.in_features, weight.out_features, address_of(weight.data),
        address_of(weight.scale), address_of(weight.offset), weight.group, address_of(bias),
    )  # fmt: skip


def address_of(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()
