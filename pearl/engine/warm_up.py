"""Captures what will come up before the first request does: a round that captures takes a hundred times as long."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pearl.workers import Worker

_LOG = logging.getLogger(__name__)
_EVERY = 10  # captures between two lines of progress


class Side(NamedTuple):
    """One model's. ``captures`` as of ``ModelRunner.captures``."""

    worker: Worker
    device: torch.device
    captures: Sequence[Callable[[], object]]


def free_bytes(device: torch.device) -> int | None:
    """What the driver has left, None on a CPU. What a graph pool holds unused is no other's."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def warm_up(
    sides: Sequence[Side],
    seconds: float,
    free: Callable[[torch.device], int | None] = free_bytes,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Capture in turn, until everything is or ``seconds`` have passed. Returns how many were captured.

    A side stops where its device has half as much memory left as at the beginning: graphs' tensors are one of the two
    working sets that its KV cache left room for (``profiling``), the other is for prompts. Raises what captures do.
    """
    begin = clock()
    before = {side.device: free(side.device) for side in sides}
    total, done = sum(len(side.captures) for side in sides), 0
    for turn in itertools.zip_longest(*(side.captures for side in sides)):
        for side, capture in zip(sides, turn, strict=True):
            least, now = before[side.device], free(side.device)
            if clock() - begin >= seconds or capture is None or (least and now is not None and now < least // 2):
                continue
            side.worker.submit(capture).result()
            done += 1
            if done % _EVERY == 0:
                _LOG.info("captured %d of %d shapes in %.1f s", done, total, clock() - begin)
    for side in sides:
        side.worker.rest()
    if done < total:
        _LOG.info("%d of %d shapes are left to be captured when they come up", total - done, total)
    return done
