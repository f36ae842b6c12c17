"""Loads both models, checks that they fit each other and the devices, and divides the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pearl.config import EngineConfig, Role
from pearl.devices import require_supported_gpus
from pearl.engine.kv_budget import decide_pages, require_one_sequence
from pearl.engine.memory import (
    CudaMeter,
    MemoryMeter,
    Share,
    Shares,
    explaining_out_of_memory,
    gib,
    require_room_for_weights,
    shares_of,
)
from pearl.engine.runners import kernels_for, make_head_runner, make_parallel_runner, make_runner
from pearl.errors import ConfigurationError
from pearl.heads import HEAD_NAMES, Head, HeadConfig, head_kind, load_head, lone_head, read_head
from pearl.heads.runner import HeadRunner
from pearl.models import (
    CausalModel,
    KVCache,
    ModelConfig,
    Tokenizer,
    bundled_path,
    load_model,
    transformers_backend,
)
from pearl.models.backend import DescribedModel, check_weights, describe_model
from pearl.models.model_source import source_of
from pearl.models.transformers_backend import TransformersConfig
from pearl.models.vocabulary import require_common_core, usable_ids
from pearl.models.weight_memory import return_freed
from pearl.models.weight_size import read_bytes
from pearl.parallel import ParallelRunner
from pearl.workers import ModelRunner


@dataclass(frozen=True)
class LoadedModels:
    """Weights and KV tensors. Engines may share them if only one of them works at a time and none caches prefixes."""

    target: ModelRunner
    draft: ModelRunner | None
    tokenizer: Tokenizer
    vocab_size: int  # ids that requests may name and the models draw; padding lies behind
    max_model_len: int
    num_pages: int  # of each model
    target_bytes: int = 0  # of weights that a row reads
    draft_bytes: int = 0  # that drafting a token reads
    head: HeadRunner | None = None  # in the place of a draft model: it reads the target's hidden states

    def close(self) -> None:
        """End the processes that hold parts of the target, if there are any. Idempotent."""
        if isinstance(self.target, ParallelRunner):
            self.target.close()


@dataclass(frozen=True)
class Pair:
    """Both models' shapes, checked to fit each other; the draft's with room for all ids that are used."""

    target: DescribedModel
    draft: DescribedModel | None
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    head: HeadConfig | None = None  # in the place of a draft model

    def loaded(
        self,
        target: ModelRunner,
        draft: ModelRunner | None,
        num_pages: int,
        head: HeadRunner | None = None,
    ) -> LoadedModels:
        target_bytes, draft_bytes = (
            0 if model is None or runner is None else read_bytes(model, model.dtype, device=runner.queue.device.type)
            for model, runner in ((self.target, target), (self.draft, draft))
        )
        if self.head is not None:
            draft_bytes = self.head.step_elements * self.head.shape.dtype.itemsize
        return LoadedModels(
            target,
            draft,
            self.tokenizer,
            self.vocab_size,
            self.max_model_len,
            num_pages,
            target_bytes,
            draft_bytes,
            head,
        )


def model_paths(config: EngineConfig) -> tuple[str, str | None]:
    """Of the target, and of the draft model or head, if there is one; the bundled ones where none is named."""
    draft = (config.draft or str(bundled_path("draft"))) if config.uses_draft_model else None
    return config.target or str(bundled_path("target")), draft


def load_models(config: EngineConfig, meter: MemoryMeter | None = None) -> LoadedModels:
    """Load both models. Raises ConfigurationError (or a subclass), before any weight is read if it can.

    ``meter`` measures the GPUs' memory; None: with torch.
    """
    target_path, draft_path = model_paths(config)
    require_supported_gpus(config.resolve_target_devices())
    if config.uses_draft_model:
        require_supported_gpus([config.resolve_device("draft")])
    pair = _check_pair(config, target_path, draft_path)
    meter = meter or CudaMeter()
    _require_room(config, pair, meter)  # before weights are fetched
    target_path, draft_path, pair = _check_weights(target_path, draft_path, pair)
    shares = _require_room(config, pair, meter)
    draft = None
    if draft_path is not None and shares.draft is not None and pair.head is None:
        with explaining_out_of_memory(shares.draft, meter):
            draft = _load(config, "draft", draft_path, shares.draft, pair)
    if config.target_parallel > 1:
        return _assemble_parallel(config, pair, target_path, draft, shares, meter)
    with explaining_out_of_memory(shares.target[0], meter):
        target = _load(config, "target", target_path, shares.target[0], pair)
    head = None
    if draft_path is not None and shares.draft is not None and pair.head is not None:
        with explaining_out_of_memory(shares.draft, meter):
            head = _load_head(config, draft_path, shares.draft, pair, pair.head, target)
    return_freed()
    return assemble(config, pair, target, draft, meter, head)


def assemble(
    config: EngineConfig,
    pair: Pair,
    target: CausalModel,
    draft: CausalModel | None,
    meter: MemoryMeter | None = None,
    head: Head | None = None,
) -> LoadedModels:
    """Give loaded models, or one and a head, each on its role's device, their KV caches and runners.

    Raises ConfigurationError if what the weights leave cannot hold one sequence.
    """
    meter = meter or CudaMeter()
    shares = shares_of(config, pair.target, pair.draft, pair.head)
    num_pages = decide_pages(config, shares, target, draft, pair.max_model_len, meter)
    draft_runner = _draft_runner(config, draft, shares, num_pages, meter)
    target_cache = _allocate(config, shares.target[0], num_pages, meter)
    head_runner = None
    hidden_layers: tuple[int, ...] = ()
    if head is not None and shares.draft is not None:
        head_runner = make_head_runner(config, head, _allocate(config, shares.draft, num_pages, meter))
        hidden_layers = head.config.hidden_layers
    target_runner = make_runner(config, "target", target, target_cache, hidden_layers)
    return pair.loaded(target_runner, draft_runner, num_pages, head_runner)


def _check_pair(config: EngineConfig, target_path: str, draft_path: str | None) -> Pair:
    if (own := lone_head(target_path)) is not None:
        raise ConfigurationError(
            f"target={target_path!r} is {HEAD_NAMES[own]}, which drafts for a target; give it as the draft, beside the "
            "target that it was trained for"
        )
    target = _describe(config, "target", target_path)
    tokenizer = Tokenizer.from_pretrained(target_path)
    vocab_size = usable_ids(tokenizer.vocab_size, tokenizer.eos_ids, target.vocab_size)
    longest = target.longest
    draft = None
    head = None if draft_path is None else _read_head(config, draft_path, target)
    if draft_path is not None and head is None:
        draft = _describe(config, "draft", draft_path)
        drafts = Tokenizer.from_pretrained(draft_path).vocabulary
        require_common_core(tokenizer.vocabulary, drafts, min(vocab_size, draft.vocab_size))
        longest = min(longest, draft.longest)
    max_model_len = config.max_model_len or longest
    for model in (target, draft, None if head is None else head.shape):
        if model is not None:
            model.require_length(max_model_len)
    if max_model_len > longest:
        raise ConfigurationError(
            f"max_model_len={max_model_len} is more than the models were made for; lower it to at most {longest}, the "
            "smaller max_position_embeddings of the two, or leave it out"
        )
    return Pair(target, draft, tokenizer, vocab_size, max_model_len, head)


def _read_head(config: EngineConfig, path: str, target: DescribedModel) -> HeadConfig | None:
    """None if the draft is a model of its own. Raises ConfigurationError for a target that cannot serve a head."""
    kind = head_kind(path)
    if kind is None:
        return None
    if config.draft_backend == "transformers":
        raise ConfigurationError(
            f"draft_backend='transformers' is for draft models, and draft={path!r} is {HEAD_NAMES[kind]}; leave it out"
        )
    why = None
    if config.target_parallel > 1:
        why = "a tensor-parallel target does not hand them over; use target_parallel=1"
    elif not isinstance(target, ModelConfig):
        why = "a target that runs through transformers does not hand them over"
    if why is not None or not isinstance(target, ModelConfig):
        raise ConfigurationError(f"draft={path!r} reads the target's hidden states: {why}, or choose a draft model")
    return read_head(path, target)


def _describe(config: EngineConfig, role: Role, path: str) -> DescribedModel:
    model = describe_model(path, config.resolve_backend(role), config.torch_dtype)
    _require_fitting_options(config, role, model)
    return model


def _require_fitting_options(config: EngineConfig, role: Role, model: DescribedModel) -> None:
    """Of a model whose matrices are to be rounded or divided: only the native decoder's, and what is quantised already
    is run as it is. Raises ConfigurationError.
    """
    chosen = config.target_weights if role == "target" else config.draft_weights
    if isinstance(model, TransformersConfig):
        used = {f"{role}_weights={chosen!r}": chosen != "full"}
        used["target_parallel"] = role == "target" and config.target_parallel > 1
        if refused := [option for option, is_used in used.items() if is_used]:
            raise ConfigurationError(
                f"{refused[0]} is for models that the native decoder runs; the {role} runs through transformers' "
                f"{model.architecture}: leave it out"
            )
    elif model.quantization is not None and chosen != "full":
        raise ConfigurationError(
            f"{role}_weights={chosen!r} rounds plain weights, but the {role} is quantised already, with "
            f"{model.quantization.method.name}; leave {role}_weights out"
        )


def _require_room(config: EngineConfig, pair: Pair, meter: MemoryMeter) -> Shares:
    """Refuse what the devices cannot hold, as far as it is known before weights are there."""
    shares = shares_of(config, pair.target, pair.draft, pair.head)
    require_room_for_weights(shares, meter)
    require_one_sequence(config, shares, pair.max_model_len, meter)
    return shares


def _check_weights(target_path: str, draft_path: str | None, pair: Pair) -> tuple[str, str | None, Pair]:
    """Both models' folders with their weights, and the pair as these are, checked without reading one."""
    target_folder = source_of(target_path).fetch_weights()
    pair = replace(pair, target=check_weights(target_folder, pair.target))
    if draft_path is None or pair.draft is None:
        return str(target_folder), draft_path, pair  # of a head, whose tensors are checked when it is loaded
    draft_folder = source_of(draft_path).fetch_weights()
    draft = check_weights(draft_folder, pair.draft)
    draft = replace(draft, vocab_size=max(draft.vocab_size, pair.vocab_size))  # it is loaded so (models.widening)
    return str(target_folder), str(draft_folder), replace(pair, draft=draft)


