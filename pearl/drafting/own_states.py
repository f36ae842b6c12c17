"""What heads keep of each request between rounds: a hidden state, and where it belongs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.messages import SequenceState


class OwnStates:
    """One row ``[D]`` for each lane, of the request that it last was of. Belongs to one drafter."""

    def __init__(self, lanes: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty((lanes, width), dtype=dtype, device=device)
        self._places: list[tuple[int, int] | None] = [None] * lanes  # request id and position

    def put(self, states: Sequence[SequenceState], positions: Sequence[int], rows: Tensor) -> None:
        """rows: ``[R, D]``; each request's belongs to the position beside it."""
        if not states:
            return
        self._rows[[state.lane for state in states]] = rows.to(self._rows)
        for state, position in zip(states, positions, strict=True):
            self._places[state.lane] = state.request_id, position

    def get(self, states: Sequence[SequenceState], positions: Sequence[int]) -> Tensor:
        """``[R, D]``. LookupError if one is not of that request and position."""
        for state, position in zip(states, positions, strict=True):
            if (found := self._places[state.lane]) != (state.request_id, position):
                raise LookupError(f"request {state.request_id}: no state for {position} is kept, but {found}")
        return self._rows[[state.lane for state in states]]
