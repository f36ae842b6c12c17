"""Medusa heads as drafter: all tokens of a window come from one hidden state of the target, each from its own head."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from pearl.drafting.lines import Drawing, Line, windows_of
from pearl.drafting.logits_ring import LogitsRing
from pearl.drafting.own_states import OwnStates
from pearl.heads.medusa import MedusaHead
from pearl.heads.runner import HeadRunner
from pearl.messages import DraftPlan, DraftProposal, DraftWork, Mark
from pearl_kernels import Rule, Stream


class MedusaDrafter:
    """The token that comes after n drafted ones is head n's, whatever these are. So behind each state of the target
    there are as many as there are heads, pending ones among them; then none, until the target has moved on.
    """

    reads_history = False
    prepares = False

    def __init__(
        self,
        runner: HeadRunner,
        rule: Rule,
        vocab_size: int,
        eos_ids: Collection[int],
        ring: LogitsRing,
    ) -> None:
        model = runner.model
        assert isinstance(model, MedusaHead)
        self._runner, self._model, self._ring = runner, model, ring
        config, queue = model.config, runner.queue
        stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
        self._drawing = Drawing(runner.kernels, queue, rule, vocab_size, eos_ids, ring, stream)
        self._last = OwnStates(ring.lanes, config.shape.hidden, config.shape.dtype, queue.device)
        self._stored: Mark | None = None
        self.hidden_layers: tuple[int, ...] = config.hidden_layers
        self.most_behind = ring.window + 2

    def propose(self, plan: DraftPlan) -> DraftProposal:
        stopwatch, queue = self._runner.stopwatch, self._runner.queue
        stopwatch.reset()
        stopwatch.start()
        self._take(plan)
        work = [item for item in plan.work if item.num_draft]
        lines = {item.forward.state.request_id: self._line(item) for item in work}
        steps = self._draft(work, list(lines.values()))
        if lines:
            self._stored = queue.mark()
        queue.mark().wait()  # the target's states are its own memory: it may write others when this returns
        return DraftProposal(windows_of(lines), self._ring.logits, steps, stopwatch.stop(), stored=self._stored)

    def waits(self, plan: DraftPlan) -> bool:
        return self._runner.queue.asynchronous

    def _take(self, plan: DraftPlan) -> None:
        """The target's last state of each request."""
        work = [item.forward for item in plan.work if item.forward.tokens]
        if not work:
            return
        assert plan.states is not None
        rows = [plan.states.at(item.state.request_id, item.end - 1, item.end)[:, 0] for item in work]
        self._last.put([item.state for item in work], [item.end for item in work], torch.cat(rows))

    def _line(self, item: DraftWork) -> Line:
        line = self._drawing.line(item)
        line.left = max(0, min(line.left, self._model.config.heads - len(item.pending or ())))
        return line

    def _draft(self, work: Sequence[DraftWork], lines: Sequence[Line]) -> int:
        """Returns how many heads were run: each takes as long as a forward of its own."""
        if not work:
            return 0
        model, steps = self._model, 0
        last = self._last.get([item.forward.state for item in work], [item.forward.end for item in work])
        following = [len(item.pending or ()) for item in work]  # the head of each one's next token
        for head in range(model.config.heads):
            rows = [row for row, line in enumerate(lines) if line.left and following[row] == head]
            if rows:
                self._drawing.draw([lines[row] for row in rows], model.logits(last[rows], head), 0)
                steps += 1
            for row in rows:
                following[row] += 1
        return steps
