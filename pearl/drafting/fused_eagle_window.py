"""An EAGLE-3 head's windows, all of a round in one C++ call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl.drafting.draft_rows import DraftRow
from pearl.drafting.eagle_first import FirstForward
from pearl.drafting.host_window import DraftedWindows
from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.drafting.own_states import OwnStates
from pearl.drafting.window_call import Features, WindowCall
from pearl.heads.fused_eagle import FusedEagle
from pearl.messages import Branch, Drafted, DraftPlan, DraftWork, ForwardWork, SequenceState
from pearl_kernels import Rule, Stream


class FusedEagleWindows:
    """Of one drafter whose head is fused: to the bit as step by step."""

    def __init__(
        self, head: FusedEagle, rule: Rule, vocab_size: int, ring: LogitsRing, stream: Stream, states: OwnStates
    ) -> None:
        self._call = WindowCall(head, vocab_size, ring, stream)
        self._rule, self._ring, self._states = rule, ring, states

    def draft(self, plan: DraftPlan, first: FirstForward) -> DraftedWindows:
        """Each item that drafts has a source. No token's logits may depend on the host, and block tables reach to the
        windows' ends. Raises ValueError, with nothing written, if an index is out of range.
        """
        if not first.forwards:
            return DraftedWindows({}, {}, 0)
        rows = self._rows(first)
        outputs = torch.empty_like(first.features)
        base, size = zip(*map(self._region, rows), strict=True)
        features = Features(first.features, outputs, self._states.rows, list(base), list(size))
        windows = self._call.draft(rows, plan, features)
        first.keep(first.resting(), outputs, self._states)
        main = {
            item.forward.state.request_id: windows[first.sources[item.forward.state.request_id]]
            for item in plan.work
            if item.num_draft
        }
        prepared = {row.branch.id: window for row, window in zip(rows, windows, strict=True) if row.branch is not None}
        self._note(rows, windows)
        return DraftedWindows(main, prepared, max(1, *(row.wanted for row in rows)))

    def _rows(self, first: FirstForward) -> list[DraftRow]:
        """The forwards, then all branches: what they begin behind is computed in the first forward."""
        rows, late = [], []
        for index, (item, forward) in enumerate(zip(first.items, first.forwards, strict=True)):
            wanted = item.num_draft if first.sources.get(forward.state.request_id) == index else 0
            forward = forward._replace(num_logits=min(1, wanted))
            base = self._ring.base(forward.state.lane) if self._keeps(forward.state) else -1
            rows.append(DraftRow(forward, wanted, base, self._ring.size, shift=1))
            if wanted:
                late += [self._late(index, item, branch) for branch in item.branches]
        return rows + late

    def _late(self, parent: int, item: DraftWork, branch: Branch) -> DraftRow:
        state = item.state_of(branch)
        forward = ForwardWork(state, (), branch.start - 1, 0, branch.block_table)
        base = self._ring.branch_base(branch.slot) if self._keeps(state) else -1
        row = DraftRow(forward, branch.num_draft + 1, base, self._ring.window, branch, parent, shift=1)
        if branch.token is None:
            return row
        drawn_from = self._states.place(state, branch.start)
        self._states.require([drawn_from])
        return row._replace(token=branch.token, state=drawn_from.row)

    def _keeps(self, state: SequenceState) -> bool:
        return keeps_logits(state.params, self._rule)

    def _region(self, row: DraftRow) -> tuple[int, int]:
        """Where the states of a row's tokens are kept."""
        layout = self._states.layout
        if row.branch is not None:
            return layout.branch_base(row.branch.slot), layout.window
        return layout.base(row.forward.state.lane), layout.size

    def _note(self, rows: Sequence[DraftRow], windows: Sequence[tuple[Drafted, ...]]) -> None:
        for row, window in zip(rows, windows, strict=True):
            state, begin = row.forward.state, row.forward.end + 1
            slot = None if row.branch is None else row.branch.slot
            self._states.own([self._states.place(state, begin + step, slot) for step in range(len(window))])
