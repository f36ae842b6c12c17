"""Builds an engine around loaded models: bookkeeping, workers, drafter, method."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from pearl.config import EngineConfig
from pearl.drafting import Drafter, EagleDrafter, MedusaDrafter, ModelDrafter, NGramDrafter
from pearl.drafting.logits_ring import LogitsRing
from pearl.engine.branches import Branches
from pearl.engine.engine import Engine
from pearl.engine.judge import Judge
from pearl.engine.model_loading import LoadedModels
from pearl.engine.rounds import RoundRecord
from pearl.engine.scheduler import Scheduler
from pearl.engine.verifier import Verifier
from pearl.engine.warm_up import Side, warm_up
from pearl.errors import ConfigurationError
from pearl.heads import EagleHead
from pearl.heads.runner import HeadRunner
from pearl.kv import KVCacheManager
from pearl.methods import METHODS, Mode
from pearl.pace import AutoPace, BalancedPace, FixedPace, PacePolicy, PreparingPace, Sizes
from pearl.workers import HostQueue, InlineWorker, ModelRunner, TargetRunner, ThreadWorker, Worker


def connect(
    config: EngineConfig,
    models: LoadedModels,
    observer: Callable[[RoundRecord], None] | None = None,
    wrap_verifier: Callable[[Judge], Judge] | None = None,
    wrap_drafter: Callable[[Drafter], Drafter] | None = None,
) -> Engine:
    """An engine of its own bookkeeping, workers, drafter and method, around models that others may share.

    ``wrap_verifier`` puts something between the verifier and the engine: benchmarks script verdicts. ``wrap_drafter``
    likewise: other ways to draft are compared by benchmarks.
    """
    # One that the model has no row for can never be drawn, nor its logit be changed.
    eos_ids = frozenset(token for token in models.tokenizer.eos_ids if 0 <= token < models.vocab_size)
    drafter: Drafter | None = None
    draft_kv: KVCacheManager | None = None
    if config.uses_draft_model:
        drafter = _model_drafter(config, models, eos_ids)
        if not isinstance(drafter, MedusaDrafter):  # which keep no KV
            draft_kv = KVCacheManager(models.num_pages, config.page_size, config.prefix_caching)
    elif config.uses_draft:
        drafter = NGramDrafter()
    if drafter is not None and wrap_drafter is not None:
        drafter = wrap_drafter(drafter)
    most_prepared = config.most_prepared if drafter is not None and drafter.prepares else 0
    pace = build_pace(config, Sizes(max(1, models.target_bytes), models.draft_bytes), most_prepared)
    branches: Branches | None = None
    if most_prepared:
        branches = Branches(draft_kv, config.max_num_seqs, most_prepared, config.verification)
    scheduler = Scheduler(
        pace,
        KVCacheManager(models.num_pages, config.page_size, config.prefix_caching),
        draft_kv,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_waiting=config.max_waiting,
        max_logit_rows=config.max_logit_rows,
        prefill_chunk=config.resolve_prefill_chunk(),
        drafter_reads_history=drafter is not None and drafter.reads_history,
        drafter_reads_states=drafter is not None and bool(drafter.hidden_layers),
        branches=branches,
    )
    kernels, queue = models.target.kernels, models.target.queue
    draft = models.draft or models.head
    draft_queue = draft.queue if draft else None
    sends = draft_queue.aside("sends") if draft_queue else None
    verifier: Judge = Verifier(kernels, config.verification, models.vocab_size, eos_ids, queue, sends)
    if wrap_verifier is not None:
        verifier = wrap_verifier(verifier)
    draft_threads, _ = config.resolve_threads()
    inline = models.target.fused is not None or queue.asynchronous
    target_worker = InlineWorker(queue) if inline else ThreadWorker("target", config.target_torch_threads)
    draft_worker: Worker | None = None
    draft_alone: Worker | None = None
    if draft_queue is not None and draft_queue.asynchronous:
        draft_worker = InlineWorker(draft_queue)
    elif config.uses_draft:
        draft_worker = ThreadWorker("draft", draft_threads)
        # Nothing of it depends on the thread it runs on; and where the target's forwards do not keep this one busy, it
        # has something to do meanwhile.
        if target_worker.blocks and (draft is None or (models.draft is not None and models.draft.fused is not None)):
            draft_alone = InlineWorker(HostQueue(torch.device("cpu")))
    if config.capture_seconds:
        sides = [Side(target_worker, queue.device, models.target.captures())]
        if isinstance(drafter, ModelDrafter) and draft_worker is not None and draft_queue is not None:
            sides.append(Side(draft_worker, draft_queue.device, drafter.captures()))
        _warm_up(config, sides)
    target = TargetRunner(models.target)
    prepared = _preparations([runner for runner in (models.target, draft) if runner is not None])
    engine = Engine(
        scheduler, target, target_worker, drafter, draft_worker, verifier, pace, observer, draft_alone, prepared
    )
    for worker, there in ((draft_worker, draft_queue), (target_worker, queue)):
        if worker is not None and there is not None and there.asynchronous:
            # An engine that nobody closed may leave a round in flight: its memory must not become another's before.
            weakref.finalize(engine, worker.rest).atexit = False
    return engine


def _warm_up(config: EngineConfig, sides: Sequence[Side]) -> None:
    try:
        warm_up(sides, config.capture_seconds)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            "no memory was left to capture CUDA graphs; give kv_cache_memory, or less of it, or use enforce_eager=True"
        ) from error


def _model_drafter(
    config: EngineConfig, models: LoadedModels, eos_ids: frozenset[int]
) -> ModelDrafter | EagleDrafter | MedusaDrafter:
    """Around the draft model, or the head, that was loaded. ConfigurationError if none was."""
    ring = LogitsRing(config.max_num_seqs, config.largest_window, config.prepared_slots)
    common = config.verification, models.vocab_size, eos_ids, ring
    if models.draft is not None:
        return ModelDrafter(models.draft, *common)
    if models.head is None:
        raise ConfigurationError(f"method={config.method!r} needs a draft model, but none was loaded")
    if isinstance(models.head.model, EagleHead):
        return EagleDrafter(models.head, *common)
    return MedusaDrafter(models.head, *common)


def _preparations(runners: Sequence[ModelRunner | HeadRunner]) -> Callable[[], int]:
    """What tells how many graphs were captured and kernels compiled so far."""
    queues = [runner.queue for runner in runners]
    if all("triton" not in runner.kernels.providers.values() for runner in runners):
        return lambda: sum(queue.captured for queue in queues)
    from pearl_kernels.triton.compiled import count_compiled

    compiled = count_compiled()
    return lambda: sum(queue.captured for queue in queues) + compiled()


def build_pace(config: EngineConfig, sizes: Sizes, most_prepared: int = 0) -> PacePolicy:
    """What a method, pace, window and prepared windows mean; of these a round may have ``most_prepared``."""
    fixed = config.prepared_windows != "auto"
    pace = _window_pace(config, sizes, 0 if fixed else most_prepared)
    return PreparingPace(pace, most_prepared) if fixed and most_prepared else pace


def _window_pace(config: EngineConfig, sizes: Sizes, most_prepared: int) -> PacePolicy:
    mode = _own_mode(config)
    if not config.uses_draft:
        return FixedPace(mode, 1)
    if config.window != "auto":
        return FixedPace(mode, config.window)
    if config.pace == "balanced":
        return BalancedPace(mode, config.max_window, sizes)
    return AutoPace(tuple(METHODS) if mode == "pearl" else (mode,), config.max_window, sizes, most_prepared)


def _own_mode(config: EngineConfig) -> Mode:
    if config.method != "pearl":
        return config.method
    if config.pre_verify:
        return "pearl" if config.post_verify else "pre-verify-only"
    return "whole-windows" if config.post_verify else "speculative"
