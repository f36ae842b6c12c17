"""What the server counts of the pace."""

from __future__ import annotations

import pytest

from pearl.engine.rounds import RoundRecord
from pearl.messages import Busy, Decision, DraftPlan, DraftProposal, SchedulerOutput, TargetPlan, VerifyResult
from pearl.pace import Pace
from pearl.serving.round_counts import RoundCounts


def round_of(pace: Pace | None, seconds: float, *committed: int) -> RoundRecord:
    """A request committed so many tokens each."""
    plan = SchedulerOutput(TargetPlan(()), DraftPlan(()), pace=pace)
    decisions = {index: Decision(tuple(range(n)), n, None, None) for index, n in enumerate(committed)}
    return RoundRecord(plan, DraftProposal(), Busy(0.0, 0.0), VerifyResult(decisions, {}), Busy(0.0, seconds))


def test_rounds_are_counted_by_what_the_pace_chose() -> None:
    counts = RoundCounts()
    counts(round_of(None, 5.0))
    assert counts.by_mode == {}
    counts(round_of(Pace("pearl", (4, 4), tokens_per_second=100.0), 0.02, 3, 1))
    counts(round_of(Pace("pearl", (4, 4), tokens_per_second=50.0), 0.04, 0, 2))
    counts(round_of(Pace("autoregressive", (1,)), 0.01, 1))
    assert counts.by_mode["pearl"] == pytest.approx((2, 0.06, 6, 4.0))
    assert counts.by_mode["autoregressive"] == pytest.approx((1, 0.01, 1, 0.0))
