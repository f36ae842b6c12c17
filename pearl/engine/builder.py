"""Builds an engine from a configuration: loads both models, checks that they fit, divides the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pearl.config import EngineConfig, Role
from pearl.devices import require_supported_gpus
from pearl.drafting import Drafter, ModelDrafter, NGramDrafter
from pearl.drafting.logits_ring import LogitsRing
from pearl.engine.engine import Engine, RoundRecord
from pearl.engine.judge import Judge
from pearl.engine.kv_budget import decide_pages
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
from pearl.workers import (
    DeviceQueue,
    GraphRunner,
    InlineWorker,
    ModelRunner,
    TargetRunner,
    ThreadWorker,
    Worker,
    open_queue,
    why_not_captured,
)
from pearl_kernels import KernelSet, Situation, select

_MOST_GRAPH_ROWS = 512  # beyond that many a forward takes longer than its launches from Python


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
class Pair:
    """Both models' shapes, checked to fit each other."""

    target: ModelConfig
    draft: ModelConfig | None
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int


def load_models(config: EngineConfig, meter: MemoryMeter | None = None) -> LoadedModels:
    """Load both models. Raises ConfigurationError (or a subclass), before any weight is read if it can.

    ``meter`` measures the GPUs' memory; None: with torch.
    """
    target_path = config.target or str(bundled_path("target"))
    draft_path = (config.draft or str(bundled_path("draft"))) if config.uses_draft_model else None
    require_supported_gpus(config.resolve_target_devices())
    if config.uses_draft_model:
        require_supported_gpus([config.resolve_device("draft")])
    pair = _check_pair(config, target_path, draft_path)
    meter = meter or CudaMeter()
    shares = shares_of(config, pair.target, pair.draft)
    require_room_for_weights(shares, meter)
    draft = None
    if draft_path is not None and shares.draft is not None:
        with explaining_out_of_memory(shares.draft, meter):
            draft = _load(config, "draft", draft_path, shares.draft, pair)
    if config.target_parallel > 1:
        return _assemble_parallel(config, pair, target_path, draft, shares, meter)
    with explaining_out_of_memory(shares.target[0], meter):
        target = _load(config, "target", target_path, shares.target[0], pair)
    return assemble(config, pair, target, draft, meter)


def assemble(
    config: EngineConfig, pair: Pair, target: Decoder, draft: Decoder | None, meter: MemoryMeter | None = None
) -> LoadedModels:
    """Give loaded decoders, each on its role's device, their KV caches and runners.

    Raises ConfigurationError if what the weights leave cannot hold one sequence.
    """
    meter = meter or CudaMeter()
    shares = shares_of(config, pair.target, pair.draft)
    num_pages = decide_pages(config, shares, target, draft, pair.max_model_len, meter)
    draft_runner = _draft_runner(config, draft, shares, num_pages, meter)
    target_cache = _allocate(config, shares.target[0], num_pages, meter)
    return _loaded(config, pair, _runner(config, "target", target, target_cache), draft_runner, num_pages)


def kernels_for(config: EngineConfig, role: Role, model: ModelConfig) -> KernelSet:
    """The operators of one model's worker."""
    draft_threads, target_threads = config.resolve_threads()
    threads, weights = (
        (draft_threads, config.draft_weights) if role == "draft" else (target_threads, config.target_weights)
    )
    dtype = config.torch_dtype or model.dtype
    device = config.resolve_device(role)
    return select(Situation(device.type, dtype, model.head_dim, threads, config.page_size, weights))


def connect(
    config: EngineConfig,
    models: LoadedModels,
    observer: Callable[[RoundRecord], None] | None = None,
    wrap_verifier: Callable[[Judge], Judge] | None = None,
) -> Engine:
    """Build an engine around loaded models: bookkeeping, workers, drafter, method.

    ``wrap_verifier`` puts something between the verifier and the engine: benchmarks script verdicts.
    """
    eos_ids = models.tokenizer.eos_ids
    drafter: Drafter | None = None
    draft_kv: KVCacheManager | None = None
    if config.uses_draft_model:
        if models.draft is None:
            raise ConfigurationError(f"method={config.method!r} needs a draft model, but none was loaded")
        ring = LogitsRing(config.max_num_seqs, config.largest_window)
        drafter = ModelDrafter(models.draft, config.verification, models.vocab_size, eos_ids, ring)
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
    kernels, queue = models.target.kernels, models.target.queue
    draft_queue = models.draft.queue if models.draft else None
    verifier: Judge = Verifier(kernels, config.verification, models.vocab_size, eos_ids, queue, draft_queue)
    if wrap_verifier is not None:
        verifier = wrap_verifier(verifier)
    draft_threads, target_threads = config.resolve_threads()
    inline = models.target.is_fused or queue.captures
    target_worker = InlineWorker(queue) if inline else ThreadWorker("target", target_threads)
    draft_worker: Worker | None = None
    if draft_queue is not None and draft_queue.captures:
        draft_worker = InlineWorker(draft_queue)
    elif config.uses_draft:
        draft_worker = ThreadWorker("draft", draft_threads)
    target = TargetRunner(models.target)
    return Engine(scheduler, target, target_worker, drafter, draft_worker, verifier, window, observer)


