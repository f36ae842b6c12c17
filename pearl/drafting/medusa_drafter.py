"""Medusa heads as drafter: all tokens of a window come from one hidden state of the target, each from its own head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pearl.drafting.head_drafter import HeadDrafter
from pearl.drafting.host_window import DraftedWindows
from pearl.drafting.lines import Line, windows_of
from pearl.drafting.logits_ring import LogitsRing, RingLayout
from pearl.drafting.own_states import OwnStates
from pearl.heads.medusa import MedusaHead
from pearl.heads.runner import HeadRunner
from pearl.host_tensors import from_numbers
from pearl.messages import DraftPlan, DraftWork
from pearl_kernels import Rule


class MedusaDrafter(HeadDrafter):
    """The token that comes after n drafted ones is head n's, whatever these are. So behind each state of the target
    there are as many as there are heads, pending ones among them; then none, until the target has moved on.
    """

    def __init__(
        self, runner: HeadRunner, rule: Rule, vocab_size: int, eos_ids: Collection[int], ring: LogitsRing
    ) -> None:
        super().__init__(runner, rule, vocab_size, eos_ids, ring)
        assert isinstance(runner.model, MedusaHead)
        self._model, shape = runner.model, runner.model.config.shape
        # Of each request the target's last state.
        self._states = OwnStates(RingLayout(ring.lanes, 1), shape.hidden, shape.dtype, runner.queue.device)

    def _draft(self, plan: DraftPlan) -> DraftedWindows:
        self._take(plan)
        work = [item for item in plan.work if item.num_draft]
        lines = {item.forward.state.request_id: self._line(item) for item in work}
        steps = self._grow(work, list(lines.values())) if work else 0
        return DraftedWindows(windows_of(lines), {}, steps)

    def _take(self, plan: DraftPlan) -> None:
        work = [item.forward for item in plan.work if item.forward.tokens]
        if work:
            assert plan.states is not None
            self._states.put(
                [self._states.place(item.state, item.end) for item in work], plan.states.of_ends(work)[:, 0]
            )

    def _line(self, item: DraftWork) -> Line:
        line = self._drawing.line(item)
        line.left = max(0, min(line.left, self._model.config.heads - len(item.pending or ())))
        return line

    def _grow(self, work: Sequence[DraftWork], lines: Sequence[Line]) -> int:
        """Returns how many heads were run: each takes as long as a forward of its own."""
        last = self._states.get([self._states.place(item.forward.state, item.forward.end) for item in work])
        states, heads = self._model.states(last), set[int]()
        following = [len(item.pending or ()) for item in work]  # the head of each one's next token
        free = [row for row, line in enumerate(lines) if not line.state.params.changes_logits]
        bound = [row for row, line in enumerate(lines) if line.state.params.changes_logits]
        if at_once := self._wanted(free, lines, following):
            logits = [self._model.logits(_rows(states[:, head], rows), head) for head, rows in at_once.items()]
            self._drawing.draw([lines[row] for rows in at_once.values() for row in rows], torch.cat(logits), 0)
            heads.update(at_once)
        for head, rows in self._wanted(bound, lines, following).items():  # each depends on the tokens before
            self._drawing.draw([lines[row] for row in rows], self._model.logits(_rows(states[:, head], rows), head), 0)
            heads.add(head)
        return len(heads)

    def _wanted(self, rows: Sequence[int], lines: Sequence[Line], following: Sequence[int]) -> Mapping[int, list[int]]:
        """By head, those of these rows whose line has a token of it to come."""
        wanted = {
            head: [row for row in rows if 0 <= head - following[row] < lines[row].left]
            for head in range(self._model.config.heads)
        }
        return {head: rows for head, rows in wanted.items() if rows}


def _rows(states: Tensor, rows: Sequence[int]) -> Tensor:
    return states[from_numbers(rows, torch.int64, states.device)]
