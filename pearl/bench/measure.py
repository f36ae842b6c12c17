"""Runs methods side by side on one pair and measures them: medians of interleaved runs, and efficiency by replay."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from pearl.engine.engine import RoundRecord
from pearl.llm import LLM, Prompt
from pearl.outputs import RequestOutput
from pearl.sampling_params import SamplingParams


@dataclass(frozen=True)
class MethodResult:
    """One row of the report. ``tokens`` are returned tokens of one run; ``seconds`` the median of ``runs``."""

    method: str
    tokens: int
    seconds: float
    tok_s: float
    speedup: float  # over the first method of the report
    mean_accepted_tokens: float
    acceptance_rate: float
    window: float  # median of the windows drafted
    target_forwards: int
    draft_forwards: int
    efficiency: float
    runs: int


@dataclass(frozen=True)
class _Run:
    seconds: float
    outputs: list[RequestOutput]
    rounds: list[RoundRecord]
    efficiency: float


@dataclass
class _Contender:
    name: str
    llm: LLM
    rounds: list[RoundRecord] = field(default_factory=list)  # of the run in progress
    runs: list[_Run] = field(default_factory=list)

    def run(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], advance: Callable[[], None]) -> None:
        self.rounds.clear()
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, params, on_output=lambda d: advance() if d.finish_reason else None)
        seconds = time.perf_counter() - begin
        rounds = list(self.rounds)
        # At once, so that the machine is in the same mood.
        ideal = replay_alone(self.llm, rounds)
        self.runs.append(_Run(seconds, outputs, rounds, ideal / sum(record.whole.seconds for record in rounds)))
        advance()

    @property
    def median_run(self) -> _Run:
        return sorted(self.runs, key=lambda run: run.seconds)[(len(self.runs) - 1) // 2]


def replay_alone(llm: LLM, rounds: Sequence[RoundRecord]) -> float:
    """Seconds that the rounds would take if each lasted exactly the longer of its two forwards.

    Every forward is computed again, alone, in the order it happened: the same tokens into the same pages. The LLM
    must have been idle since, and must not cache prefixes.
    """
    return sum(max(seconds_alone(llm, record)) for record in rounds)


def seconds_alone(llm: LLM, record: RoundRecord) -> tuple[float, float]:
    """What the target's and the draft's forward of a round take, each computed again while the other model rests."""
    target = llm.engine.run_target(record.plan.target).busy.seconds
    return target, llm.engine.run_draft(record.plan.draft).busy.seconds


def compare(
    contenders: dict[str, LLM],
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    repeats: int,
    advance: Callable[[str], None],
    ended: Callable[[list[MethodResult]], None] = lambda results: None,
) -> list[MethodResult]:
    """Run every contender ``repeats`` times, in turns; the first one is the baseline of ``speedup``.

    prompts: texts or token ids. params: one for all, or one for each prompt.
    ``advance(name)`` is called after each finished output and after each run's replay, ``ended(results)`` after each
    run with what all runs until then say; a method that has none yet is missing there.
    """
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    field_ = [_Contender(name, llm) for name, llm in contenders.items()]
    for contender in field_:
        contender.llm.engine.observer = contender.rounds.append
        contender.llm.generate(prompts[:1], every[:1])  # warm up: first-use costs, and the automatic window
    for repeat in range(repeats):
        for contender in field_ if repeat % 2 == 0 else field_[::-1]:
            contender.run(prompts, every, partial(advance, contender.name))
            ended(_results(field_))
    return _results(field_)


def _results(contenders: Sequence[_Contender]) -> list[MethodResult]:
    """The first contender is also the first that has run."""
    results: list[MethodResult] = []
    for contender in contenders:
        if contender.runs:
            results.append(_summarise(contender, results[0].tok_s if results else None))
    return results


def _summarise(contender: _Contender, baseline: float | None) -> MethodResult:
    outputs, rounds = contender.median_run.outputs, contender.median_run.rounds
    metrics = [completion.metrics for output in outputs for completion in output.outputs]
    tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    seconds = statistics.median(run.seconds for run in contender.runs)
    speed = statistics.median(_tokens(run.outputs) / run.seconds for run in contender.runs)
    tested, runs = sum(m.tested for m in metrics), sum(m.runs for m in metrics)
    accepted = sum(m.accepted for m in metrics)
    windows = [len(window) for record in rounds for window in record.result.windows.values()]
    return MethodResult(
        method=contender.name,
        tokens=tokens,
        seconds=seconds,
        tok_s=speed,
        speedup=speed / (baseline or speed),
        mean_accepted_tokens=accepted / runs if runs else 0.0,
        acceptance_rate=accepted / tested if tested else 0.0,
        window=statistics.median(windows) if windows else 0.0,
        target_forwards=sum(m.target_forwards for m in metrics),
        draft_forwards=sum(m.draft_forwards for m in metrics),
        efficiency=statistics.median(run.efficiency for run in contender.runs),
        runs=len(contender.runs),
    )


def _tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
