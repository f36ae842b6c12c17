"""Models of real shapes with random weights: what a forward costs depends on its shape, not on what it has learnt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.config import EngineConfig, Role
from pearl.devices import require_supported_gpus
from pearl.engine.memory import CudaMeter, Share, explaining_out_of_memory, require_room_for_weights, shares_of
from pearl.engine.model_loading import LoadedModels, assemble
from pearl.engine.model_pair import Pair
from pearl.engine.runners import kernels_for
from pearl.errors import ConfigurationError, InvalidRequestError
from pearl.models import Decoder, KVCache, ModelConfig, Tokenizer
from pearl.models.decoder import DecoderWeights, LayerWeights
from pearl.models.rope_tables import rope_tables
from pearl.models.weight_size import weight_bytes
from pearl_kernels import KernelSet, LinearWeight


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, *, rope_factor: float, tied: bool = False,
    head_dim: int = 128, vocab: int = 128_256,
) -> ModelConfig:  # fmt: skip
    """Llama 3.1 or 3.2."""
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": rope_factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    return ModelConfig(
        "LlamaForCausalLM", vocab, hidden, layers, heads, kv_heads, head_dim, ffn, eps=1e-5, tied=tied,
        qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="none", windows=(0,) * layers,
        max_position_embeddings=131_072, rope=rope, dtype=torch.bfloat16,
    )  # fmt: skip


# As published in the models' config.json: Llama-3.2-1B, Llama-3.1-8B, Qwen2.5-32B, Llama-3.1-70B; tiny ones to try.
SHAPES: Mapping[str, ModelConfig] = {
    "tiny-target": _llama(256, 2, 4, 2, 512, rope_factor=8.0, head_dim=64, vocab=512),
    "tiny-draft": _llama(128, 2, 2, 1, 256, rope_factor=8.0, tied=True, head_dim=64, vocab=512),
    "1b": _llama(2048, 16, 32, 8, 8192, rope_factor=32.0, tied=True, head_dim=64),
    "8b": _llama(4096, 32, 32, 8, 14_336, rope_factor=8.0),
    "32b": ModelConfig(
        "Qwen2ForCausalLM", 152_064, 5120, 64, 40, 8, 128, 27_648, eps=1e-5, tied=False,
        qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm="none", windows=(0,) * 64,
        max_position_embeddings=131_072, rope={"rope_type": "default", "rope_theta": 1_000_000.0}, dtype=torch.bfloat16,
    ),
    "70b": _llama(8192, 80, 64, 8, 28_672, rope_factor=8.0),
}  # fmt: skip


@dataclass(frozen=True)
class RandomDecoders:
    """Weights of both models; several engines, one after another, may be assembled around them."""

    target: Decoder
    draft: Decoder | None

    @property
    def configs(self) -> list[ModelConfig]:
        return [model.config for model in (self.target, self.draft) if model]


def random_decoders(
    config: EngineConfig, target: str, draft: str | None, max_model_len: int | None = None
) -> RandomDecoders:
    """Random weights of the named shapes, made on each model's device in its dtype, the same for each config.seed.

    ``max_model_len``: positions to be ready for; None: config's, or else the models' own.
    Raises ConfigurationError for an unknown name, for a method without its draft, and for a tensor-parallel target.
    """
    if config.uses_draft_model and draft is None:
        raise ConfigurationError(f"method={config.method!r} needs a draft; name its shape")
    draft = draft if config.uses_draft_model else None
    names = [target] if draft is None else [target, draft]
    if unknown := sorted(set(names) - SHAPES.keys()):
        raise ConfigurationError(f"unknown shape {unknown[0]!r}; known are {', '.join(SHAPES)}")
    if config.target_parallel > 1:
        raise ConfigurationError("random weights are made on one device; leave target_parallel at 1")
    longest = max_model_len or config.max_model_len or min(SHAPES[name].max_position_embeddings for name in names)
    meter = CudaMeter()
    shares = shares_of(config, SHAPES[target], None if draft is None else SHAPES[draft])
    require_supported_gpus([share.device for share in shares.all])
    require_room_for_weights(shares, meter)
    roles: dict[Role, Share | None] = {"target": shares.target[0], "draft": shares.draft}
    decoders: dict[Role, Decoder] = {}
    for role, share in roles.items():
        if share is not None and isinstance(share.config, ModelConfig):  # as all SHAPES are
            with explaining_out_of_memory(share, meter):
                decoders[role] = _decoder(config, role, share.config, longest)
    return RandomDecoders(decoders["target"], decoders.get("draft"))


def assemble_shapes(config: EngineConfig, decoders: RandomDecoders) -> LoadedModels:
    """Runners, and KV memory filled with small random numbers. ConfigurationError if one sequence does not fit."""
    vocab_size = min(shape.vocab_size for shape in decoders.configs)
    pair = Pair(
        decoders.target.config,
        decoders.draft.config if decoders.draft else None,
        Tokenizer(_Numbers(vocab_size), frozenset()),
        vocab_size,
        config.max_model_len or decoders.target.max_model_len,
    )
    models = assemble(config, pair, decoders.target, decoders.draft)
    for runner in filter(None, (models.target, models.draft)):
        _fill(runner.cache, config.seed or 0)
    return models


def _fill(cache: KVCache, seed: int) -> None:
    """Memory as it was found could hold NaNs."""
    device = cache.layers[0][0].device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.inference_mode():
        for keys_values in cache.layers:
            for tensor in keys_values:
                tensor.normal_(0, 0.5, generator=generator)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # weights and KV are ready for whatever stream a worker has


def load_shapes(config: EngineConfig, target: str, draft: str | None) -> LoadedModels:
    """Both models of the named shapes, with random weights and KV; the counterpart of ``load_models``.

    Raises ConfigurationError as ``random_decoders`` and ``assemble_shapes``.
    """
    return assemble_shapes(config, random_decoders(config, target, draft))


def random_prompts(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Token ids, the same at each call; prompts differ from each other unless they are very short."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def forward_bytes(shape: ModelConfig, dtype: torch.dtype) -> int:
    """What a forward must read of the weights: all of them, but of an embedding that is not the head single rows."""
    rows_only = 0 if shape.tied else shape.vocab_size * shape.hidden * dtype.itemsize
    return weight_bytes(shape, dtype) - rows_only


def _decoder(config: EngineConfig, role: Role, shape: ModelConfig, max_model_len: int) -> Decoder:
    device, dtype = config.resolve_device(role), config.torch_dtype or shape.dtype
    kernels = kernels_for(config, role, shape)
    generator = torch.Generator(device).manual_seed((config.seed or 0) + (role == "draft"))
    with torch.inference_mode():
        weights = _RandomWeights(shape, dtype, device, kernels, generator).decoder()
    return Decoder(shape, weights, rope_tables(shape, max_model_len, device), kernels)


@dataclass(frozen=True)
class _RandomWeights:
    """A matrix's numbers have deviation inputs ** -0.5: it keeps the size of what it multiplies."""

    shape: ModelConfig
    dtype: torch.dtype
    device: torch.device
    kernels: KernelSet
    generator: torch.Generator

    def decoder(self) -> DecoderWeights:
        shape = self.shape
        embedding = self._numbers(shape.vocab_size, shape.hidden)
        layers = tuple(self._layer() for _ in range(shape.layers))
        packed = self.kernels.pack_linear(embedding if shape.tied else self._numbers(shape.vocab_size, shape.hidden))
        is_head = shape.tied and packed.scale is None
        return DecoderWeights(None if is_head else embedding, layers, self._norm(shape.hidden), packed)

    def _layer(self) -> LayerWeights:
        shape = self.shape
        d, f, q, kv = shape.hidden, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        return LayerWeights(
            input_norm=self._norm(d),
            qkv=self._matrix(q + 2 * kv, d),
            qkv_bias=self._bias(q + 2 * kv) if shape.qkv_bias else None,
            q_norm=self._norm(shape.head_dim) if shape.qk_norm == "head" else None,
            k_norm=self._norm(shape.head_dim) if shape.qk_norm == "head" else None,
            output=self._matrix(d, q),
            output_bias=self._bias(d) if shape.output_bias else None,
            mlp_norm=self._norm(d),
            gate_up=self._matrix(2 * f, d),
            gate_up_bias=self._bias(2 * f) if shape.mlp_bias else None,
            down=self._matrix(d, f),
            down_bias=self._bias(d) if shape.mlp_bias else None,
        )

    def _numbers(self, *size: int) -> Tensor:
        numbers = torch.empty(size, dtype=self.dtype, device=self.device)
        return numbers.normal_(0, size[-1] ** -0.5, generator=self.generator)

    def _matrix(self, outputs: int, inputs: int) -> LinearWeight:
        packed: LinearWeight = self.kernels.pack_linear(self._numbers(outputs, inputs))
        return packed

    def _bias(self, size: int) -> Tensor:
        return self._numbers(size)

    def _norm(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.device)


class _Numbers:
    """A vocabulary of ``size`` words: token 17 is the text "<17>". What ``Tokenizer`` needs of a tokenizer."""

    eos_token_id = None
    chat_template = None

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str, **_: object) -> list[int]:
        if not re.fullmatch(r"(<[0-9]+>)*", text):
            raise InvalidRequestError('random weights have words like "<17>" only; give such, or token ids')
        return [int(number) for number in re.findall(r"[0-9]+", text)]

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(f"<{token}>" for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return {f"<{token}>": token for token in range(self._size)}
