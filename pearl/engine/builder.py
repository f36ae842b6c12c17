"""Builds an engine from a configuration: loads both models, checks that they fit, divides the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pearl.config import EngineConfig
from pearl.drafting import Drafter, ModelDrafter, NGramDrafter
from pearl.drafting.model_drafter import LogitsRing
from pearl.engine.engine import Engine, RoundRecord
from pearl.engine.scheduler import Scheduler
from pearl.engine.verifier import Verifier
from pearl.engine.window import (
    FixedWindow,
    MeasuredWindow,
    WindowPolicy,
    balanced_window,
    fastest,
    pearl_tokens_per_second,
    sequential_tokens_per_second,
)
from pearl.errors import ConfigurationError
from pearl.kv import KVCacheManager
from pearl.methods import build_method
from pearl.models import Decoder, KVCache, ModelConfig, Tokenizer, bundled_path, load_model
from pearl.parallel import ParallelRunner, RankSpec, start_parallel
from pearl.workers import InlineWorker, ModelRunner, TargetRunner, ThreadWorker
from pearl_kernels import Situation, WeightFormat, select

_DEFAULT_KV_BYTES = 1 << 30


@dataclass(frozen=True)
class LoadedModels:
    """Weights and KV tensors. Engines may share them if only one of them works at a time and none caches prefixes."""

    target: ModelRunner
    draft: ModelRunner | None
    tokenizer: Tokenizer
    vocab_size: int  # tokens that have a meaning; both models' padding lies behind
    max_model_len: int
    num_pages: int  # of each model
    target_device: torch.device
    draft_device: torch.device

    def close(self) -> None:
        """End the processes that hold parts of the target, if there are any. Idempotent."""
        if isinstance(self.target, ParallelRunner):
            self.target.close()


@dataclass(frozen=True)
class _Pair:
    target: ModelConfig
    draft: ModelConfig | None
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int


def load_models(config: EngineConfig) -> LoadedModels:
    """Load both models. Raises ConfigurationError (or a subclass), before any weight is read if it can."""
    target_path = config.target or str(bundled_path("target"))
    draft_path = (config.draft or str(bundled_path("draft"))) if config.uses_draft_model else None
    pair = _check_pair(config, target_path, draft_path)
    num_pages = _num_pages(config, pair)
    target_device, draft_device = config.resolve_device("target"), config.resolve_device("draft")
    draft_threads, target_threads = config.resolve_threads()
    draft = None
    if pair.draft is not None and draft_path is not None:
        draft = _runner(
            config, draft_path, pair, pair.draft, draft_device, draft_threads, num_pages, config.draft_weights
        )
    # Last: nothing that fails after it would leave its processes behind.
    if config.target_parallel > 1:
        target: ModelRunner = _parallel_runner(config, target_path, pair, target_threads, num_pages)
    else:
        target = _runner(
            config, target_path, pair, pair.target, target_device, target_threads, num_pages, config.target_weights
        )
    return LoadedModels(
        target, draft, pair.tokenizer, pair.vocab_size, pair.max_model_len, num_pages, target_device, draft_device
    )


def connect(
    config: EngineConfig, models: LoadedModels, observer: Callable[[RoundRecord], None] | None = None
) -> Engine:
    """Build an engine around loaded models: bookkeeping, workers, drafter, method."""
    eos_ids = models.tokenizer.eos_ids
    drafter: Drafter | None = None
    draft_kv: KVCacheManager | None = None
    if config.uses_draft_model:
        if models.draft is None:
            raise ConfigurationError(f"method={config.method!r} needs a draft model, but none was loaded")
        ring = LogitsRing(config.max_num_seqs, config.largest_window)
        drafter = ModelDrafter(
            models.draft, config.verification, models.vocab_size, eos_ids, ring, models.draft_device
        )  # fmt: skip
        draft_kv = KVCacheManager(models.num_pages, config.page_size, config.prefix_caching)
    elif config.uses_draft:
        drafter = NGramDrafter()
    window = _window_policy(config)
    scheduler = Scheduler(
        build_method(config),
        KVCacheManager(models.num_pages, config.page_size, config.prefix_caching),
        draft_kv,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_waiting=config.max_waiting,
        window=window.window,
        drafter_reads_history=drafter is not None and drafter.reads_history,
    )
    kernels = models.target.kernels
    verifier = Verifier(kernels, config.verification, models.vocab_size, eos_ids, models.target_device)
    draft_threads, target_threads = config.resolve_threads()
    target_worker = InlineWorker() if models.target.is_fused else ThreadWorker("target", target_threads)
    draft_worker = ThreadWorker("draft", draft_threads) if config.uses_draft else None
    target = TargetRunner(models.target)
    return Engine(scheduler, target, target_worker, drafter, draft_worker, verifier, window, observer)


def _check_pair(config: EngineConfig, target_path: str, draft_path: str | None) -> _Pair:
    target = ModelConfig.from_pretrained(target_path)
    tokenizer = Tokenizer.from_pretrained(target_path)
    vocab_size = min(tokenizer.vocab_size, target.vocab_size)
    longest = target.max_position_embeddings
    draft = None
    if draft_path is not None:
        draft = ModelConfig.from_pretrained(draft_path)
        tokenizer.require_same_vocabulary(Tokenizer.from_pretrained(draft_path))
        longest = min(longest, draft.max_position_embeddings)
        if draft.vocab_size < vocab_size:
            raise ConfigurationError(
                f"the draft model has logits for {draft.vocab_size} tokens, the tokenizer has {vocab_size}; "
                "choose a draft made for this tokenizer"
            )
    max_model_len = config.max_model_len or longest
    return _Pair(target, draft, tokenizer, vocab_size, max_model_len)


def _num_pages(config: EngineConfig, pair: _Pair) -> int:
    """The same number of pages for both models, so that neither runs out before the other."""
    models = [model for model in (pair.target, pair.draft) if model]
    bytes_per_token = sum(KVCache.bytes_per_token(model, config.torch_dtype or model.dtype) for model in models)
    pages_per_sequence = -(-pair.max_model_len // config.page_size)
    budget = config.kv_cache_memory or _DEFAULT_KV_BYTES
    affordable = budget // (bytes_per_token * config.page_size)
    if affordable < pages_per_sequence:
        needed = pages_per_sequence * config.page_size * bytes_per_token
        raise ConfigurationError(
            f"one sequence of {pair.max_model_len} tokens needs {needed / 2**20:.1f} MiB of KV cache, "
            f"kv_cache_memory allows {budget / 2**20:.1f} MiB; raise it or lower max_model_len"
        )
    return int(min(affordable, pages_per_sequence * config.max_num_seqs))


def _runner(
    config: EngineConfig,
    path: str,
    pair: _Pair,
    model_config: ModelConfig,
    device: torch.device,
    threads: int,
    num_pages: int,
    weights: WeightFormat,
) -> ModelRunner:
    dtype = config.torch_dtype or model_config.dtype
    kernels = select(Situation(device.type, dtype, model_config.head_dim, threads, config.page_size, weights))
    with torch.inference_mode():
        model: Decoder = load_model(
            path, device=device, dtype=dtype, max_model_len=pair.max_model_len, kernels=kernels
        )  # fmt: skip
        cache = KVCache.allocate(model_config, num_pages, config.page_size, dtype, device)
    return ModelRunner(model, cache, config.page_size, device, threads)


def _parallel_runner(config: EngineConfig, path: str, pair: _Pair, threads: int, num_pages: int) -> ParallelRunner:
    devices = config.resolve_target_devices()
    spec = RankSpec(
        rank=0,
        ranks=len(devices),
        store_port=0,
        path=path,
        device=str(devices[0]),
        dtype=config.torch_dtype or pair.target.dtype,
        max_model_len=pair.max_model_len,
        num_pages=num_pages,
        page_size=config.page_size,
        threads=max(1, threads // len(devices)),
    )
    return start_parallel(spec, [str(device) for device in devices])


def _window_policy(config: EngineConfig) -> WindowPolicy:
    if config.window != "auto":
        return FixedWindow(config.window)
    if config.method == "speculative":  # where the models take turns there is nothing to balance
        return MeasuredWindow(fastest(sequential_tokens_per_second), config.max_window)
    choose = balanced_window if config.window_rule == "balanced" else fastest(pearl_tokens_per_second)
    return MeasuredWindow(choose, config.max_window)
