"""Builds an engine around loaded models: bookkeeping, workers, drafter, method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pearl.config import EngineConfig
from pearl.drafting import Drafter, ModelDrafter, NGramDrafter
from pearl.drafting.logits_ring import LogitsRing
from pearl.engine.engine import Engine, RoundRecord
from pearl.engine.judge import Judge
from pearl.engine.model_loading import LoadedModels
from pearl.engine.scheduler import Scheduler
from pearl.engine.verifier import Verifier
from pearl.engine.warm_up import Side, warm_up
from pearl.engine.window import (
    FixedWindow,
    MeasuredWindow,
    WindowPolicy,
    balanced_window,
    fastest,
    pearl_tokens_per_second,
    sequential_tokens_per_second,
    whole_windows_tokens_per_second,
)
from pearl.errors import ConfigurationError
from pearl.kv import KVCacheManager
from pearl.methods import build_method
from pearl.workers import HostQueue, InlineWorker, ModelRunner, TargetRunner, ThreadWorker, Worker


def connect(
    config: EngineConfig,
    models: LoadedModels,
    observer: Callable[[RoundRecord], None] | None = None,
    wrap_verifier: Callable[[Judge], Judge] | None = None,
) -> Engine:
    """An engine of its own bookkeeping, workers, drafter and method, around models that others may share.

    ``wrap_verifier`` puts something between the verifier and the engine: benchmarks script verdicts.
    """
    # One that the model has no row for can never be drawn, nor its logit be changed.
    eos_ids = frozenset(token for token in models.tokenizer.eos_ids if 0 <= token < models.vocab_size)
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
        build_method(config, window.pre_verifies),
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
    sends = draft_queue.aside("sends") if draft_queue else None
    verifier: Judge = Verifier(kernels, config.verification, models.vocab_size, eos_ids, queue, sends)
    if wrap_verifier is not None:
        verifier = wrap_verifier(verifier)
    draft_threads, target_threads = config.resolve_threads()
    inline = models.target.fused is not None or queue.asynchronous
    target_worker = InlineWorker(queue) if inline else ThreadWorker("target", target_threads)
    draft_worker: Worker | None = None
    draft_alone: Worker | None = None
    if draft_queue is not None and draft_queue.asynchronous:
        draft_worker = InlineWorker(draft_queue)
    elif config.uses_draft:
        draft_worker = ThreadWorker("draft", draft_threads)
        if models.draft is None or models.draft.fused is not None:  # nothing of it depends on the thread it runs on
            draft_alone = InlineWorker(HostQueue(torch.device("cpu")))
    if config.capture_seconds:
        sides = [Side(target_worker, queue.device, models.target.captures())]
        if isinstance(drafter, ModelDrafter) and draft_worker is not None and draft_queue is not None:
            sides.append(Side(draft_worker, draft_queue.device, drafter.captures()))
        _warm_up(config, sides)
    target = TargetRunner(models.target)
    prepared = _preparations([runner for runner in (models.target, models.draft) if runner is not None])
    return Engine(
        scheduler, target, target_worker, drafter, draft_worker, verifier, window, observer, draft_alone, prepared
    )


def _warm_up(config: EngineConfig, sides: Sequence[Side]) -> None:
    try:
        warm_up(sides, config.capture_seconds)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            "no memory was left to capture CUDA graphs; give kv_cache_memory, or less of it, or use enforce_eager=True"
        ) from error


def _preparations(runners: Sequence[ModelRunner]) -> Callable[[], int]:
    """What tells how many graphs were captured and kernels compiled so far."""
    queues = [runner.queue for runner in runners]
    if all("triton" not in runner.kernels.providers.values() for runner in runners):
        return lambda: sum(queue.captured for queue in queues)
    from pearl_kernels.triton.compiled import count_compiled

    compiled = count_compiled()
    return lambda: sum(queue.captured for queue in queues) + compiled()


def _window_policy(config: EngineConfig) -> WindowPolicy:
    if config.window != "auto":
        return FixedWindow(config.window)
    if not config.uses_draft:
        return FixedWindow(config.max_window)
    takes_turns = config.method == "speculative" or not (config.pre_verify or config.post_verify)
    if takes_turns:  # there is nothing to balance
        choose = fastest(whole=sequential_tokens_per_second)
    elif config.window_rule == "balanced":
        choose = balanced_window
    else:
        choose = fastest(
            pre_verified=pearl_tokens_per_second if config.pre_verify else None,
            whole=whole_windows_tokens_per_second if config.post_verify else None,
        )
    return MeasuredWindow(choose, config.max_window)
