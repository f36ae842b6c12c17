"""A whole forward in one C++ call: the CPU's kernels in the order of ``Decoder.forward``, without Python between them.

What Python costs between two operators (5 us and more, and the GIL, for which draft and target compete) is as much as
a small model's arithmetic. The kernels and their order are the same, so the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from pearl.messages import ForwardWork
from pearl.models.causal_model import CausalModel
from pearl.models.decoder import Decoder, LayerWeights, MixtureWeights
from pearl.models.forward_batch import ForwardBatch
from pearl.models.hidden_states import HiddenStates
from pearl.models.kv_cache import KVCache
from pearl.models.mixture import Mixture
from pearl_kernels import LinearWeight

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
    return model.collective is None and all(model.kernels.providers[op] == "cpu" for op in _OPERATORS)


class FusedDecoder:
    """A decoder bound to its KV tensors. Belongs to one worker; ``can_fuse`` must hold for the model.

    The calling thread computes, helped by ``threads - 1`` of the decoder's own, which sleep between forwards.
    """

    def __init__(self, model: Decoder, cache: KVCache, threads: int = 1) -> None:
        from pearl_kernels.checks import DTYPE_CODES
        from pearl_kernels.cpu import _core

        self._model, self._cache = model, cache  # the C++ side holds addresses only
        self._core = _core
        config, weights = model.config, model.weights
        pages, page_size, _, _ = cache.layers[0][0].shape
        self._batch = _core.WorkBatch(page_size)
        shape = _core.Shape(
            DTYPE_CODES[model.dtype], config.hidden, config.heads, config.kv_heads, config.head_dim,
            config.ffn, config.vocab_size, model.max_model_len, pages, page_size, config.residual_eps, config.eps,
            config.attention_scale, config.attention_softcap, config.qk_norm == "projection",
            _ACTIVATIONS[config.activation], config.embedding_factor(model.dtype), config.logits_scale,
            config.logits_softcap, config.residual_multiplier,
        )  # fmt: skip
        parts = zip(weights.layers, model.cos_sin, cache.layers, config.windows, strict=True)
        layers = [_layer(*part, _mixture(config.mixture, part[0].mixture)) for part in parts]
        self._decoder = _core.Decoder(
            shape, layers, _address(weights.embedding), _address(weights.norm),
            _matrix(weights.head, weights.head_bias), threads,
        )  # fmt: skip

    @property
    def native(self) -> _core.Decoder:
        return self._decoder

    def forward(self, batch: ForwardBatch, hidden: HiddenStates | None = None) -> Tensor:
        """As ``Decoder.forward``. Raises ValueError, with nothing written, if an index of the batch is out of range."""
        sequences, table_width = batch.block_tables.shape
        return self._forward(
            self._core.Batch(
                batch.input_ids.shape[0],
                sequences,
                table_width,
                batch.logits_rows.shape[0],
                _address(batch.input_ids),
                _address(batch.positions),
                _address(batch.slot_mapping),
                _address(batch.block_tables),
                _address(batch.query_start),
                _address(batch.context_lens),
                _address(batch.logits_rows),
            ),
            batch.logits_rows.shape[0],
            hidden,
        )

    def forward_work(self, work: Sequence[ForwardWork], hidden: HiddenStates | None = None) -> Tensor:
        """As ``forward``, of the batch that these items make, without a tensor for each of its arrays."""
        return self._forward(self.work_batch(work), sum(item.num_logits for item in work), hidden)

    def work_batch(self, work: Sequence[ForwardWork]) -> _core.WorkBatch:
        """The batch of these items: always the same object, which holds it until the next call."""
        self._batch.set(work)
        return self._batch

    def new_logits(self, rows: int) -> Tensor:
        """Uninitialised, ``[rows, V]``."""
        return self._model.weights.norm.new_empty(rows, self._model.config.vocab_size)

    def _forward(self, batch: _core.AnyBatch, rows: int, hidden: HiddenStates | None) -> Tensor:
        logits = self.new_logits(rows)
        layers, address = ((), 0) if hidden is None else (hidden.layers, _address(hidden.rows))
        self._decoder.forward(batch, logits.data_ptr(), layers, address)
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
        _address(layer.input_norm),
        _matrix(layer.qkv, layer.qkv_bias),
        _address(layer.q_norm),
        _address(layer.k_norm),
        _matrix(layer.output, layer.output_bias),
        _address(layer.attention_post_norm),
        _address(layer.mlp_norm),
        _matrix(layer.gate_up, layer.gate_up_bias),
        _matrix(layer.down, layer.down_bias),
        _address(layer.mlp_post_norm),
        _address(cos_sin),
        _address(keys),
        _address(values),
        window,
        _address(layer.sinks),
        mixture,
    )


def _mixture(shape: Mixture | None, weights: MixtureWeights | None) -> _core.Mixture | None:
    if shape is None or weights is None:
        return None
    from pearl_kernels.cpu import _core
    from pearl_kernels.cpu.experts import native_experts

    return _core.Mixture(
        _matrix(weights.router, weights.router_bias), native_experts(weights.experts),
        _matrix(weights.shared_gate, None), shape.top_k, shape.renormalise,
    )  # fmt: skip


def _matrix(weight: LinearWeight | None, bias: Tensor | None) -> _core.Matrix:
    from pearl_kernels.cpu import _core
    from pearl_kernels.cpu.linear import weight_format

    if weight is None:
        return _core.Matrix(0, 0, 0, 0, 0, 0, 0, 0)

    return _core.Matrix(
        weight_format(weight), weight.in_features, weight.out_features, _address(weight.data), _address(weight.scale),
        _address(weight.offset), weight.group, _address(bias),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()
