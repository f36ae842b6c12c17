"""Medusa heads as drafter: all tokens of a window come from one hidden state of the target, each from its own head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pearl.drafting.head_drafter import HeadDrafter
from pearl.drafting.lines import Line
from pearl.heads.medusa import MedusaHead
from pearl.messages import DraftPlan, DraftWork


class MedusaDrafter(HeadDrafter):
    """The token that comes after n drafted ones is head n's, whatever these are. So behind each state of the target
    there are as many as there are heads, pending ones among them; then none, until the target has moved on.
    """

    @property
    def _model(self) -> MedusaHead:
        model = self._runner.model
        assert isinstance(model, MedusaHead)
        return model

    def _draft(self, plan: DraftPlan) -> tuple[Mapping[int, Line], int]:
        self._take(plan)
        work = [item for item in plan.work if item.num_draft]
        lines = {item.forward.state.request_id: self._line(item) for item in work}
        return lines, self._grow(work, list(lines.values()))

    def _take(self, plan: DraftPlan) -> None:
        """The target's last state of each request."""
        work = [item.forward for item in plan.work if item.forward.tokens]
        if not work:
            return
        assert plan.states is not None
        rows = [plan.states.at(item.state.request_id, item.end - 1, item.end)[:, 0] for item in work]
        self._states.put([item.state for item in work], [item.end for item in work], torch.cat(rows))

    def _line(self, item: DraftWork) -> Line:
        line = self._drawing.line(item)
        line.left = max(0, min(line.left, self._model.config.heads - len(item.pending or ())))
        return line

    def _grow(self, work: Sequence[DraftWork], lines: Sequence[Line]) -> int:
        """Returns how many heads were run: each takes as long as a forward of its own."""
        if not work:
            return 0
        model, steps = self._model, 0
        last = self._states.get([item.forward.state for item in work], [item.forward.end for item in work])
        following = [len(item.pending or ()) for item in work]  # the head of each one's next token
        for head in range(model.config.heads):
            rows = [row for row, line in enumerate(lines) if line.left and following[row] == head]
            if rows:
                self._drawing.draw([lines[row] for row in rows], model.logits(last[rows], head), 0)
                steps += 1
            for row in rows:
                following[row] += 1
        return steps
