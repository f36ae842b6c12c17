"""An EAGLE-3 head's windows drafted step by step: each token is read by the host before the next forward begins."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pearl.drafting.eagle_first import FirstForward
from pearl.drafting.host_window import DraftedWindows
from pearl.drafting.lines import Drawing, Line, windows_of
from pearl.drafting.own_states import OwnStates, Place
from pearl.heads.eagle import EagleHead
from pearl.heads.runner import HeadRunner
from pearl.messages import DraftPlan, ForwardWork
from pearl.workers.model_runner import build_batch


class EagleSteps:
    """Of one drafter."""

    def __init__(self, runner: HeadRunner, model: EagleHead, drawing: Drawing, states: OwnStates) -> None:
        self._runner, self._model, self._drawing, self._states = runner, model, drawing, states

    def draft(self, plan: DraftPlan, first: FirstForward) -> DraftedWindows:
        if first.forwards:
            first.keep(first.drawn_from(), self._compute(first.forwards, first.features), self._states)
        main = {item.forward.state.request_id: self._drawing.line(item) for item in plan.work if item.num_draft}
        prepared: dict[int, Line] = {}
        active, steps = list(main.values()), 0
        while active:
            if steps:
                features = self._states.get([self._place(line, line.position - 1) for line in active])
                outputs = self._compute([_behind_line(line) for line in active], features)
                self._states.put([self._place(line, line.position) for line in active], outputs)
            drawn_from = self._states.get([self._place(line, line.position) for line in active])
            self._drawing.draw(active, self._model.logits(drawn_from), plan.alternatives)
            if not steps:
                prepared = self._branches(plan, main)
                active += prepared.values()
            active, steps = [line for line in active if line.left], steps + 1
        return DraftedWindows(windows_of(main), windows_of(prepared), max(steps, int(bool(first.forwards))))

    def _branches(self, plan: DraftPlan, main: dict[int, Line]) -> dict[int, Line]:
        """They begin where the state is that their own token might have been drawn from."""
        self._runner.copy_pages(plan.late_copies)
        work = [(item, branch) for item in plan.work for branch in item.branches]
        lines = {
            branch.id: self._drawing.branch(item, branch, main[item.forward.state.request_id].window[0])
            for item, branch in work
        }
        begun = [(item.forward.state, branch) for item, branch in work if lines[branch.id].window]
        if begun:
            parents = self._states.get([self._states.place(state, branch.start) for state, branch in begun])
            self._states.put([self._states.place(state, branch.start, branch.slot) for state, branch in begun], parents)
        return lines

    def _place(self, line: Line, position: int) -> Place:
        return self._states.place(line.state, position, line.slot)

    def _compute(self, work: Sequence[ForwardWork], features: Tensor) -> Tensor:
        runner = self._runner
        batch = build_batch(work, runner.page_size, runner.queue.device)
        return self._model.forward(batch, features, runner.cache)


def _behind_line(line: Line) -> ForwardWork:
    """The row of the last token drawn."""
    return ForwardWork(line.state, (line.window[-1].token,), line.position - 2, 0, line.block_table)
