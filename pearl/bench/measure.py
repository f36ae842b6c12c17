"""Runs methods side by side on one pair and measures them: medians of interleaved runs, and efficiency by replay."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from pearl.engine.rounds import RoundRecord
from pearl.errors import RoundError
from pearl.llm import LLM, Prompt
from pearl.methods import Mode
from pearl.outputs import RequestOutput
from pearl.sampling_params import SamplingParams


@dataclass(frozen=True)
class MethodResult:
    """One row of the report. ``tokens`` are returned tokens of one run; ``seconds`` the median of ``runs``.

    spread: of the runs' tokens per second, the interquartile range over the median; None of a single run. modes: the
    share of the rounds that each mode had (``pearl.methods``), the most frequent one first. speeds: the runs' tok_s, in
    the order of the repeats, in each of which all contenders ran in turns.
    """

    method: str  # or a contender's name: pearl@4
    batch: int  # requests that ran at once, at most
    prompts: int
    tokens: int
    seconds: float
    tok_s: float
    spread: float | None
    speedup: float  # over the first one at the same batch
    mean_accepted_tokens: float
    acceptance_rate: float
    window: float  # median of the windows drafted
    modes: dict[Mode, float]
    target_forwards: int
    draft_forwards: int
    efficiency: float
    runs: int
    prepared: int = 0  # windows drafted ahead for a verdict that might come,
    prepared_hits: int = 0  # those whose verdict came,
    prepared_accepted: float = 0.0  # and the share of all accepted tokens that these drafted
    speeds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    seconds: float
    outputs: list[RequestOutput]
    window: float
    modes: Counter[Mode]  # rounds of each
    efficiency: float

    @property
    def tok_s(self) -> float:
        return _tokens(self.outputs) / self.seconds


def answered(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """They themselves. Raises RoundError if the engine gave one up: a measurement would take it for a short answer."""
    for output in outputs:
        if errors := [one.error for one in output.outputs if one.error is not None]:
            raise RoundError(f"an answer was given up: {errors[0]}")
    return outputs


@dataclass
class _Contender:
    name: str
    llm: LLM
    rounds: list[RoundRecord] = field(default_factory=list)  # of the run in progress
    runs: list[_Run] = field(default_factory=list)

    def run(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], advance: Callable[[], None]) -> None:
        self.rounds.clear()
        collect_garbage()
        begin = time.perf_counter()
        outputs = answered(
            self.llm.generate(prompts, params, on_output=lambda d: advance() if d.finish_reason else None)
        )
        seconds = time.perf_counter() - begin
        # At once, so that the machine is in the same mood.
        ideal = replay_alone(self.llm, self.rounds)
        windows = [len(window) for record in self.rounds for window in record.result.windows.values()]
        modes = Counter(record.plan.pace.mode for record in self.rounds if record.plan.pace is not None)
        efficiency = ideal / sum(record.whole.seconds for record in self.rounds)
        self.runs.append(_Run(seconds, outputs, statistics.median(windows or [0.0]), modes, efficiency))
        self.rounds.clear()  # those of all contenders' runs would fill the memory
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
    """What the target's and the draft's forward of a round take, each computed again while the other model rests.

    The draft's first: a head reads what the target left in the round before.
    """
    draft = llm.engine.run_draft(record.plan.draft).busy.seconds
    return llm.engine.run_target(record.plan.target).busy.seconds, draft


def compare(
    contenders: dict[str, LLM],
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    repeats: int,
    advance: Callable[[str], None],
    ended: Callable[[list[MethodResult]], None] = lambda results: None,
    batch: int = 1,
) -> list[MethodResult]:
    """Run every contender ``repeats`` times, in turns; the first one is the baseline of ``speedup``.

    prompts: texts or token ids, submitted at once. params: one for all, or one for each prompt. batch: how many of
    them the contenders run at once.
    ``advance(name)`` is called after each finished output and after each run's replay, ``ended(results)`` after each
    run with what all runs until then say; a method that has none yet is missing there.
    """
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    field_ = [_Contender(name, llm) for name, llm in contenders.items()]
    for contender in field_:
        contender.llm.engine.observer = contender.rounds.append
        # Warm up: the first-use costs of such a batch, and what the pace measures.
        contender.llm.generate(prompts[:batch], every[:batch])
    try:
        for repeat in range(repeats):
            for contender in field_ if repeat % 2 == 0 else field_[::-1]:
                contender.run(prompts, every, partial(advance, contender.name))
                ended(_results(field_, batch))
    finally:
        gc.unfreeze()
    return _results(field_, batch)


def collect_garbage() -> None:
    """Python's garbage now, so that no run looks through all that was imported, which takes a tenth of a second."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _results(contenders: Sequence[_Contender], batch: int) -> list[MethodResult]:
    """The first contender is also the first that has run."""
    results: list[MethodResult] = []
    for contender in contenders:
        if contender.runs:
            results.append(_summarise(contender, batch, results[0].tok_s if results else None))
    return results


def _summarise(contender: _Contender, batch: int, baseline: float | None) -> MethodResult:
    typical = contender.median_run
    metrics = [completion.metrics for output in typical.outputs for completion in output.outputs]
    speeds = [run.tok_s for run in contender.runs]
    speed = statistics.median(speeds)
    tested, runs = sum(m.tested for m in metrics), sum(m.runs for m in metrics)
    accepted = sum(m.accepted for m in metrics)
    return MethodResult(
        method=contender.name,
        batch=batch,
        prompts=len(typical.outputs),
        tokens=_tokens(typical.outputs),
        seconds=statistics.median(run.seconds for run in contender.runs),
        tok_s=speed,
        spread=_interquartile_range(speeds) / speed if len(speeds) > 1 and speed else None,
        speedup=speed / (baseline or speed or 1.0),
        mean_accepted_tokens=accepted / runs if runs else 0.0,
        acceptance_rate=accepted / tested if tested else 0.0,
        window=typical.window,
        modes={mode: rounds / sum(typical.modes.values()) for mode, rounds in typical.modes.most_common()},
        target_forwards=sum(m.target_forwards for m in metrics),
        draft_forwards=sum(m.draft_forwards for m in metrics),
        efficiency=statistics.median(run.efficiency for run in contender.runs),
        runs=len(contender.runs),
        prepared=sum(m.prepared for m in metrics),
        prepared_hits=sum(m.prepared_hits for m in metrics),
        prepared_accepted=sum(m.prepared_accepted for m in metrics) / accepted if accepted else 0.0,
        speeds=speeds,
    )


def _interquartile_range(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
