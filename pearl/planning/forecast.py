"""A model of the algorithm: tokens per second of each method from how long forwards take and how often drafts hold.

The formulas are those by which the pace chooses (``pearl.pace.speed``, tested against simulated rounds): tokens hold
independently of each other, with one chance for all. Real text comes in easy and hard stretches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pearl.errors import ConfigurationError
from pearl.methods import METHODS, Mode
from pearl.pace.curves import Times
from pearl.pace.speed import Situation, tokens_per_second

_ROWS = tuple(float(1 << power) for power in range(13))  # at which forwards are asked for; linear in between


@dataclass(frozen=True)
class Costs:
    """Seconds. ``target(rows)``: of its forward; ``step``: of one of the draft's, of few sequences.

    overhead: of a round, beside its forwards. beside: by how many times longer forwards take while both models work, 1
    where each has a device of its own.
    """

    target: Callable[[float], float]
    step: float
    overhead: float = 0.0
    beside: float = 1.0

    @classmethod
    def measured(cls, target: float, row: float, step: float, overhead: float = 0.0, beside: float = 1.0) -> Costs:
        """``target``: of one row, ``row``: of each further one. ConfigurationError."""
        for name, value in (("target", target), ("draft", step)):
            if not 0 < value < math.inf:
                raise ConfigurationError(f"the time of the {name} must be a number above 0, not {value * 1e3:g} ms")
        if not 1 <= beside < math.inf:
            raise ConfigurationError(f"beside each other forwards take at least as long as alone, not {beside:g} times")
        if min(row, overhead) < 0:
            raise ConfigurationError("times of rows and overheads must not be below 0")
        return cls(lambda rows: target + row * (rows - 1), step, overhead, beside)

    @property
    def ratio(self) -> float:
        """How many of the draft's steps a target's forward lasts, the paper's c."""
        return self.target(1.0) / self.step


@dataclass(frozen=True)
class Forecast:
    """Of a method, at its best window. ``speedup``: over autoregressive decoding with the same costs."""

    method: str
    mode: Mode
    window: int  # 0: it drafts nothing
    tokens_per_second: float
    speedup: float
    tokens_per_forward: float  # of the target


def forecast(
    costs: Costs, acceptance: float, batch: int = 1, largest: int = 16, hits: float = 0.0
) -> list[Forecast]:  # fmt: skip
    """Autoregressive decoding and the modes of ``pearl.methods``; if ``hits`` is above 0, PEARL too where so many
    rejections find their window prepared, whose rows are taken to cost the draft nothing.

    acceptance: chance that a drafted token holds. Raises ConfigurationError.
    """
    if not 0 < acceptance < 1:
        raise ConfigurationError(f"acceptance must lie between 0 and 1, not {acceptance:g}")
    if not 0 <= hits < 1:
        raise ConfigurationError(f"the share of hits must lie between 0 and 1, not {hits:g}")
    if batch < 1 or largest < 1:
        raise ConfigurationError("batch and window must be at least 1")
    situation = _situation(costs, acceptance, batch)
    prepared = replace(situation, prepared=np.array(1e-9), hits=np.array(hits))
    contenders: list[tuple[str, Mode, Situation]] = [(mode, mode, situation) for mode in _modes(batch)]
    if hits:
        contenders.append(("pearl, prepared", "pearl", prepared))
    found: list[Forecast] = []
    for method, mode, where in contenders:
        window, rate = _best(mode, where, 1 if mode == "autoregressive" else largest)
        plain = found[0].tokens_per_second if found else rate
        drafted = 0 if mode == "autoregressive" else window
        found.append(Forecast(method, mode, drafted, rate, rate / plain, _tokens_per_forward(mode, where, window)))
    return found


def speeds(mode: Mode, costs: Costs, acceptance: float, windows: Sequence[int], batch: int = 1) -> list[float]:
    """Tokens per second over the window: the predicted curve."""
    rates = tokens_per_second(mode, _situation(costs, acceptance, batch), np.array(windows, dtype=np.float64)[:, None])
    return [float(rate) for rate in rates]


def _modes(batch: int) -> list[Mode]:
    """Plain decoding first. Some formulas are for one request only, and one mode is for several."""
    others: tuple[Mode, ...] = ("whole-windows", "pre-verify-only") if batch == 1 else ("two-halves",)
    return ["autoregressive", "speculative", *others, "pearl"]


def _situation(costs: Costs, acceptance: float, batch: int) -> Situation:
    odds, overhead = np.array([acceptance]), dict.fromkeys(METHODS, costs.overhead)
    return Situation(odds, odds, np.array([float(batch)]), _times(costs, 1.0), _times(costs, costs.beside), overhead)


def _times(costs: Costs, factor: float) -> Times:
    points = tuple((rows, factor * costs.target(rows)) for rows in _ROWS)
    (x0, y0), (x1, y1) = points[-2:]
    steps = tuple((rows, factor * costs.step) for rows in (1.0, _ROWS[-1]))
    return Times(points, (y1 - y0) / (x1 - x0), steps)


def _best(mode: Mode, situation: Situation, largest: int) -> tuple[int, float]:
    windows = np.arange(1, largest + 1, dtype=np.float64)[:, None]
    rates = tokens_per_second(mode, situation, windows)
    best = int(np.argmax(rates))
    return best + 1, float(rates[best])


def _tokens_per_forward(mode: Mode, situation: Situation, window: int) -> float:
    """Where the target's forwards are all that takes time, each as long as any other."""
    unit = Times(((1.0, 1.0), (2.0, 1.0)), 0.0, ((1.0, 0.0),))
    alone = replace(situation, alone=unit, beside=unit, overhead=dict.fromkeys(METHODS, 0.0))
    return float(tokens_per_second(mode, alone, np.array([[float(window)]]))[0]) / situation.batch
