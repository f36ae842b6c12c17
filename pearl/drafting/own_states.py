"""What heads keep of each request between rounds: hidden states, and where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.drafting.logits_ring import RingLayout
from pearl.host_tensors import from_numbers
from pearl.messages import SequenceState


class Place(NamedTuple):
    """Where a state lies, and whose it is."""

    row: int
    request_id: int
    position: int


class OwnStates:
    """A state ``[D]`` in each row of a layout, and whose it last was. Belongs to one drafter."""

    def __init__(self, layout: RingLayout, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.rows = torch.empty((layout.spare_row, width), dtype=dtype, device=device)
        self._owners: list[tuple[int, int] | None] = [None] * layout.spare_row  # request id and position

    def place(self, state: SequenceState, position: int, slot: int | None = None) -> Place:
        """In the request's lane, or a branch's slot."""
        row = self.layout.row(state.lane, position) if slot is None else self.layout.branch_row(slot, position)
        return Place(row, state.request_id, position)

    def put(self, places: Sequence[Place], states: Tensor) -> None:
        """states: ``[R, D]``, one for each place."""
        if places:
            self.rows[self._index(places)] = states.to(self.rows)
            self.own(places)

    def own(self, places: Sequence[Place]) -> None:
        """Their rows were written, by whatever."""
        for row, request_id, position in places:
            self._owners[row] = request_id, position

    def get(self, places: Sequence[Place]) -> Tensor:
        """``[R, D]``. LookupError if one is not of that request and position."""
        self.require(places)
        return self.rows[self._index(places)]

    def require(self, places: Sequence[Place]) -> None:
        """LookupError if what lies there is of others."""
        for row, request_id, position in places:
            if (found := self._owners[row]) != (request_id, position):
                raise LookupError(f"request {request_id}: no state for {position} is kept, but {found}")

    def adopt(self, state: SequenceState, slot: int, positions: Sequence[int]) -> None:
        """A branch's states are its request's from now on: they move to its lane, at the first call."""
        own = [self.place(state, position, slot) for position in positions]
        own = [place for place in own if self._owners[place.row] == (place.request_id, place.position)]
        if own:
            self.put([self.place(state, place.position) for place in own], self.rows[self._index(own)])
            for place in own:
                self._owners[place.row] = None

    def _index(self, places: Sequence[Place]) -> Tensor:
        return from_numbers([place.row for place in places], torch.int64, self.rows.device)
