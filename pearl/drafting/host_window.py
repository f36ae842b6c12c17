"""Windows drafted step by step: each token is read by the host before the next forward begins."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pearl.drafting.lines import Drawing, windows_of
from pearl.drafting.logits_ring import LogitsRing
from pearl.messages import Branch, DraftPlan, DraftWork, ForwardWork, Windows
from pearl.workers import ModelRunner
from pearl_kernels import Rule, Stream


class DraftedWindows(NamedTuple):
    windows: Windows
    prepared: Windows
    steps: int  # forwards that they took


class HostWindows:
    """Of one drafter."""

    def __init__(
        self,
        runner: ModelRunner,
        rule: Rule,
        vocab_size: int,
        eos_ids: Collection[int],
        ring: LogitsRing,
        stream: Stream,
    ) -> None:
        self._runner, self._rule, self._ring = runner, rule, ring
        self._drawing = Drawing(runner.kernels, runner.queue, rule, vocab_size, eos_ids, ring, stream)

    def draft(self, plan: DraftPlan) -> DraftedWindows:
        """Windows of the items that draft, and of their branches. Copies of the plan are performed already, but for the
        late ones.
        """
        work = plan.work
        early = [(item, branch) for item in work for branch in item.branches if branch.token is not None]
        logits = self._runner.forward([item.forward for item in work] + [_first_work(*pair) for pair in early])
        main = {item.forward.state.request_id: self._drawing.line(item) for item in work if item.num_draft}
        prepared = {branch.id: self._drawing.branch(item, branch) for item, branch in early}
        active = [*main.values(), *prepared.values()]
        steps = 1
        if active:
            self._drawing.draw(active, logits, plan.alternatives)
            if late := [(item, branch) for item in work for branch in item.branches if branch.token is None]:
                self._runner.copy_pages(plan.late_copies)
                for item, branch in late:
                    first = main[item.forward.state.request_id].window[0]
                    prepared[branch.id] = self._drawing.branch(item, branch, first)
                    active.append(prepared[branch.id])
        while active := [line for line in active if line.left]:
            logits = self._runner.decode(
                [line.window[-1].token for line in active],
                [line.position - 1 for line in active],
                [line.block_table for line in active],
            )
            self._drawing.draw(active, logits, plan.alternatives)
            steps += 1
        return DraftedWindows(windows_of(main), windows_of(prepared), steps)


def _first_work(item: DraftWork, branch: Branch) -> ForwardWork:
    """What an early branch computes beside the items."""
    assert branch.token is not None
    return ForwardWork(item.forward.state, (branch.token,), branch.start, 1, branch.block_table)
