"""Measured rounds, and what is known before any."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.methods import Mode
from pearl.pace import Load, MeasuredRound, Progressed, Sizes

SIZES = Sizes(target_bytes=8_000_000, draft_bytes=1_000_000)


def measured_round(
    batch: int = 1,
    *,
    mode: Mode = "pearl",
    context: int = 50,
    rows: int = 4,
    target_seconds: float = 5.0,
    steps: int = 4,
    draft_step: float = 1.0,
    overhead: float = 0.0,
    requests: Sequence[Progressed] | None = None,
) -> MeasuredRound:
    """``context``: of each request. By default each has four tested tokens, of which three held."""
    drafting = steps * draft_step
    if requests is None:
        requests = [Progressed(i, 4, 3, 4) for i in range(batch)]
    load, seconds = Load(batch, context * batch), max(target_seconds, drafting) + overhead
    sequences = batch if steps else 0
    return MeasuredRound(mode, load, rows, target_seconds, sequences, max(1, steps), drafting, seconds, tuple(requests))
