"""Weights from a checkpoint straight into the merged matrices of a decoder, or of one rank's part of it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models.checkpoint import Checkpoint
from pearl.models.collective import Collective
from pearl.models.decoder import Decoder, DecoderWeights, LayerWeights, MixtureWeights
from pearl.models.decoder_tensors import EMBEDDING, HEAD, LAYER_NORMS, NORM, layer_prefix
from pearl.models.draft_vocabulary import TARGET_IDS, checked_ids
from pearl.models.kept_matrices import kept_matrices
from pearl.models.mixture import Mixture
from pearl.models.model_config import ModelConfig
from pearl.models.model_source import source_of
from pearl.models.quantization import Quantization
from pearl.models.rope_tables import lane_order, rope_tables
from pearl.models.sharding import Sharding, Span, shard
from pearl.models.weight_memory import WeightMemory
from pearl.models.widening import bias_of_missing, widen, widen_embedding
from pearl_kernels import ExpertWeights, KernelSet, LinearWeight
from pearl_kernels.reference import stack_outputs, take_outputs

_LOG = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    kernels: KernelSet,
    vocab_size: int = 0,
    lender: str | Path | None = None,
    sharding: Sharding | None = None,
    collective: Collective | None = None,
) -> Decoder:
    """Load a model as ``source_of`` takes it; with ``sharding`` the part of one tensor-parallel rank.

    ``vocab_size``: ids that a whole model must take; those that it lacks are never its own choice (``widening``).
    ``lender``: the target of a draft that has no embeddings of its own, whose are taken.
    One matrix, as stored and as packed, is in memory beside the model at any time. Raises ModelLoadError or
    UnsupportedModelError, as ``Checkpoint`` does, before any weight is read.
    """
    source = source_of(str(path))
    config = ModelConfig.from_pretrained(str(source.place), dtype)
    with ExitStack() as stack:
        checkpoint = Checkpoint(source.fetch_weights(), config, stack)
        if config.quantization is not None and (sharding is None or sharding.is_first):
            _tell(str(path), config.quantization)
        sharding = sharding or widen(shard(config, 0, 1), vocab_size)
        lent = _open_lender(lender, stack) if checkpoint.config.borrows_embedding else checkpoint
        weights = _Assembler(checkpoint, lent, sharding, dtype, device, kernels).decoder()
    return Decoder(sharding.config, weights, rope_tables(config, max_model_len, device), kernels, collective)


def _open_lender(path: str | Path | None, stack: ExitStack) -> Checkpoint:
    if path is None:
        raise ModelLoadError(f"it has no tensor {EMBEDDING!r}: it is a draft, for the target that it was trained for")
    source = source_of(str(path))
    return Checkpoint(source.fetch_weights(), ModelConfig.from_pretrained(str(source.place)), stack)


def _tell(path: str, quantization: Quantization) -> None:
    """What is computed otherwise than the quantiser meant."""
    for note in quantization.method.notes:
        _LOG.warning("%s is quantised with %s: %s", path, quantization.method.name, note)


_Part = tuple[str, Span]


class _Assembler:
    """Reads one rank's weights. A part: a projection's name, and the rank's span of its outputs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        lender: Checkpoint,
        sharding: Sharding,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
    ) -> None:
        """``lender``: which has the embeddings, mostly the checkpoint itself."""
        self._checkpoint, self._lender, self._sharding = checkpoint, lender, sharding
        self._dtype, self._device, self._kernels = dtype, device, kernels
        self._memory = WeightMemory(device)
        self._kept = kept_matrices(checkpoint.config, kernels.providers["pack_quantized"], sharding.ranks)
        self._rows_by_lanes = self._turned(lane_order(checkpoint.config))

    def decoder(self) -> DecoderWeights:
        config, vocab = self._checkpoint.config, self._sharding.vocab
        ids = self._draft_ids() if config.reduced_vocab else None
        embedding, head = self._ends() if ids is None else self._reduced_ends(ids)
        layers = tuple(map(self._layer, range(config.layers)))
        norm = self._norm(NORM)
        bias = bias_of_missing(config.vocab_size, vocab.size, norm)
        return DecoderWeights(embedding, layers, norm, head, bias, None if ids is None else ids.to(self._device))

    def _ends(self) -> tuple[Tensor | None, LinearWeight]:
        """Embedding and head; the head alone where its rows are the embeddings."""
        config, vocab = self._checkpoint.config, self._sharding.vocab
        embedding = widen_embedding(self._stored(EMBEDDING), vocab.size)
        if config.tied and vocab.size >= config.vocab_size:
            head = self._memory.keep_matrix(self._kernels.pack_linear(embedding))
            return (None if head.scale is None else self._memory.keep(embedding)), head
        name = (EMBEDDING if config.tied else HEAD).removesuffix(".weight")
        return self._memory.keep(embedding), self._columns([(name, vocab)], config.hidden)

    def _draft_ids(self) -> Tensor:
        return checked_ids(TARGET_IDS, self._checkpoint.read(TARGET_IDS), self._checkpoint.config.vocab_size)

    def _reduced_ends(self, ids: Tensor) -> tuple[Tensor, LinearWeight]:
        """The embedding, and a head of the rows that can be drafted."""
        embedding = self._lender.read(EMBEDDING).to(self._device, self._dtype)
        rows = embedding[ids.to(self._device)] if self._checkpoint.config.tied else self._stored(HEAD)
        return self._memory.keep(embedding), self._memory.keep_matrix(self._kernels.pack_linear(rows))

    def _layer(self, index: int) -> LayerWeights:
        config, sharding, prefix = self._checkpoint.config, self._sharding, layer_prefix(index)
        attention, norms, mixture = prefix + "self_attn.", LAYER_NORMS[config.norms], config.mixture_of(index)
        projections, q_span = self._attention_inputs(attention), sharding.heads.times(config.head_dim)
        has_bias = config.output_bias and sharding.is_first  # is added once, by the first rank
        layer = LayerWeights(
            input_norm=self._layer_norm(prefix, norms.input),
            qkv=self._columns(projections, config.hidden, self._rows_by_lanes),
            qkv_bias=self._stack(projections, ".bias", rows=self._rows_by_lanes) if config.qkv_bias else None,
            q_norm=self._norm(attention + "q_norm.weight") if config.qk_norm != "none" else None,
            k_norm=self._norm(attention + "k_norm.weight") if config.qk_norm != "none" else None,
            output=self._rows(attention + "o_proj", config.hidden, q_span),
            output_bias=self._read(attention + "o_proj.bias") if has_bias else None,
            sinks=self._sinks(attention) if config.sinks else None,
            attention_post_norm=self._layer_norm(prefix, norms.attention_post),
            mlp_norm=self._layer_norm(prefix, norms.mlp),
            mlp_post_norm=self._layer_norm(prefix, norms.mlp_post),
        )
        return self._with_mlp(layer, prefix + "mlp.") if mixture is None else self._mix(layer, prefix + "mlp.", mixture)

    def _with_mlp(self, layer: LayerWeights, mlp: str) -> LayerWeights:
        config, gates = self._checkpoint.config, self._gates(mlp)
        return replace(
            layer,
            gate_up=self._columns(gates, config.hidden),
            gate_up_bias=self._stack(gates, ".bias") if config.mlp_bias else None,
            down=self._rows(mlp + "down_proj", config.hidden, self._sharding.ffn),
            down_bias=self._read(mlp + "down_proj.bias") if config.mlp_bias and self._sharding.is_first else None,
        )

    def _mix(self, layer: LayerWeights, mlp: str, mixture: Mixture) -> LayerWeights:
        """Routers stay as they are stored, whatever the format of other matrices: a choice has no small errors."""
        names = [f"{mlp}experts.{expert}" for expert in range(mixture.experts)]
        gate_ups = (self._expert_gates(name, mixture.hidden) for name in names)
        downs = (self._expert_down(name, mixture.hidden) for name in names)
        keep, stack = self._memory.keep_matrix, self._memory.keep_stack
        gate_up_bias, down_bias = self._expert_biases(names, mixture) if mixture.biases else (None, None)
        gate_up, down = stack(gate_ups, mixture.experts), stack(downs, mixture.experts)
        experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias, mixture.unit)
        shared, router = mlp + "shared_expert", mlp + "gate"
        router_bias = self._read(router + ".bias") if mixture.biases else None
        if not mixture.shared:
            return replace(layer, mixture=MixtureWeights(self._router(router), experts, router_bias))
        return replace(
            layer,
            gate_up=keep(self._expert_gates(shared, mixture.shared)),
            down=keep(self._expert_down(shared, mixture.shared)),
            mixture=MixtureWeights(
                self._router(router), experts, router_bias, self._router(mlp + "shared_expert_gate")
            ),
        )

    def _expert_gates(self, expert: str, width: int) -> LinearWeight:
        return self._outputs(self._expert_parts(expert, width), self._checkpoint.config.hidden)

    def _expert_parts(self, expert: str, width: int) -> list[_Part]:
        return [(f"{expert}.{name}", Span(0, width, width)) for name in ("gate_proj", "up_proj")]

    def _expert_down(self, expert: str, width: int) -> LinearWeight:
        return self._inputs(f"{expert}.down_proj", self._checkpoint.config.hidden, Span(0, width, width))

    def _expert_biases(self, names: list[str], mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Of gates and ups ``[E, 2F]``, and of what an expert puts out ``[E, D]``."""
        gate_ups = [self._stack(self._expert_parts(name, mixture.hidden), ".bias") for name in names]
        downs = [self._stored(f"{name}.down_proj.bias") for name in names]
        return self._memory.keep(torch.stack(gate_ups)), self._memory.keep(torch.stack(downs))

    def _router(self, name: str) -> LinearWeight:
        return self._memory.keep_matrix(self._kernels.pack_linear(self._stored(name + ".weight"), weights="full"))

    def _attention_inputs(self, attention: str) -> list[_Part]:
        """The rank's queries, keys and values."""
        config = self._checkpoint.config
        q, kv = (heads.times(config.head_dim) for heads in (self._sharding.heads, self._sharding.kv_heads))
        if not config.merged_projections:
            return [(attention + "q_proj", q), (attention + "k_proj", kv), (attention + "v_proj", kv)]
        if self._sharding.ranks == 1:
            return [(attention + "qkv_proj", Span(0, q.size + 2 * kv.size, q.size + 2 * kv.size))]
        keys, values = config.heads * config.head_dim, (config.heads + config.kv_heads) * config.head_dim
        return [(attention + "qkv_proj", span) for span in (q, kv.after(keys), kv.after(values))]

    def _gates(self, mlp: str) -> list[_Part]:
        config, span = self._checkpoint.config, self._sharding.ffn
        if not config.merged_projections:
            return [(mlp + "gate_proj", span), (mlp + "up_proj", span)]
        if self._sharding.ranks == 1:
            return [(mlp + "gate_up_proj", Span(0, 2 * config.ffn, 2 * config.ffn))]
        return [(mlp + "gate_up_proj", span), (mlp + "gate_up_proj", span.after(config.ffn))]

    def _turned(self, lanes: Tensor | None) -> Tensor | None:
        """Which stored output each of the merged queries, keys and values is, int64 ``[(Hq + 2 Hk) * D]``: queries' and
        keys' heads have their lanes in the order in which they are rotated. None: all as they are stored.
        """
        if lanes is None:
            return None
        queries, keys = self._sharding.heads.size, self._sharding.kv_heads.size
        rows = torch.arange((queries + 2 * keys) * len(lanes)).view(-1, len(lanes))
        rows[: queries + keys] = rows[: queries + keys, lanes]
        return rows.flatten()

    def _sinks(self, attention: str) -> Tensor:
        """fp32, of numbers of the model's dtype."""
        return self._memory.keep(self._stack([(attention + "sinks", self._sharding.heads)], "").float())

    def _layer_norm(self, prefix: str, name: str | None) -> Tensor | None:
        return None if name is None else self._norm(prefix + name)

    def _norm(self, name: str) -> Tensor:
        """With what the family adds to it: in fp32, rounded once."""
        stored, offset = self._checkpoint.read(name), self._checkpoint.config.norm_offset
        if offset:
            stored = stored.float() + offset
        return self._memory.keep(stored.to(self._device, self._dtype))

    def _stored(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(self._device, self._dtype)

    def _read(self, name: str) -> Tensor:
        return self._memory.keep(self._stored(name))

    def _columns(self, parts: list[_Part], inputs: int, rows: Tensor | None = None) -> LinearWeight:
        """Column-parallel: the rank's outputs of several projections of one input, as one matrix.

        rows: the order that they are to have; None: as they come.
        """
        return self._memory.keep_matrix(self._outputs(parts, inputs, rows))

    def _rows(self, name: str, outputs: int, span: Span) -> LinearWeight:
        """Row-parallel: all outputs, the rank's inputs."""
        return self._memory.keep_matrix(self._inputs(name, outputs, span))

    def _outputs(self, parts: list[_Part], inputs: int, rows: Tensor | None = None) -> LinearWeight:
        """As ``_columns``, not yet in the memory for weights."""
        quantized = self._quantized(parts, rows)
        packed: LinearWeight = quantized or self._kernels.pack_linear(self._stack(parts, ".weight", inputs, rows=rows))
        return packed

    def _inputs(self, name: str, outputs: int, span: Span) -> LinearWeight:
        """As ``_rows``, not yet in the memory for weights."""
        whole = Span(0, outputs, outputs)
        if (quantized := self._quantized([(name, whole)])) is not None:
            return quantized
        matrix = torch.zeros((outputs, span.size), dtype=self._dtype, device=self._device)
        matrix[:, : span.end - span.begin].copy_(self._checkpoint.read(name + ".weight", whole, span))
        packed: LinearWeight = self._kernels.pack_linear(matrix)
        return packed

    def _quantized(self, parts: list[_Part], rows: Tensor | None = None) -> LinearWeight | None:
        """Projections of one input, as one matrix in its few bits; None: they are to be decoded, as a head is that is
        widened.
        """
        if any(name not in self._kept or span.end - span.begin != span.size for name, span in parts):
            return None
        matrices = [self._checkpoint.read_quantized(name + ".weight") for name, _ in parts]
        merged = stack_outputs(matrices, self._kept[parts[0][0]].offsets)
        if rows is not None:
            merged = take_outputs(merged, rows)
        packed: LinearWeight = self._kernels.pack_quantized(merged.to(self._device), self._dtype)
        return packed

    def _stack(self, parts: list[_Part], suffix: str, *inputs: int, rows: Tensor | None = None) -> Tensor:
        merged = torch.zeros((sum(span.size for _, span in parts), *inputs), dtype=self._dtype, device=self._device)
        begin = 0
        for name, span in parts:
            live = merged[begin : begin + span.end - span.begin]
            live.copy_(self._checkpoint.read(name + suffix, span))
            begin += span.size
        return merged if rows is None else merged[rows.to(merged.device)]
