"""What a service tells of its engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """``reason``: what is wrong, where something is; one or more sentences."""

    ok: bool
    reason: str | None = None


@dataclass(frozen=True)
class EngineLoad:
    """``running`` and ``waiting`` requests, of which a prompt has one for each output. ``kv_usage``: the part of the
    pages that sequences hold, in [0, 1], of the model that has fewer left.
    """

    running: int
    waiting: int
    kv_usage: float
