"""An EAGLE-3 head as drafter: it follows the target's hidden states, and goes on from its own where there are none yet.

A round's first forward has, of each request, the rows whose target's states have come since the last one: they replace
what the head had made of drafted tokens. And, where tokens are pending, the row behind the last of them, from the state
that it was drawn from. Both in one, because keys and values are of a row's own input alone (``pearl.heads.eagle``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pearl.drafting.head_drafter import HeadDrafter
from pearl.drafting.lines import Line
from pearl.heads.eagle import EagleHead
from pearl.messages import DraftPlan, DraftWork, ForwardWork, TargetStates
from pearl.workers.model_runner import build_batch


class EagleDrafter(HeadDrafter):
    """It keeps what each request's next token is drawn from, by the position of that token."""

    @property
    def _model(self) -> EagleHead:
        model = self._runner.model
        assert isinstance(model, EagleHead)
        return model

    def _draft(self, plan: DraftPlan) -> tuple[Mapping[int, Line], int]:
        steps = self._begin(plan)
        lines = {item.forward.state.request_id: self._drawing.line(item) for item in plan.work if item.num_draft}
        return lines, max(steps, self._grow(list(lines.values())))

    def _begin(self, plan: DraftPlan) -> int:
        """Catch up; then there is an output for the next token of each item that drafts. Returns how many forwards."""
        behind = [item for item in plan.work if item.forward.tokens]
        ahead = [item for item in plan.work if item.num_draft and item.pending]
        if not behind and not ahead:
            return 0
        forwards = [item.forward for item in behind] + [_behind_pending(item) for item in ahead]
        features = [self._read(plan.states, forwards[: len(behind)])] if behind else []
        if ahead:
            features.append(self._states.get([item.forward.state for item in ahead], [i.position - 1 for i in ahead]))
        outputs = self._compute(forwards, torch.cat(features))
        # Where tokens are pending the next one is not behind the target's states, but behind them.
        kept = [place for place, work in enumerate(forwards) if place >= len(behind) or not behind[place].pending]
        ends = torch.tensor([len(work.tokens) for work in forwards]).cumsum(0) - 1
        rows = outputs[ends[kept].to(outputs.device)]
        self._states.put([forwards[i].state for i in kept], [forwards[i].end + 1 for i in kept], rows)
        return 1

    def _read(self, states: TargetStates | None, work: Sequence[ForwardWork]) -> Tensor:
        """Features ``[N, D]`` of the target's states at all positions of ``work``."""
        assert states is not None
        rows = torch.cat([states.at(item.state.request_id, item.start, item.end) for item in work])
        return self._model.features(rows)

    def _grow(self, lines: Sequence[Line]) -> int:
        """Returns how many tokens the longest line has got."""
        model, active, steps = self._model, list(lines), 0
        while active:
            states, positions = [line.state for line in active], [line.position for line in active]
            if steps:
                before = self._states.get(states, [position - 1 for position in positions])
                outputs = self._compute([_behind_line(line) for line in active], before)
                self._states.put(states, positions, outputs)
            self._drawing.draw(active, model.logits(self._states.get(states, positions)), 0)
            active, steps = [line for line in active if line.left], steps + 1
        return steps

    def _compute(self, work: Sequence[ForwardWork], features: Tensor) -> Tensor:
        runner = self._runner
        batch = build_batch(work, runner.page_size, runner.queue.device)
        return self._model.forward(batch, features, runner.cache)


def _behind_pending(item: DraftWork) -> ForwardWork:
    """The row of the last pending token."""
    assert item.pending
    return item.forward._replace(tokens=item.pending[-1:], start=item.position - 2)


def _behind_line(line: Line) -> ForwardWork:
    """The row of the last token drawn."""
    return ForwardWork(line.state, (line.window[-1].token,), line.position - 2, 0, line.block_table)
