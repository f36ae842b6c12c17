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
from pearl.engine.model_workers import ModelWorkers
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
from pearl.workers import DeviceQueue, HostQueue, InlineWorker, ModelRunner, TargetRunner, ThreadWorker, Worker


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
    drafter = _drafter(config, models, eos_ids)
    keeps_kv = config.uses_draft_model and not isinstance(drafter, MedusaDrafter)
    if drafter is not None and wrap_drafter is not None:
        drafter = wrap_drafter(drafter)
    most_prepared = config.most_prepared if drafter is not None and drafter.prepares else 0
    pace = build_pace(config, Sizes(max(1, models.target_bytes), models.draft_bytes), most_prepared)
    scheduler = _scheduler(config, models.num_pages, pace, drafter, keeps_kv, most_prepared)
    verifier = _verifier(config, models, eos_ids)
    if wrap_verifier is not None:
        verifier = wrap_verifier(verifier)
    workers = _workers(config, models, drafter)
    if config.capture_seconds:
        _warm_up(config, models, workers)
    runners = [runner for runner in (models.target, models.draft or models.head) if runner is not None]
    engine = Engine(scheduler, workers, verifier, pace, observer, _preparations(runners))
    _rest_at_the_end(engine, models)
    return engine


def _drafter(config: EngineConfig, models: LoadedModels, eos_ids: frozenset[int]) -> Drafter | None:
    if config.uses_draft_model:
        return _model_drafter(config, models, eos_ids)
    return NGramDrafter() if config.uses_draft else None


def _scheduler(
    config: EngineConfig,
    num_pages: int,
    pace: PacePolicy,
    drafter: Drafter | None,
    drafter_keeps_kv: bool,
    most_prepared: int,
) -> Scheduler:
    """With the bookkeeping of both models' KV, and of the windows that the drafter prepares, if it may any."""

    def pages() -> KVCacheManager:
        return KVCacheManager(num_pages, config.page_size, config.prefix_caching)

    draft_kv = pages() if drafter_keeps_kv else None
    branches: Branches | None = None
    if most_prepared:
        shift = int(drafter is not None and bool(drafter.hidden_layers))
        branches = Branches(draft_kv, config.max_num_seqs, most_prepared, config.verification, shift=shift)
    return Scheduler(
        pace,
        pages(),
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


def _verifier(config: EngineConfig, models: LoadedModels, eos_ids: frozenset[int]) -> Judge:
    draft_queue = _draft_queue(models)
    sends = draft_queue.aside("sends") if draft_queue else None
    target = models.target
    return Verifier(target.kernels, config.verification, models.vocab_size, eos_ids, target.queue, sends)


def _draft_queue(models: LoadedModels) -> DeviceQueue | None:
    draft = models.draft or models.head
    return draft.queue if draft else None


def _workers(config: EngineConfig, models: LoadedModels, drafter: Drafter | None) -> ModelWorkers:
    queue, draft_queue = models.target.queue, _draft_queue(models)
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
        own = models.draft or models.head
        if target_worker.blocks and (own is None or own.fused is not None):
            draft_alone = InlineWorker(HostQueue(torch.device("cpu")))
    return ModelWorkers(TargetRunner(models.target), target_worker, drafter, draft_worker, draft_alone)


def _rest_at_the_end(engine: Engine, models: LoadedModels) -> None:
    """An engine that nobody closed may leave a round in flight: its memory must not become another's before."""
    workers = engine.workers
    for worker, queue in ((workers.draft_worker, _draft_queue(models)), (workers.target_worker, models.target.queue)):
        if worker is not None and queue is not None and queue.asynchronous:
            weakref.finalize(engine, worker.rest).atexit = False


def _warm_up(config: EngineConfig, models: LoadedModels, workers: ModelWorkers) -> None:
    sides = [Side(workers.target_worker, models.target.queue.device, models.target.captures())]
    drafter, draft_queue = workers.drafter, _draft_queue(models)
    if isinstance(drafter, ModelDrafter) and workers.draft_worker is not None and draft_queue is not None:
        sides.append(Side(workers.draft_worker, draft_queue.device, drafter.captures()))
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
