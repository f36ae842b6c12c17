"""Rounds of an engine whose models answer at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from bench.round_cost.instant import InstantDrafter, InstantTarget, Text
from bench.round_cost.stopwatch import MODELS, Stopwatch
from bench.round_latency.cell import cache_prompts
from pearl.bench.shapes import random_prompts
from pearl.choices import MethodName
from pearl.config import EngineConfig
from pearl.engine.model_loading import LoadedModels
from pearl.errors import RoundError
from pearl.llm import LLM
from pearl.outputs import OutputDelta
from pearl.sampling_params import SamplingParams

_WARM_UP = 8  # rounds


class Interrupted(Exception):
    """The user wants no more."""


class _Enough(Exception):
    pass


@dataclass(frozen=True)
class Load:
    """``batch`` requests of ``context`` tokens each, all of which are in the cache but the last."""

    method: MethodName
    batch: int
    context: int
    temperature: float
    window: int
    rounds: int
    acceptance: float

    @property
    def sampling(self) -> str:
        return "greedy" if self.temperature == 0 else "sampled"

    @property
    def max_tokens(self) -> int:
        """More than the rounds can commit, so that the batch stays full."""
        return (self.rounds + _WARM_UP + 1) * (self.window + 1)


@dataclass(frozen=True)
class Cost:
    """Of one round, medians over rounds: the host's microseconds in all, and those of each part."""

    us_per_round: float
    us_per_request: float
    parts: dict[str, float]


def measure(models: LoadedModels, config: EngineConfig, load: Load, stopped: Callable[[], bool]) -> Cost:
    """``models``: only their tokenizer and sizes matter. Raises Interrupted, or RoundError if the engine failed."""
    page = config.page_size
    length = -(-(load.context + load.max_tokens + 1) // page) * page
    config = replace(
        config, method=load.method, window=load.window, max_num_seqs=load.batch, max_waiting=load.batch,
        prefix_caching=True, max_model_len=length,
    )  # fmt: skip
    models = replace(models, max_model_len=length, num_pages=load.batch * length // page)
    with LLM.from_models(models, config) as llm:
        watch = Stopwatch()
        _put_in(llm, load, watch)
        return _cost(_laps(llm, load, watch, stopped), load.batch)


def _put_in(llm: LLM, load: Load, watch: Stopwatch) -> None:
    """Instant models into an engine, and the stopwatch around its parts."""
    engine, page = llm.engine, llm.config.page_size
    text = Text(llm.models.vocab_size, torch.bfloat16, load.acceptance)
    engine.workers.target = InstantTarget(text, page, watch)  # type: ignore[assignment]
    if engine.workers.drafter is not None:
        engine.workers.drafter = InstantDrafter(text, page, load.temperature > 0)
    verifier = engine._verifier
    kernels = verifier._kernels  # type: ignore[attr-defined]
    timed_kernels = replace(kernels, verify_numbers=watch.timed(MODELS, kernels.verify_numbers))
    verifier._kernels = timed_kernels  # type: ignore[attr-defined]
    for owner, method, part in (
        (engine.scheduler, "schedule", "schedule"),
        (verifier, "verify", "verify"),
        (engine.workers, "submit", "draft"),
        (engine.workers, "collect", "draft"),
        (engine, "_commit", "commit"),
        (engine._outbox, "write", "outputs"),
    ):
        setattr(owner, method, watch.timed(part, getattr(owner, method)))


def _laps(llm: LLM, load: Load, watch: Stopwatch, stopped: Callable[[], bool]) -> list[dict[str, float]]:
    prompts = random_prompts([load.context] * load.batch, llm.models.vocab_size)
    cached = (load.context - 1) // llm.config.page_size * llm.config.page_size
    for kv in filter(None, (llm.engine.scheduler.target_kv, llm.engine.scheduler.draft_kv)):
        cache_prompts(kv, prompts, cached)
    laps: list[dict[str, float]] = []
    run = llm._driver.round

    def round_and_lap() -> None:
        if stopped():
            raise Interrupted
        watch.lap()
        run()
        laps.append(watch.lap())
        if len(laps) == load.rounds + _WARM_UP:
            raise _Enough

    def look(delta: OutputDelta) -> None:
        if delta.error is not None:
            raise RoundError(delta.error)

    llm._driver.round = round_and_lap  # type: ignore[method-assign]
    params = [
        SamplingParams(temperature=load.temperature, max_tokens=load.max_tokens, ignore_eos=True, seed=seed)
        for seed in range(load.batch)
    ]
    with suppress(_Enough):
        llm.generate(prompts, params, look)
    return laps[_WARM_UP:]


def _cost(laps: list[dict[str, float]], batch: int) -> Cost:
    names = sorted({name for lap in laps for name in lap} - {MODELS})
    parts = {name: 1e6 * statistics.median(lap.get(name, 0.0) for lap in laps) for name in names}
    whole = 1e6 * statistics.median(sum(s for name, s in lap.items() if name != MODELS) for lap in laps)
    return Cost(whole, whole / batch, parts)
