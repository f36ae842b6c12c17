"""Both models at their workers: how a round's plan reaches them, and what they answer comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from pearl.drafting import Drafter
from pearl.engine.rounds import InFlight
from pearl.messages import DraftPlan, DraftProposal, SchedulerOutput, TargetOutput, TargetPlan, TargetStates
from pearl.workers import Reply, TargetRunner, Worker


class ModelWorkers:
    """The target and, unless a method has none, the drafter; what a drafter reads of rounds before goes along."""

    def __init__(
        self,
        target: TargetRunner,
        target_worker: Worker,
        drafter: Drafter | None,
        draft_worker: Worker | None,
        draft_alone: Worker | None = None,
    ) -> None:
        """``draft_alone``: where the draft works in rounds without the target; None: where it always does."""
        self.target, self.target_worker = target, target_worker
        self.drafter, self.draft_worker = drafter, draft_worker
        self._draft_alone = draft_alone or draft_worker
        workers = (target_worker, draft_worker, self._draft_alone)
        self._may_overlap = not any(worker.blocks for worker in workers if worker is not None)
        # Pending tokens may be judged in a round without drafting: their rows are those of the latest proposal.
        self._latest = DraftProposal()
        self._states: TargetStates | None = None  # of the round before, for a drafter that reads them

    def can_overlap(self, plan: SchedulerOutput) -> bool:
        """Whether a round of this kind runs by itself."""
        return self._may_overlap and (self.drafter is None or not self.drafter.waits(plan.draft))

    @property
    def most_behind(self) -> int:
        """Tokens that the drafter computes at most where it only goes on."""
        return self.drafter.most_behind if self.drafter is not None else 0

    def submit(self, plan: SchedulerOutput, begin: float) -> InFlight:
        """Let both work. Whichever would keep this very thread busy comes last, or the other would begin after it."""
        target_first = self.drafter is not None and not self.target_worker.blocks and self.drafter.waits(plan.draft)
        target = self._submit_target(plan.target) if target_first else None
        draft = self._submit_draft(plan.draft, self.draft_worker if plan.target.work else self._draft_alone)
        return InFlight(plan, begin, draft, target or self._submit_target(plan.target))

    def collect(self, flight: InFlight) -> tuple[DraftProposal, TargetOutput]:
        """What the round found. Raises what went wrong in it, when both are at rest."""
        try:
            output = flight.target.result() if flight.target else TargetOutput(None)
        finally:  # both must be at rest before anyone touches their KV again
            proposal = flight.draft.result() if flight.draft else self._latest
        self._latest = DraftProposal(logits=proposal.logits, stored=proposal.stored)
        self._states = TargetStates.of(flight.plan.target, output.hidden)
        return proposal, output

    def _submit_target(self, plan: TargetPlan) -> Reply[TargetOutput] | None:
        return self.target_worker.submit(self.target.run, plan) if plan.work else None

    def _submit_draft(self, plan: DraftPlan, worker: Worker | None) -> Reply[DraftProposal] | None:
        if not plan.work:
            return None
        assert self.drafter is not None
        assert worker is not None
        if self._states is not None:
            plan = replace(plan, states=self._states)
        return worker.submit(self.drafter.propose, plan)

    def run_target(self, plan: TargetPlan) -> TargetOutput:
        """Compute a plan while the draft rests. A drafter that reads hidden states finds them in the next one."""
        reply = self._submit_target(plan)
        output = reply.result() if reply else TargetOutput(None)
        self.target_worker.rest()
        self._states = TargetStates.of(plan, output.hidden)
        return output

    def run_draft(self, plan: DraftPlan) -> DraftProposal:
        """Compute a plan while the target rests."""
        reply = self._submit_draft(plan, self.draft_worker)
        if reply is None or self.draft_worker is None:
            return DraftProposal()
        proposal = reply.result()
        self.draft_worker.rest()
        return proposal

    def give_up(self) -> Exception | None:
        """Wait until nothing is left of a round that failed. Returns what a device raises that failed for good."""
        self._states, fatal = None, None
        for worker in self._each():
            try:
                worker.rest()
            except Exception as error:  # at every wait
                fatal = fatal or error
        return fatal

    def close(self, at_work: bool) -> None:
        """End both. ``at_work``: a round is in flight; nobody waits for what it computes."""
        for worker in self._each():
            if at_work:
                with contextlib.suppress(Exception):
                    worker.rest()
            worker.close()

    def _each(self) -> Iterator[Worker]:
        return filter(None, (self.target_worker, self.draft_worker))
