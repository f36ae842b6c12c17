"""The scheduler, with every plan checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from late_worker import LateWorker

from pearl.engine.request import Request, Status
from pearl.engine.scheduler import Scheduler
from pearl.messages import Branch, DraftWork, SchedulerOutput


class CheckedScheduler(Scheduler):
    """Checks every plan before anyone works on it. Keeps what was committed of every request."""

    workers: Sequence[LateWorker] = ()
    planned: Mapping[int, list[int]]  # committed and pending tokens of each request, at the latest plan

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.texts: dict[int, tuple[int, ...]] = {}

    def update(self, request: Request, *of_round: Any) -> tuple[int, ...]:
        committed = super().update(request, *of_round)
        self.texts[request.id] = tuple(request.tokens)
        return committed

    def schedule(self) -> SchedulerOutput:
        assert not any(worker.is_busy for worker in self.workers), "pages may move while they are written to"
        plan = super().schedule()
        self.planned = {r.id: [*r.tokens, *(d.token for d in r.pending)] for r in self.requests.values()}
        target = {item.state.request_id: item for item in plan.target.work}
        draft = {item.forward.state.request_id: item for item in plan.draft.work}
        assert len(target) == len(plan.target.work), "planned twice"
        assert len(draft) == len(plan.draft.work), "planned twice"
        assert not set(plan.preempted) & (target.keys() | draft.keys()), "preempted after it was planned"
        assert len({r.lane for r in self.running}) == len(self.running)
        for work in plan.verify:
            request, forward = self.requests[work.request_id], target[work.request_id]
            bonus = not request.pinned or work.request_id in draft or request.draft_is_dry
            assert forward.num_logits == min(len(request.pending) + bonus, request.remaining)
            assert forward.end == request.length + forward.num_logits - 1
            assert work.request_id not in draft or draft[work.request_id].num_draft, "decided before the draft is ready"
        for request_id, forward in target.items():
            request = self.requests[request_id]
            assert forward.start == request.target_computed
            assert request.status is Status.RUNNING
            assert forward.num_logits or forward.end < request.length, "computed without judging"
        for request_id, item in draft.items():
            request = self.requests[request_id]
            assert item.forward.start == request.draft_computed
            assert request.status is Status.RUNNING
            assert request.params.draft
            assert item.num_draft <= request.remaining - len(request.pending)
            if item.num_draft and self.draft_kv:
                assert item.forward.end == request.length + len(request.pending)
            assert item.branches == request.branches
            assert len({(b.held, b.rank) for b in item.branches}) == len(item.branches)
            for branch in item.branches:
                self._check_branch(request, item, branch)
        assert sum(len(item.branches) for item in plan.draft.work) <= (plan.pace.branches if plan.pace else 0)
        return plan

    @staticmethod
    def _check_branch(request: Request, item: DraftWork, branch: Branch) -> None:
        k = len(request.pending)
        assert branch.start == request.length + branch.held
        assert branch.num_draft in range(1, request.remaining - branch.held)
        assert branch.token is None if branch.held == k else branch.token != request.pending[branch.held].token
        if item.forward.block_table:
            assert branch.held == k or branch.start <= item.forward.start
