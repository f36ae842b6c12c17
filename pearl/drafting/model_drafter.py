"""A small language model as drafter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pearl.drafting.fused_window import FusedWindows
from pearl.drafting.host_window import DraftedWindows, HostWindows
from pearl.drafting.logits_ring import LogitsRing
from pearl.drafting.window_call import can_fuse_windows
from pearl.drafting.window_graph import WindowGraphs, divide
from pearl.messages import DeviceWindows, DraftPlan, DraftProposal, Mark
from pearl.workers import GraphRunner, ModelRunner
from pearl_kernels import Rule, Stream


class ModelDrafter:
    reads_history = False
    hidden_layers: tuple[int, ...] = ()
    prepares = True
    most_behind = 2

    def __init__(
        self, runner: ModelRunner, rule: Rule, vocab_size: int, eos_ids: Collection[int], ring: LogitsRing
    ) -> None:
        self._runner, self._ring = runner, ring
        # Under the coupled rule both models use one noise; under rejection the draft's must be its own.
        stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
        self._on_host = HostWindows(runner, rule, vocab_size, eos_ids, ring, stream)
        self._graphs: WindowGraphs | None = None
        self._fused: FusedWindows | None = None
        self._stored: Mark | None = None  # the end of what was stored in the ring from here, not by a captured window
        if isinstance(runner, GraphRunner):
            self._graphs = WindowGraphs(runner, rule, vocab_size, ring, stream)
        elif runner.fused is not None and can_fuse_windows(runner.kernels):
            self._fused = FusedWindows(runner.fused, rule, vocab_size, ring, stream)

    def propose(self, plan: DraftPlan) -> DraftProposal:
        if not plan.work:
            return DraftProposal()
        if self._runner.fused is not None:
            self._runner.fused.share_cores(not plan.alone)
        self._runner.stopwatch.reset()
        self._runner.copy_pages(plan.copies)
        (windows, prepared, steps), late = self._draft(plan)
        busy = self._runner.stopwatch.stop()
        return DraftProposal(windows, self._ring.logits, steps, busy, late, self._stored, prepared)

    def captures(self) -> Sequence[Callable[[], object]]:
        """As of ``ModelRunner.captures``: windows, and the first forwards of those that are drafted from the host."""
        return [] if self._graphs is None else [*self._graphs.captures(), *self._runner.captures()]

    def waits(self, plan: DraftPlan) -> bool:
        if not self._runner.queue.asynchronous:
            return False
        return any(
            item.num_draft and (self._graphs is None or item.forward.state.params.changes_logits) for item in plan.work
        )

    def _draft(self, plan: DraftPlan) -> tuple[DraftedWindows, DeviceWindows | None]:
        """Windows, and those that a device still drafts."""
        if self._graphs is not None:
            on_host, on_device = divide(plan)
            drafted = self._draft_on_host(on_host) if on_host.work else DraftedWindows({}, {}, 0)
            late = self._graphs.draft(on_device) if on_device.work else None
            return drafted._replace(steps=drafted.steps + (late.steps if late is not None else 0)), late
        if self._fused is None or any(item.forward.state.params.changes_logits for item in plan.work):
            return self._draft_on_host(plan), None
        self._runner.stopwatch.start()
        return self._fused.draft(plan), None

    def _draft_on_host(self, plan: DraftPlan) -> DraftedWindows:
        drafted = self._on_host.draft(plan)
        if drafted.windows:
            self._stored = self._runner.queue.mark()
        return drafted
