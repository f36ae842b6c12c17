"""Rounds: in flight, and finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pearl.engine.branches import is_hit
from pearl.messages import DraftProposal, Interval, SchedulerOutput, TargetOutput, VerifyResult
from pearl.pace import MeasuredRound, Progressed
from pearl.workers import Reply


class InFlight(NamedTuple):
    """A round that the models are at work on. A reply is None where that model rests."""

    plan: SchedulerOutput
    begin: float  # of its planning, in time.perf_counter() seconds
    draft: Reply[DraftProposal] | None
    target: Reply[TargetOutput] | None


class RoundInterval(NamedTuple):
    """From a round's plan to its commit, without the time that a caller let pass between two steps when the models had
    done their part: how long a reader thinks about a token is not the round's.
    """

    begin: float
    end: float
    left: float  # when the step that began the round returned,
    back: float  # and when another one came for it
    work: tuple[Interval, Interval]  # of the two models

    @property
    def seconds(self) -> float:
        """Waits for the ends of ``work``."""
        done = max(interval.begin + interval.seconds for interval in self.work)
        return self.end - self.begin - max(0.0, self.back - max(self.left, done))


@dataclass(frozen=True)
class RoundRecord:
    """One finished round, for observers: benchmarks, timelines, metrics."""

    plan: SchedulerOutput
    proposal: DraftProposal
    target: Interval
    result: VerifyResult
    whole: Interval
    preparations: int = 0  # graphs captured and kernels compiled on the way: such a round takes longer, but once


@dataclass(frozen=True)
class EngineStats:
    """Since the engine was built."""

    rounds: int = 0
    preparations: int = 0  # graphs captured and kernels compiled in them: more than a few means that shapes thrash


def measured(record: RoundRecord) -> MeasuredRound:
    """What a pace learns from a round that only decoded. Of requests that are not drafted for it is told the rows."""
    plan, proposal = record.plan, record.proposal
    assert plan.pace is not None
    assert plan.load is not None
    plain = {work.state.request_id for work in plan.target.work if not work.state.params.draft}
    prepared, rejections, hit = _prepared(record) if plan.pace.branches else (0, 0, 0)
    # A draft that only catches up, as a head does with every token, is part of what plain rounds cost.
    drafts = any(work.num_draft for work in plan.draft.work)
    return MeasuredRound(
        mode=plan.pace.mode,
        load=plan.load,
        target_rows=sum([len(w.tokens) for w in plan.target.work]),
        target_seconds=record.target.seconds,
        draft_sequences=len(plan.draft.work) + prepared if drafts else 0,
        draft_steps=max(1, proposal.steps),
        draft_seconds=proposal.busy.seconds if drafts else 0.0,
        seconds=record.whole.seconds,
        requests=tuple(
            [
                Progressed(request_id, len(d.tested), d.accepted, len(d.committed))
                for request_id, d in record.result.decisions.items()
                if request_id not in plain
            ]
        ),
        prepared=prepared,
        rejections=rejections,
        hits=hit,
    )


def hits(record: RoundRecord) -> dict[int, int]:
    """By request id: tokens of the prepared window that it goes on with."""
    found = {}
    for item in record.plan.draft.work:
        request_id = item.forward.state.request_id
        decision = record.result.decisions.get(request_id)
        if decision is None:
            continue
        for branch in item.branches:
            window = record.result.prepared.get(branch.id, ())
            if is_hit(branch, window, decision):  # the first one is taken
                found[request_id] = len(window) - 1
                break
    return found


def _prepared(record: RoundRecord) -> tuple[int, int, int]:
    """Windows that were prepared; verdicts that rejected where one might have been; and those that found theirs."""
    prepared = rejections = 0
    for item in record.plan.draft.work:
        decision = record.result.decisions.get(item.forward.state.request_id)
        prepared += len(item.branches)
        if decision is not None and item.num_draft and decision.rejected:
            rejections += 1
    return prepared, rejections, len(hits(record))
