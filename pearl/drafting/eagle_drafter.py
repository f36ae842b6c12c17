"""An EAGLE-3 head as drafter: it follows the target's hidden states, and goes on from its own where there are none yet.

A round's first forward has, of each request, the rows whose target's states have come since the last one: they replace
what the head had made of drafted tokens. And, where tokens are pending, the row behind the last of them, from the state
that it was drawn from. Both in one, because keys and values are of a row's own input alone (``pearl.heads.eagle``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pearl.drafting.lines import Drawing, Line, windows_of
from pearl.drafting.logits_ring import LogitsRing
from pearl.drafting.own_states import OwnStates
from pearl.heads.eagle import EagleHead
from pearl.heads.runner import HeadRunner
from pearl.messages import DraftPlan, DraftProposal, DraftWork, ForwardWork, Mark, TargetStates
from pearl.workers.model_runner import build_batch
from pearl_kernels import Rule, Stream


class EagleDrafter:
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
        assert isinstance(model, EagleHead)
        self._runner, self._model, self._ring = runner, model, ring
        config, queue = model.config, runner.queue
        stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
        self._drawing = Drawing(runner.kernels, queue, rule, vocab_size, eos_ids, ring, stream)
        # What each request's next token is drawn from, by the position of that token.
        self._outputs = OwnStates(ring.lanes, config.shape.hidden, config.shape.dtype, queue.device)
        self._stored: Mark | None = None
        self.hidden_layers: tuple[int, ...] = config.hidden_layers
        self.most_behind = ring.window + 2

    def propose(self, plan: DraftPlan) -> DraftProposal:
        stopwatch, queue = self._runner.stopwatch, self._runner.queue
        stopwatch.reset()
        self._runner.copy_pages(plan.copies)
        stopwatch.start()
        steps = self._begin(plan)
        lines = {item.forward.state.request_id: self._drawing.line(item) for item in plan.work if item.num_draft}
        if lines:
            steps = max(steps, self._draft(list(lines.values())))
            self._stored = queue.mark()
        queue.mark().wait()  # the target's states are its own memory: it may write others when this returns
        return DraftProposal(windows_of(lines), self._ring.logits, steps, stopwatch.stop(), stored=self._stored)

    def waits(self, plan: DraftPlan) -> bool:
        return self._runner.queue.asynchronous

    def _begin(self, plan: DraftPlan) -> int:
        """Catch up; then there is an output for the next token of each item that drafts. Returns how many forwards."""
        behind = [item for item in plan.work if item.forward.tokens]
        ahead = [item for item in plan.work if item.num_draft and item.pending]
        if not behind and not ahead:
            return 0
        forwards = [item.forward for item in behind] + [_behind_pending(item) for item in ahead]
        features = [self._read(plan.states, forwards[: len(behind)])] if behind else []
        if ahead:
            features.append(self._outputs.get([item.forward.state for item in ahead], [i.position - 1 for i in ahead]))
        outputs = self._compute(forwards, torch.cat(features))
        # Where tokens are pending the next one is not behind the target's states, but behind them.
        kept = [place for place, work in enumerate(forwards) if place >= len(behind) or not behind[place].pending]
        ends = torch.tensor([len(work.tokens) for work in forwards]).cumsum(0) - 1
        rows = outputs[ends[kept].to(outputs.device)]
        self._outputs.put([forwards[i].state for i in kept], [forwards[i].end + 1 for i in kept], rows)
        return 1

    def _read(self, states: TargetStates | None, work: Sequence[ForwardWork]) -> Tensor:
        """Features ``[N, D]`` of the target's states at all positions of ``work``."""
        assert states is not None
        rows = torch.cat([states.at(item.state.request_id, item.start, item.end) for item in work])
        return self._model.features(rows)

    def _draft(self, lines: Sequence[Line]) -> int:
        """Returns how many tokens the longest line has got."""
        model, active, steps = self._model, list(lines), 0
        while active:
            states, positions = [line.state for line in active], [line.position for line in active]
            if steps:
                before = self._outputs.get(states, [position - 1 for position in positions])
                outputs = self._compute([_behind_line(line) for line in active], before)
                self._outputs.put(states, positions, outputs)
            self._drawing.draw(active, model.logits(self._outputs.get(states, positions)), 0)
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
