"""What the engine's process and the processes of the other ranks tell each other, pickled through a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pearl.host_tensors import Array
from pearl.workers.shapes import BatchShape


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
    most_rows: int = 0  # that a captured forward may have; 0: nothing is captured


@dataclass(frozen=True)
class Loaded:
    """A rank is ready."""


@dataclass(frozen=True)
class Failed:
    """A rank cannot go on; ``trace`` is its traceback."""

    trace: str


@dataclass(frozen=True)
class Compute:
    """One forward: the arrays of its batch, as ``BatchLists`` makes them."""

    arrays: Mapping[str, Array]


@dataclass(frozen=True)
class Replay:
    """One captured forward. All ranks get the same ones in the same order, so they capture, and forget, together."""

    shape: BatchShape
    arrays: Mapping[str, Array]


@dataclass(frozen=True)
class CopyPages:
    """Pages to copy before the next forward: (source, destination)."""

    pairs: tuple[tuple[int, int], ...]


Command = Compute | Replay | CopyPages
