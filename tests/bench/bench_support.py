"""Rounds made by hand, and an LLM that plays them: what a report says of them is known exactly."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pearl import SamplingParams
from pearl.engine.rounds import RoundRecord
from pearl.messages import (
    Busy,
    Decision,
    Drafted,
    DraftPlan,
    DraftProposal,
    DraftWork,
    ForwardWork,
    SchedulerOutput,
    SequenceState,
    TargetOutput,
    TargetPlan,
    VerifyResult,
)
from pearl.methods import Mode
from pearl.outputs import CompletionOutput, OutputDelta, RequestMetrics, RequestOutput
from pearl.pace import Pace

ROOT = Path(__file__).resolve().parents[2]
NOT_AT_WORK = Busy(0.0, 0.0)


def hand_made_round(
    number: int,
    *,
    whole: Busy,
    target: Busy = NOT_AT_WORK,
    draft: Busy = NOT_AT_WORK,
    drafted: int = 0,
    accepted: int = 0,
    own: bool = False,
    mode: Mode | None = None,
) -> RoundRecord:
    """One request's round; a model without busy time has no work. ``number`` is the start of its forwards."""
    state = SequenceState(0, 0, SamplingParams(), 0, 0, None)
    forward = ForwardWork(state, (1,), number, 1, (0,))
    plan = SchedulerOutput(
        TargetPlan((forward,) if target.seconds else ()),
        DraftPlan((DraftWork(forward, drafted),) if draft.seconds else ()),
        pace=None if mode is None else Pace(mode, (drafted,)),
    )
    windows = {0: tuple(Drafted(token, 0.0, -1) for token in range(drafted))} if draft.seconds else {}
    tested = tuple(range(accepted + own))
    decisions = {0: Decision(tested, accepted, 7 if own else None, None)} if accepted or own else {}
    return RoundRecord(plan, DraftProposal(busy=draft), target, VerifyResult(decisions, windows), whole)


@dataclass
class FakeEngine:
    """Forwards alone last what ``alone`` says: (target, draft) seconds by a round's number."""

    alone: Sequence[tuple[float, float]]
    observer: Callable[[RoundRecord], None] | None = None
    replayed: list[tuple[str, int]] = field(default_factory=list)

    def run_target(self, plan: TargetPlan) -> TargetOutput:
        if not plan.work:
            return TargetOutput(None)
        number = plan.work[0].start
        self.replayed.append(("target", number))
        return TargetOutput(None, Busy(0.0, self.alone[number][0]))

    def run_draft(self, plan: DraftPlan) -> DraftProposal:
        if not plan.work:
            return DraftProposal()
        number = plan.work[0].forward.start
        self.replayed.append(("draft", number))
        return DraftProposal(busy=Busy(0.0, self.alone[number][1]))


@dataclass
class Clock:
    now: float = 0.0
    calls: list[str] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now


@dataclass
class FakeLLM:
    """Each call of ``generate`` plays the next script: how long it lasts, its rounds and each output's metrics."""

    name: str
    clock: Clock
    engine: FakeEngine
    scripts: list[tuple[float, list[RoundRecord], list[RequestMetrics]]]

    def generate(
        self,
        prompts: Sequence[str],
        params: SamplingParams,
        on_output: Callable[[OutputDelta], None] | None = None,
    ) -> list[RequestOutput]:
        self.clock.calls.append(f"{self.name} {len(prompts)}")
        seconds, rounds, metrics = self.scripts.pop(0)
        self.clock.now += seconds
        for record in rounds:
            assert self.engine.observer is not None
            self.engine.observer(record)
        outputs = []
        for index, metric in enumerate(metrics):
            tokens = list(range(metric.output_tokens))
            outputs.append(RequestOutput("x", [1], [CompletionOutput(0, token_ids=tokens, metrics=metric)]))
            if on_output is not None:  # in two pieces, as a stream comes
                on_output(OutputDelta(index, tuple(tokens[:1]), (False,), "", None, None, metric))
                on_output(OutputDelta(index, tuple(tokens[1:]), (), "", None, "length", metric))
        return outputs


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


def run_script(
    name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Finished:
    """Run ``bench/NAME`` in this process as ``python bench/NAME ARGUMENTS`` would; other exceptions pass through."""
    monkeypatch.setattr(sys, "argv", [f"bench/{name}", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    code: int | str | None = 0
    try:
        runpy.run_path(str(ROOT / "bench" / name), run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code
    shown = capsys.readouterr()
    if isinstance(code, str):  # what the interpreter prints before it leaves with 1
        return Finished(1, shown.out, f"{shown.err}{code}\n")
    return Finished(code or 0, shown.out, shown.err)
