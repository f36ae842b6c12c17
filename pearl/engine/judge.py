"""The interface between the engine and whatever decides about drafted tokens."""

from __future__ import annotations

from typing import Protocol

from pearl.messages import DraftProposal, SchedulerOutput, TargetOutput, VerifyResult


class Judge(Protocol):
    """``Verifier``, or something around it."""

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        """Decide for each item of plan.verify."""
        ...