def _check_pair(config: EngineConfig, target_path: str, draft_path: str | None) -> Pair:
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
    return Pair(target, draft, tokenizer, vocab_size, max_model_len)


def _load(config: EngineConfig, role: Role, path: str, share: Share, pair: Pair) -> Decoder:
    with torch.inference_mode():
        return load_model(
            path,
            device=share.device,
            dtype=share.dtype,
            max_model_len=pair.max_model_len,
            kernels=kernels_for(config, role, share.config),
        )


def _allocate(config: EngineConfig, share: Share, num_pages: int, meter: MemoryMeter) -> KVCache:
    reason = f"its KV cache needs {gib(num_pages * share.page_bytes)}"
    advice = "lower kv_cache_memory, or leave it out to have it measured"
    with explaining_out_of_memory(share, meter, reason, advice), torch.inference_mode():
        return KVCache.allocate(share.config, num_pages, config.page_size, share.dtype, share.device)


def _draft_runner(
    config: EngineConfig, draft: Decoder | None, shares: Shares, num_pages: int, meter: MemoryMeter
) -> ModelRunner | None:
    if draft is None or shares.draft is None:
        return None
    return _runner(config, "draft", draft, _allocate(config, shares.draft, num_pages, meter))


def _runner(config: EngineConfig, role: Role, model: Decoder, cache: KVCache) -> ModelRunner:
    draft_threads, target_threads = config.resolve_threads()
    queue = _queue(config, role)
    if not queue.captures:
        threads = draft_threads if role == "draft" else target_threads
        return ModelRunner(model, cache, config.page_size, queue, threads)
    if config.enforce_eager:
        return ModelRunner(model, cache, config.page_size, queue)
    if reason := why_not_captured(model.kernels):
        raise ConfigurationError(f"no CUDA graphs of the {role}: {reason}; use enforce_eager=True")
    most_rows = min(config.max_num_seqs * (config.largest_window + 1), _MOST_GRAPH_ROWS)
    return GraphRunner(model, cache, config.page_size, queue, most_rows)


def _queue(config: EngineConfig, role: Role) -> DeviceQueue:
    shares = role == "draft" and config.shares_gpu
    return open_queue(role, config.resolve_device(role), urgent=shares, sms=config.draft_sms if shares else None)


def _assemble_parallel(
    config: EngineConfig, pair: Pair, path: str, draft: Decoder | None, shares: Shares, meter: MemoryMeter
) -> LoadedModels:
    """As ``assemble``, with a target whose ranks load their own weights and make their own caches."""
    num_pages = decide_pages(config, shares, None, draft, pair.max_model_len, meter)
    draft_runner = _draft_runner(config, draft, shares, num_pages, meter)
    first = shares.target[0]
    kv = f"its weights need {gib(first.weight_bytes)}, its KV cache {gib(num_pages * first.page_bytes)}"
    # Last: nothing that fails after it would leave its processes behind.
    with explaining_out_of_memory(first, meter, kv):
        target = _parallel_runner(config, path, pair, num_pages)
    return _loaded(config, pair, target, draft_runner, num_pages)


def _parallel_runner(config: EngineConfig, path: str, pair: Pair, num_pages: int) -> ParallelRunner:
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
        threads=max(1, config.resolve_threads()[1] // len(devices)),
    )
    return start_parallel(spec, [str(device) for device in devices], _queue(config, "target"))


def _loaded(
    config: EngineConfig, pair: Pair, target: ModelRunner, draft: ModelRunner | None, num_pages: int
) -> LoadedModels:
    target_device, draft_device = config.resolve_device("target"), config.resolve_device("draft")
    return LoadedModels(
        target, draft, pair.tokenizer, pair.vocab_size, pair.max_model_len, num_pages, target_device, draft_device
    )


def _window_policy(config: EngineConfig) -> WindowPolicy:
    if config.window != "auto":
        return FixedWindow(config.window)
    if config.method == "speculative":  # where the models take turns there is nothing to balance
        return MeasuredWindow(fastest(sequential_tokens_per_second), config.max_window)
    choose = balanced_window if config.window_rule == "balanced" else fastest(pearl_tokens_per_second)
    return MeasuredWindow(choose, config.max_window)