def _load(config: EngineConfig, role: Role, path: str, share: Share, pair: Pair) -> CausalModel:
    kernels = kernels_for(config, role, share.config)
    if isinstance(share.config, TransformersConfig):
        return transformers_backend.load(
            path, share.config, device=share.device, kernels=kernels, page_size=config.page_size
        )
    with torch.inference_mode():
        return load_model(
            path,
            device=share.device,
            dtype=share.dtype,
            max_model_len=pair.max_model_len,
            kernels=kernels,
            vocab_size=pair.vocab_size if role == "draft" else 0,
        )


def _load_head(
    config: EngineConfig, path: str, share: Share, pair: Pair, head: HeadConfig, target: CausalModel
) -> Head:
    """With the target's embeddings where it has none of its own."""

    assert isinstance(pair.target, ModelConfig)  # or the head was refused
    there = config.resolve_device("target")

    def embed(ids: Tensor) -> Tensor:
        return target.embed(ids.to(there)).to(share.device, head.shape.dtype)

    with torch.inference_mode():
        return load_head(
            path,
            head,
            device=share.device,
            max_model_len=pair.max_model_len,
            kernels=kernels_for(config, "draft", head.shape),
            embed=embed,
            embedding_width=pair.target.hidden,
        )


def _allocate(config: EngineConfig, share: Share, num_pages: int, meter: MemoryMeter) -> KVCache:
    reason = f"its KV cache needs {gib(num_pages * share.page_bytes)}"
    advice = "lower kv_cache_memory, or leave it out to have it measured"
    with explaining_out_of_memory(share, meter, reason, advice), torch.inference_mode():
        return KVCache.allocate(share.config, num_pages, config.page_size, share.dtype, share.device)


def _draft_runner(
    config: EngineConfig, draft: CausalModel | None, shares: Shares, num_pages: int, meter: MemoryMeter
) -> ModelRunner | None:
    if draft is None or shares.draft is None:
        return None
    return make_runner(config, "draft", draft, _allocate(config, shares.draft, num_pages, meter))


def _assemble_parallel(
    config: EngineConfig, pair: Pair, path: str, draft: CausalModel | None, shares: Shares, meter: MemoryMeter
) -> LoadedModels:
    """As ``assemble``, with a target whose ranks load their own weights and make their own caches."""
    num_pages = decide_pages(config, shares, None, draft, pair.max_model_len, meter)
    draft_runner = _draft_runner(config, draft, shares, num_pages, meter)
    first = shares.target[0]
    kv = f"its weights need {gib(first.weight_bytes)}, its KV cache {gib(num_pages * first.page_bytes)}"
    # Last: nothing that fails after it would leave its processes behind.
    with explaining_out_of_memory(first, meter, kv):
        target = make_parallel_runner(config, path, pair.target, pair.max_model_len, num_pages)
    return pair.loaded(target, draft_runner, num_pages)
