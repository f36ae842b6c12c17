"""Expected tokens per second of every mode, against simulated rounds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from pace_sim import Batch, Machine, speed

from pearl.methods import METHODS, Mode
from pearl.pace import FixedPace, PreparingPace
from pearl.pace.acceptance import Odds
from pearl.pace.speed import Situation, tokens_per_second

ALONE = ("whole-windows", "pre-verify-only")
MACHINES = [
    Machine(step=1.0, base=5.0, row=0.3, overhead=0.2),
    Machine(step=1.0, base=8.0, row=0.02, overhead=0.5, beside=1.3),
    Machine(step=1.0, base=2.0, row=0.1),
]


def situation(machine: Machine, batch: int, odds: Odds, pinned: bool = False) -> Situation:
    return Situation(
        np.array([odds.first]), np.array([odds.later]), np.array([float(batch)]),
        machine.times(beside=False), machine.times(beside=True), dict.fromkeys(METHODS, machine.overhead), pinned,
    )  # fmt: skip


def expected(mode: Mode, now: Situation, window: int) -> float:
    return float(tokens_per_second(mode, now, np.full((1, len(now.count)), float(window)))[0])


# The formulas of ALONE are for one request.
CASES = [(mode, batch) for mode in METHODS for batch in (1, 2, 16) if batch == 1 or mode not in ALONE]


@pytest.mark.parametrize(("mode", "batch"), CASES)
def test_the_expected_speed_is_what_rounds_give(mode: Mode, batch: int) -> None:
    machines = MACHINES[:1] if batch == 2 else MACHINES
    for machine, odds, pinned in itertools.product(machines, (Odds(0.5, 0.8), Odds(0.9, 0.95)), (False, True)):
        for window in (1,) if mode == "autoregressive" else (1, 4):
            rate = expected(mode, situation(machine, batch, odds, pinned), window)
            if mode == "two-halves" and batch == 1:
                assert rate == 0
                continue
            rounds = 9_000 if batch == 1 else 1_200
            found = speed(
                Batch(machine, batch, lambda *_, odds=odds: odds, pinned).serve(FixedPace(mode, window), rounds)
            )
            assert rate == pytest.approx(found, rel=0.05), (machine, odds, pinned, window)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("window", [2, 5])
def test_the_expected_speed_with_prepared_windows(batch: int, window: int) -> None:
    machine, odds = Machine(step=1.0, base=5.0, row=0.05, overhead=0.2, draft_row=0.05, hits=0.6), Odds(0.5, 0.8)
    now = replace(situation(machine, batch, odds), prepared=np.array(4.0), hits=np.array(0.6))
    found = speed(
        Batch(machine, batch, lambda *_: odds).serve(
            PreparingPace(FixedPace("pearl", window), 4), 9_000 if batch == 1 else 1_200
        )
    )
    assert expected("pearl", now, window) == pytest.approx(found, rel=0.05)
    assert found > speed(
        Batch(machine, batch, lambda *_: odds).serve(FixedPace("pearl", window), 9_000 if batch == 1 else 1_200)
    )


def test_two_classes_of_requests_are_the_sum_of_both() -> None:
    """Easy and hard requests in one batch, each kind with windows of its own."""
    machine, odds = Machine(step=1.0, base=8.0, row=0.2, overhead=0.3), [Odds(0.4, 0.4), Odds(0.9, 0.95)]
    now = Situation(
        np.array([o.first for o in odds]), np.array([o.later for o in odds]), np.array([4.0, 4.0]),
        machine.times(beside=False), machine.times(beside=True), dict.fromkeys(METHODS, machine.overhead),
    )  # fmt: skip
    windows = np.array([[1.0, 6.0]])

    class Own(FixedPace):
        def decide(self, request_ids, load, pinned):  # type: ignore[no-untyped-def]
            return super().decide(request_ids, load, pinned)._replace(windows=(1, 6) * 4)

    for mode in ("pearl", "speculative"):
        found = speed(Batch(machine, 8, lambda i, _: odds[i % 2]).serve(Own(mode, 1), 3000))  # type: ignore[arg-type]
        assert float(tokens_per_second(mode, now, windows)[0]) == pytest.approx(found, rel=0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [1.0, 3.0, 4.5, 8.0])
def test_where_rows_are_free_pearls_best_window_is_the_papers_balance(ratio: float) -> None:
    now = situation(Machine(step=1.0, base=ratio), 1, Odds(0.8, 0.8))
    best = max(range(1, 33), key=lambda g: expected("pearl", now, g))
    assert ratio - 1 < best < ratio + 1


def test_where_rows_cost_something_a_window_is_no_longer_than_it_pays() -> None:
    def best(odds: float) -> int:
        now = situation(Machine(step=1.0, base=8.0, row=0.5), 1, Odds(odds, odds))
        return max(range(1, 33), key=lambda g: expected("pearl", now, g))

    assert best(0.6) < 8
    assert best(0.6) < best(0.95)
