"""Where the logits of drafted tokens wait for the verdict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.host_tensors import from_numbers
from pearl.messages import Branch, DraftWork
from pearl.sampling_batch import draft_temperature
from pearl.sampling_params import SamplingParams
from pearl_kernels import Rule


def keeps_logits(params: SamplingParams, rule: Rule) -> bool:
    """Whether a verdict on such a request's tokens needs q."""
    return rule != "coupled" and params.temperature > 0 and draft_temperature(params) > 0


class RingLayout:
    """Which row is which drafted token's, for as long as it is undecided.

    Token at position p of lane l has row ``l * size + p % size``. At most ``window`` tokens are pending while as many
    are being drafted, so ``size = 2 * window`` never overwrites a live row. Behind the lanes each of ``slots`` branches
    has room for a window. The last row is nobody's.
    """

    def __init__(self, lanes: int, window: int, slots: int = 0) -> None:
        self.lanes, self.window, self.size, self.slots = lanes, window, 2 * window, slots

    @property
    def spare_row(self) -> int:
        return self.lanes * self.size + self.slots * self.window

    @property
    def most_branches(self) -> int:
        """Of a round: beside them each lane may keep one that came true."""
        return max(0, self.slots - self.lanes)

    def base(self, lane: int) -> int:
        """The first row of a lane."""
        return lane * self.size

    def row(self, lane: int, position: int) -> int:
        return self.base(lane) + position % self.size

    def branch_base(self, slot: int) -> int:
        """The first row of a branch's slot, which has ``window`` rows."""
        return self.lanes * self.size + slot * self.window

    def branch_row(self, slot: int, position: int) -> int:
        return self.branch_base(slot) + position % self.window


class LogitsRing(RingLayout):
    """Logits of drafted tokens, as they were drawn from, until they are decided: the rejection rule needs q where it
    rejects. In the draft model's dtype.

    Greedy and coupled requests need no q and store nothing; the buffer is only allocated when a request first does.
    """

    def __init__(self, lanes: int, window: int, slots: int = 0) -> None:
        super().__init__(lanes, window, slots)
        self.logits: Tensor | None = None

    def branch_rows(self, item: DraftWork, branch: Branch, rule: Rule) -> tuple[int, ...]:
        """As ``window_rows``, of what is drafted after a branch's own token, which nobody tests: that has none."""
        if not keeps_logits(item.forward.state.params, rule):
            return (-1,) * branch.num_draft
        begin = branch.start + 1
        return tuple([self.branch_row(branch.slot, begin + step) for step in range(branch.num_draft)])

    def window_rows(self, item: DraftWork, rule: Rule) -> tuple[int, ...]:
        """The row of each token of an item's window; -1 where its logits are not kept."""
        state = item.forward.state
        if not keeps_logits(state.params, rule):
            return (-1,) * item.num_draft
        return tuple(self.row(state.lane, item.position + step) for step in range(item.num_draft))

    def allocate(self, width: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The buffer, ``[spare_row + 1, width]``."""
        if self.logits is None:
            self.logits = torch.empty((self.spare_row + 1, width), dtype=dtype, device=device)
        return self.logits

    def store(self, indices: Sequence[int], rows: Tensor) -> None:
        """``rows``: ``[M, width]``; those with a negative index are not kept."""
        kept = [row for row, index in enumerate(indices) if index >= 0]
        if not kept:
            return
        logits = self.allocate(rows.shape[-1], rows.dtype, rows.device)
        if len(kept) < len(indices):
            rows, indices = rows[kept], [indices[row] for row in kept]
        logits[from_numbers(indices, torch.int64, rows.device)] = rows
