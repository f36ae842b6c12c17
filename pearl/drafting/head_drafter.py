"""What drafters around a head share: a round, from the target's states to windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from pearl.drafting.host_window import DraftedWindows
from pearl.drafting.lines import Drawing
from pearl.drafting.logits_ring import LogitsRing
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
        self._stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
        self._runner, self._ring = runner, ring
        self._drawing = Drawing(runner.kernels, queue, rule, vocab_size, eos_ids, ring, self._stream)
        self._stored: Mark | None = None
        self.hidden_layers: tuple[int, ...] = config.hidden_layers
        self.most_behind = ring.window + 2

    def propose(self, plan: DraftPlan) -> DraftProposal:
        stopwatch, queue = self._runner.stopwatch, self._runner.queue
        if self._runner.fused is not None:
            self._runner.fused.share_cores(not plan.alone)
        stopwatch.reset()
        self._runner.copy_pages(plan.copies)
        stopwatch.start()
        drafted = self._draft(plan)
        if drafted.windows:
            self._stored = queue.mark()
        queue.mark().wait()  # the target's states are its own memory: it may write others when this returns
        busy = stopwatch.stop()
        return DraftProposal(
            drafted.windows, self._ring.logits, drafted.steps, busy, stored=self._stored, prepared=drafted.prepared
        )

    def waits(self, plan: DraftPlan) -> bool:
        return self._runner.queue.asynchronous

    @abstractmethod
    def _draft(self, plan: DraftPlan) -> DraftedWindows:
        """Windows of the items that draft, and of their branches."""
