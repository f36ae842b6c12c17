"""A pace for each decoding method, and one that switches between all of them."""

from __future__ import annotations

from random_pace import RandomPace

from pearl.methods import METHODS as MODES
from pearl.pace import FixedPace, PacePolicy

SWITCHING = "switching"
METHODS: tuple[str, ...] = (*MODES, SWITCHING)


def pace_of(method: str, window: int) -> PacePolicy:
    return RandomPace(window) if method == SWITCHING else FixedPace(method, window)  # type: ignore[arg-type]
