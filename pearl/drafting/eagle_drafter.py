"""An EAGLE-3 head as drafter: it follows the target's states, and goes on from its own where there are none yet."""

from __future__ import annotations

from collections.abc import Collection

from pearl.drafting.eagle_first import FirstForward
from pearl.drafting.eagle_steps import EagleSteps
from pearl.drafting.fused_eagle_window import FusedEagleWindows
from pearl.drafting.head_drafter import HeadDrafter
from pearl.drafting.host_window import DraftedWindows
from pearl.drafting.logits_ring import LogitsRing
from pearl.drafting.own_states import OwnStates
from pearl.drafting.window_call import can_fuse_windows
from pearl.heads.eagle import EagleHead
from pearl.heads.runner import HeadRunner
from pearl.messages import DraftPlan
from pearl_kernels import Rule


class EagleDrafter(HeadDrafter):
    """It keeps the states that undecided tokens were drawn from, and the one that the next will be, by the token's
    position.
    """

    prepares = True

    def __init__(
        self, runner: HeadRunner, rule: Rule, vocab_size: int, eos_ids: Collection[int], ring: LogitsRing
    ) -> None:
        super().__init__(runner, rule, vocab_size, eos_ids, ring)
        assert isinstance(runner.model, EagleHead)
        self._model, shape = runner.model, runner.model.config.shape
        self._states = OwnStates(ring, shape.hidden, shape.dtype, runner.queue.device)
        self._steps = EagleSteps(runner, self._model, self._drawing, self._states)
        self._fused: FusedEagleWindows | None = None
        if runner.fused is not None and can_fuse_windows(runner.kernels):
            self._fused = FusedEagleWindows(runner.fused, rule, vocab_size, ring, self._stream, self._states)

    def _draft(self, plan: DraftPlan) -> DraftedWindows:
        for item in plan.work:
            if item.slot is not None and item.pending:
                pending = range(item.position - len(item.pending), item.position)
                self._states.adopt(item.forward.state, item.slot, pending)
        first = FirstForward.of(plan, self._model, self._states)
        if self._fused is None or not _fits_one_call(plan, first):
            return self._steps.draft(plan, first)
        return self._fused.draft(plan, first)


def _fits_one_call(plan: DraftPlan, first: FirstForward) -> bool:
    """Logits do not depend on the host, and each window begins behind a forward of this round."""
    return not any(
        item.forward.state.params.changes_logits
        or (item.num_draft and item.forward.state.request_id not in first.sources)
        for item in plan.work
    )
