"""A draft model's windows, each in one C++ call."""

from __future__ import annotations

from pearl.drafting.draft_rows import draft_rows
from pearl.drafting.host_window import DraftedWindows
from pearl.drafting.logits_ring import LogitsRing
from pearl.drafting.window_call import WindowCall
from pearl.messages import DraftPlan
from pearl.models import FusedDecoder
from pearl_kernels import Rule, Stream


class FusedWindows:
    """Of one drafter whose forward is fused: to the bit as token by token."""

    def __init__(self, decoder: FusedDecoder, rule: Rule, vocab_size: int, ring: LogitsRing, stream: Stream) -> None:
        self._rule, self._ring = rule, ring
        self._call = WindowCall(decoder, vocab_size, ring, stream)

    def draft(self, plan: DraftPlan) -> DraftedWindows:
        """Windows of those that draft, and of their branches. No token's logits may depend on the host, and block
        tables reach to the windows' ends. Raises ValueError, with nothing written, if an index is out of range.
        """
        rows = draft_rows(plan.work, self._ring, self._rule)
        windows = self._call.draft(rows, plan)
        main = {item.forward.state.request_id: windows[index] for index, item in enumerate(plan.work) if item.num_draft}
        prepared = {row.branch.id: window for row, window in zip(rows, windows, strict=True) if row.branch is not None}
        return DraftedWindows(main, prepared, max(1, *(row.wanted for row in rows)))
