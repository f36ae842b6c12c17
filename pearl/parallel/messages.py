"""What the engine's process and the processes of the other ranks tell each other, pickled through a pipe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pearl.models import ForwardBatch


@dataclass(frozen=True)
class RankSpec:
    """All that a rank's process needs to load its part of the model. ``device`` is torch's name of it."""

    rank: int
    ranks: int
    store_port: int  # of the TCPStore on this machine through which the ranks find each other
    path: str
    device: str
    dtype: torch.dtype
    max_model_len: int
    num_pages: int
    page_size: int
    threads: int


@dataclass(frozen=True)
class Loaded:
    """A rank is ready."""


@dataclass(frozen=True)
class Failed:
    """A rank cannot go on; ``trace`` is its traceback."""

    trace: str


@dataclass(frozen=True)
class Compute:
    """One forward: the fields of ForwardBatch as arrays."""

    arrays: tuple[NDArray[np.int64] | NDArray[np.int32], ...]

    @classmethod
    def of(cls, batch: ForwardBatch) -> Compute:
        return cls(tuple(getattr(batch, name).cpu().numpy() for name in ForwardBatch.__dataclass_fields__))

    def batch(self, device: torch.device) -> ForwardBatch:
        return ForwardBatch(*(torch.from_numpy(array).to(device) for array in self.arrays))


@dataclass(frozen=True)
class CopyPages:
    """Pages to copy before the next forward: (source, destination)."""

    pairs: tuple[tuple[int, int], ...]


Command = Compute | CopyPages
