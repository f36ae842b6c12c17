"""A round's plan while it is built."""

from __future__ import annotations

from pearl.engine.branches import Drafting, DraftParts
from pearl.kv import PageCopy
from pearl.messages import ForwardWork, PromptRows, SchedulerOutput, TargetPlan, VerifyWork
from pearl.pace import Load, Pace


class RoundPlan:
    """Becomes an immutable SchedulerOutput."""

    def __init__(self, pace: Pace, load: Load | None) -> None:
        self.pace, self.load = pace, load
        # Tokens that a model may compute of what it lacks, by request id; without an entry, none.
        self.target_shares: dict[int, int] = {}
        self.draft_shares: dict[int, int] = {}
        self.target: list[ForwardWork] = []
        self.draft = DraftParts()
        self.verify: list[VerifyWork] = []
        self.target_copies: list[PageCopy] = []
        self.prompts: list[PromptRows] = []
        self.drafting: list[Drafting] = []
        self.preempted: list[int] = []

    def freeze(self) -> SchedulerOutput:
        return SchedulerOutput(
            TargetPlan(tuple(self.target), tuple(self.target_copies), tuple(self.prompts)),
            self.draft.freeze(alone=not self.target),
            tuple(self.verify),
            tuple(self.preempted),
            self.pace,
            self.load,
        )
