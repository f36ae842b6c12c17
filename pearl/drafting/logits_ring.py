"""Where the logits of drafted tokens wait for the verdict."""

from __future__ import annotations

from torch import Tensor


class LogitsRing:
    """Raw logits of drafted tokens until they are decided: the rejection rule needs q where it rejects.

    Token at position p of lane l lives in row ``l * size + p % size``. At most ``window`` tokens are pending while as
    many are being drafted, so ``size = 2 * window`` never overwrites a live row. Greedy and coupled requests need no
    q and store nothing; the buffer is only allocated when a request first does. Its last row is nobody's.
    """

    def __init__(self, lanes: int, window: int) -> None:
        self._lanes, self.size = lanes, 2 * window
        self.logits: Tensor | None = None

    @property
    def spare_row(self) -> int:
        return self._lanes * self.size

    def row(self, lane: int, position: int) -> int:
        return lane * self.size + position % self.size

    def allocate(self, like: Tensor) -> Tensor:
        """The buffer, ``[lanes * size + 1, V]``; ``like``: logits ``[.., V]``."""
        if self.logits is None:
            self.logits = like.new_empty(self.spare_row + 1, like.shape[-1])
        return self.logits

    def store(self, lane: int, position: int, row: Tensor) -> int:
        index = self.row(lane, position)
        self.allocate(row)[index] = row
        return index
