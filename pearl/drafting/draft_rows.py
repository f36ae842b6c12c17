"""The rows of a batch that drafts whole windows: items, then early branches, then late ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.messages import Branch, DraftWork, ForwardWork
from pearl_kernels import Rule


class DraftRow(NamedTuple):
    """A sequence that is drafted. Of a late branch the first forward computes nothing, and its own token counts."""

    forward: ForwardWork
    wanted: int  # tokens
    ring_base: int  # -1: no q is kept
    ring_size: int
    branch: Branch | None = None
    parent: int = -1  # the row whose first token a late branch hangs on
    token: int = -1  # of a late branch its own, where that is known before; else an alternative to its parent's first
    state: int = -1  # of such a one of a head: where the state is kept that its token was drawn from
    shift: int = 0  # by how much tokens lie behind what is computed of them

    @property
    def is_late(self) -> bool:
        return self.parent >= 0

    def places(self, count: int) -> list[int]:
        """``Drafted.row`` of its first tokens; what is none's of a late branch's own, which is not drawn."""
        begin, base, size = self.forward.end + self.shift, self.ring_base, self.ring_size
        return [base + (begin + step) % size for step in range(count)] if base >= 0 else [-1] * count


def draft_rows(work: Sequence[DraftWork], ring: LogitsRing, rule: Rule) -> list[DraftRow]:
    keeps = [keeps_logits(item.forward.state.params, rule) for item in work]
    rows = [
        DraftRow(item.forward, item.num_draft, ring.base(item.forward.state.lane) if kept else -1, ring.size)
        for item, kept in zip(work, keeps, strict=True)
    ]
    late: list[DraftRow] = []
    for index, item in enumerate(work):
        for branch in item.branches:
            base = ring.branch_base(branch.slot) if keeps[index] else -1
            state, table = item.state_of(branch), branch.block_table
            if branch.token is None:
                forward = ForwardWork(state, (), branch.start, 0, table)
                late.append(DraftRow(forward, branch.num_draft + 1, base, ring.window, branch, index))
            else:
                forward = ForwardWork(state, (branch.token,), branch.start, 1, table)
                rows.append(DraftRow(forward, branch.num_draft, base, ring.window, branch))
    return rows + late
