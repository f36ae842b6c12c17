"""What drafters around a head share: a round, from the target's states to windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from pearl.drafting.lines import Drawing, Line, windows_of
from pearl.drafting.logits_ring import LogitsRing
from pearl.drafting.own_states import OwnStates
from pearl.heads.runner import HeadRunner
from pearl.messages import DraftPlan, DraftProposal, Mark
from pearl_kernels import Rule, Stream


class HeadDrafter(ABC):
    """See ``Drafter``."""

    reads_history = False
    prepares = False

    def __init__(
        self, runner: HeadRunner, rule: Rule, vocab_size: int, eos_ids: Collection[int], ring: LogitsRing
    ) -> None:
        config, queue = runner.model.config, runner.queue
        stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
        self._runner, self._ring = runner, ring
        self._drawing = Drawing(runner.kernels, queue, rule, vocab_size, eos_ids, ring, stream)
        self._states = OwnStates(ring.lanes, config.shape.hidden, config.shape.dtype, queue.device)
        self._stored: Mark | None = None
        self.hidden_layers: tuple[int, ...] = config.hidden_layers
        self.most_behind = ring.window + 2

    def propose(self, plan: DraftPlan) -> DraftProposal:
        stopwatch, queue = self._runner.stopwatch, self._runner.queue
        stopwatch.reset()
        self._runner.copy_pages(plan.copies)
        stopwatch.start()
        lines, steps = self._draft(plan)
        if lines:
            self._stored = queue.mark()
        queue.mark().wait()  # the target's states are its own memory: it may write others when this returns
        return DraftProposal(windows_of(lines), self._ring.logits, steps, stopwatch.stop(), stored=self._stored)

    def waits(self, plan: DraftPlan) -> bool:
        return self._runner.queue.asynchronous

    @abstractmethod
    def _draft(self, plan: DraftPlan) -> tuple[Mapping[int, Line], int]:
        """Windows by request, of the items that draft; and how many steps they took."""
