"""Setups as engines that answer prompts, built when they are first asked; and what an answer took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.evaluation.anatomy import Anatomy, TimedJudge
from bench.evaluation.guesses import GuessPool, ListeningJudge
from bench.evaluation.lookahead import LookaheadDrafter
from bench.evaluation.phrases import PhraseDrafter
from bench.evaluation.setups import PHRASE, Setup
from bench.roofline.generators import Contender, LeftOut, llama_cpp_contenders, transformers_contenders
from pearl.bench.measure import answered, collect_garbage
from pearl.config import EngineConfig
from pearl.devices import cpu_cores
from pearl.engine.judge import Judge
from pearl.engine.model_pair import model_paths
from pearl.engine.rounds import RoundRecord
from pearl.errors import ConfigurationError
from pearl.llm import LLM
from pearl.sampling_params import SamplingParams

_WARM_UP = 24  # tokens: what is done for the first time, and the first choices of a pace


@dataclass(frozen=True)
class Measured:
    """``first_seconds``: until each of the prompts had a token; None where the engine does not tell. rounds: of it
    too."""

    outputs: list[list[int]]
    seconds: float
    first_seconds: float | None = None
    anatomy: Anatomy | None = None
    rounds: Sequence[RoundRecord] = ()


Answer = Callable[[Sequence[list[int]], int], Measured]  # prompts, most tokens


class Entrants:
    """Around one LLM, whose weights its variants share. ``close`` ends all that were built, but not that one."""

    def __init__(self, first: LLM, ignore_eos: bool = False) -> None:
        self._first, self._ignore_eos = first, ignore_eos
        self._stack = ExitStack()
        self._built: dict[str, Answer] = {}
        self._transformers: list[Contender] = []

    def answer(self, setup: Setup, prompts: Sequence[list[int]], max_tokens: int) -> Measured:
        """The first time is a warm-up beside."""
        answer = self._built.get(setup.name)
        if answer is None:
            answer = self._built[setup.name] = self._build(setup)
            answer(prompts, min(max_tokens, _WARM_UP))
        collect_garbage()
        return answer(prompts, max_tokens)

    def _build(self, setup: Setup) -> Answer:
        if setup.engine.startswith("transformers"):
            return self._of_transformers(setup)
        if setup.engine == "llama.cpp":
            return self._of_llama_cpp()
        pool = GuessPool() if setup.guesses else None
        judges: list[TimedJudge] = []
        if setup.engine == "apart":
            options = {**vars(self._first.config), **setup.options, "max_num_seqs": setup.batch}
            llm = self._stack.enter_context(LLM(**options))
            return partial(self._answer, setup, llm, pool, judges)

        def listen(judge: Judge) -> Judge:
            judges.append(
                TimedJudge(judge if pool is None else ListeningJudge(judge, pool, self._first.models.vocab_size))
            )
            return judges[0]

        wrap = None
        if pool is not None:
            wrap = LookaheadDrafter.around(pool) if setup.guesses == "lookahead" else PhraseDrafter.around(pool, PHRASE)
        options = {"max_num_seqs": setup.batch, "max_window": EngineConfig().max_window, **setup.options}
        llm = self._first.variant(wrap_verifier=listen, wrap_drafter=wrap, **options)
        self._stack.callback(llm.close)
        return partial(self._answer, setup, llm, pool, judges)

    def _answer(
        self,
        setup: Setup,
        llm: LLM,
        pool: GuessPool | None,
        judges: Sequence[TimedJudge],
        prompts: Sequence[list[int]],
        max_tokens: int,
    ) -> Measured:
        if pool is not None:
            pool.clear()  # what an earlier run of the same prompt left would be cheating
        params = [self._params(setup, index, max_tokens) for index in range(len(prompts))]
        rounds: list[RoundRecord] = []
        llm.engine.observer = rounds.append
        for judge in judges:
            judge.verdicts.clear()
        begin, start = time.perf_counter(), time.monotonic()
        outputs = [output.outputs[0] for output in answered(llm.generate(list(prompts), params))]
        seconds = time.perf_counter() - begin
        llm.engine.rest()
        firsts = [output.metrics.first_token_at or start for output in outputs]
        anatomy = Anatomy.of(rounds, judges[0].verdicts) if judges else None
        return Measured([o.token_ids for o in outputs], seconds, max(firsts) - start, anatomy, rounds)

    def _params(self, setup: Setup, index: int, max_tokens: int) -> SamplingParams:
        """A seed where the answer must be another setup's; it would bind the rejection rule to other rounds."""
        seed = index if setup.temperature and setup.exact else None
        return SamplingParams(
            temperature=setup.temperature, max_tokens=max_tokens, ignore_eos=self._ignore_eos, seed=seed
        )

    def _of_transformers(self, setup: Setup) -> Answer:
        if not self._transformers:
            self._transformers = transformers_contenders(self._first, *model_paths(self._first.config), [cpu_cores()])
        plain, assisted = self._transformers
        return partial(_contend, assisted if setup.engine == "transformers assisted" else plain)

    def _of_llama_cpp(self) -> Answer:
        """ConfigurationError if it is not installed, or cannot run the target as it is run here."""
        if self._first.config.resolve_device("target").type != "cpu":
            raise ConfigurationError("llama.cpp is compared on CPUs")
        if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
            raise ConfigurationError("OMP_WAIT_POLICY=passive halves llama.cpp's speed, and not ours; unset it")
        target, _ = model_paths(self._first.config)
        found = llama_cpp_contenders(self._stack, self._first, target, [cpu_cores()])
        if isinstance(found, LeftOut):
            raise ConfigurationError(found.reason)
        return partial(_contend, found[0])

    def close(self) -> None:
        self._stack.close()


def _contend(contender: Contender, prompts: Sequence[list[int]], max_tokens: int) -> Measured:
    contender.run(list(prompts), max_tokens)
    run = contender.runs.pop()
    return Measured(run.tokens, run.seconds)


def share_of_target(llm: LLM) -> dict[str, Any] | str:
    """Options of an LLM that decodes plainly on what PEARL leaves its target, if that is less than all; or why not."""
    config = llm.config
    devices = {config.resolve_device(role).type for role in ("target", "draft")}
    if devices != {"cpu"}:
        return "the target has its devices to itself in every method"
    draft, target = config.resolve_threads()
    if not config.uses_draft_model or min(target, cpu_cores()) - draft < 1 or draft + target <= cpu_cores():
        return "the target has as many cores beside a draft as alone"
    return {"method": "autoregressive", "target_threads": cpu_cores() - draft}
