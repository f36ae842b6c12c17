"""What is known of forwards' times and of how far predictions were off, and the two paces that predict nothing."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from pace_support import SIZES, measured_round

from pearl.config import EngineConfig
from pearl.engine.builder import build_pace
from pearl.methods import METHODS
from pearl.pace import AutoPace, BalancedPace, FixedPace, Load, Pace, Sizes
from pearl.pace.calibration import Calibration, Stretch
from pearl.pace.curves import COLD_ROUNDS, Curves
from pearl.pace.hits import Hits

ONE = Load(1, 50)


def target(curves: Curves, rows: float, load: Load = ONE, beside: bool = True) -> float:
    return float(curves.times(load, beside).target(np.array(rows)))


def step(curves: Curves, load: Load = ONE, beside: bool = True) -> float:
    return float(curves.times(load, beside).window(np.array(1.0), np.array(float(load.batch))))


def test_before_anything_is_measured_a_forward_reads_its_weights() -> None:
    curves = Curves(Sizes(8 * 10**9, 10**9, bytes_per_second=1e9))
    assert target(curves, 1) == 8
    assert step(curves) == 1
    assert 8 < target(curves, 5) < 16


def test_one_hiccup_does_not_count() -> None:
    curves = Curves(SIZES)
    for seconds in (7.0, 7.0, 400.0, 7.0, 7.0):
        curves.observe(measured_round(target_seconds=seconds))
    assert target(curves, 4) == 7.0


def test_a_steps_time_is_that_of_a_drafted_token() -> None:
    curves = Curves(SIZES)
    for steps in (2, 8, 5):
        curves.observe(measured_round(steps=steps, draft_step=2.0))
    assert step(curves) == 2.0


def test_what_a_window_costs_before_its_first_step_is_learnt() -> None:
    """Else short windows would look cheaper than they are to those who run long ones."""
    curves = Curves(SIZES)
    for steps in (2, 4, 6) * 4:
        curves.observe(measured_round(steps=steps, draft_step=1.0 + 1.5 / steps))
    times = curves.times(ONE, beside=True)
    found = times.window(np.array([1.0, 2.0, 4.0, 8.0]), np.array(1.0))
    assert found == pytest.approx([2.5, 3.5, 5.5, 9.5], rel=0.05)


def test_what_rows_cost_is_learnt_from_rounds_of_different_length() -> None:
    curves = Curves(SIZES)
    for rows in (1, 4, 9, 1, 4, 9):
        curves.observe(measured_round(rows=rows, target_seconds=8.0 + rows))
    assert [target(curves, rows) for rows in (1, 4, 6, 9)] == pytest.approx([9, 12, 14, 17])
    assert target(curves, 20) == pytest.approx(28, rel=0.1)


def test_a_step_in_the_time_of_rows_is_seen() -> None:
    """Rows are multiplied in tiles: nine take twice what eight take."""
    curves = Curves(SIZES)
    for rows in range(1, 17):
        for _ in range(3):
            curves.observe(measured_round(rows=rows, target_seconds=1.0 if rows <= 8 else 2.0))
    assert target(curves, 7) == pytest.approx(1.0, abs=0.05)
    assert target(curves, 11) == pytest.approx(2.0, abs=0.05)


def test_seconds_never_fall_with_rows() -> None:
    curves = Curves(SIZES)
    for rows, seconds in ((1, 5.0), (4, 4.8), (8, 6.0)):
        curves.observe(measured_round(rows=rows, target_seconds=seconds))
    found = [target(curves, rows) for rows in range(1, 20)]
    assert found == sorted(found)
    assert found[0] > 0


def test_times_alone_and_beside_each_other_are_kept_apart() -> None:
    curves = Curves(SIZES)
    for _ in range(3):
        curves.observe(measured_round(target_seconds=8.0, draft_step=2.0))
        curves.observe(measured_round(target_seconds=5.0, steps=0))
        curves.observe(measured_round(target_seconds=0.0, rows=0, draft_step=1.0))
    assert (target(curves, 4), target(curves, 4, beside=False)) == (8.0, 5.0)
    assert (step(curves), step(curves, beside=False)) == (2.0, 1.0)


def test_similar_loads_share_what_was_measured_others_do_not() -> None:
    curves = Curves(SIZES)
    curves.observe(measured_round(1, target_seconds=3.0))
    curves.observe(measured_round(8, rows=32, target_seconds=9.0))
    curves.observe(measured_round(8, rows=32, context=4000, target_seconds=20.0))
    assert target(curves, 4) == 3.0
    assert target(curves, 32, Load(15, 50 * 15)) == 9.0
    assert target(curves, 32, Load(100, 5000)) == 9.0  # the nearest that is known
    assert target(curves, 32, Load(8, 3000 * 8)) == 20.0


def test_rows_that_a_batch_never_had_are_known_from_other_batches() -> None:
    curves, sixteen = Curves(SIZES), Load(16, 800)
    for _ in range(3):
        curves.observe(measured_round(1, rows=4, target_seconds=3.0))
        curves.observe(measured_round(16, rows=32, target_seconds=9.0))
    assert target(curves, 4, sixteen) == 3.0
    for _ in range(3):
        curves.observe(measured_round(16, rows=4, target_seconds=5.0))
    assert target(curves, 4, sixteen) == 5.0  # but its own count more
    assert target(curves, 4) == 3.0


def test_rounds_that_are_long_now_and_then_do_not_make_slow_what_rests() -> None:
    curves, rng = Curves(SIZES), random.Random(1)
    in_a_mood(curves, 1.0, 60, rows=9)
    for _ in range(6000):
        in_a_mood(curves, math.exp(abs(rng.gauss(0.0, 0.15))) * (1.5 if rng.random() < 0.1 else 1.0), 1)
    assert target(curves, 9) / target(curves, 4) == pytest.approx(7.5 / 5.0, rel=0.25)


def test_a_change_that_lasts_is_predicted() -> None:
    curves = Curves(SIZES)
    in_a_mood(curves, 1.0, 200)
    in_a_mood(curves, 3.0, 20)
    assert target(curves, 4) * curves.mood.factor == pytest.approx(15.0, rel=0.01)


def in_a_mood(curves: Curves, factor: float, rounds: int, rows: int = 4, steps: int = 4) -> None:
    for _ in range(rounds):
        curves.observe(
            measured_round(rows=rows, steps=steps, target_seconds=(3.0 + 0.5 * rows) * factor, draft_step=factor)
        )


def test_times_of_different_moods_can_be_compared() -> None:
    """The machine is slow for a while, in which another mode and other rows are new: none is thought slow for that."""
    curves = Curves(SIZES)
    in_a_mood(curves, 1.0, 60)
    in_a_mood(curves, 1.5, 30)
    assert curves.mood.factor == pytest.approx(1.5, rel=0.05)
    in_a_mood(curves, 1.5, 8, rows=1, steps=0)
    in_a_mood(curves, 1.5, 8, rows=9)
    assert target(curves, 4) == pytest.approx(5.0, rel=0.02)
    assert target(curves, 1, beside=False) == pytest.approx(3.5, rel=0.05)
    assert target(curves, 9) == pytest.approx(7.5, rel=0.05)


@pytest.mark.parametrize("looks", [False, True])
def test_what_is_wrongly_known_is_put_right_by_a_look(looks: bool) -> None:
    """Measured in its own mood, rounds of it would only look like those of a machine that is fast now."""
    curves = Curves(SIZES)
    in_a_mood(curves, 1.0, 60)
    for _ in range(8):  # in a bad moment that the mood has not noticed
        curves.observe(measured_round(rows=9, target_seconds=2 * (1.0 + 9), steps=0), looks=True)
    in_a_mood(curves, 1.0, 40)
    for _ in range(18):
        curves.observe(measured_round(rows=9, target_seconds=1.0 + 9, steps=0), looks=looks)
    found = curves.times(Load(1, 50), beside=False).target(np.array(9.0))
    assert found == pytest.approx(10.0 if looks else 20.0, rel=0.01)


def test_after_rounds_that_nobody_heard_of_the_mood_is_that_of_the_next() -> None:
    curves = Curves(SIZES)
    in_a_mood(curves, 1.0, 60)
    curves.mood.look_away()
    assert curves.mood.factor == pytest.approx(1.0, rel=0.02)
    in_a_mood(curves, 1.5, 1)
    assert curves.felt == pytest.approx(1.5, rel=0.02)
    assert curves.mood.factor == pytest.approx(1.5, rel=0.02)


def test_what_is_measured_again_after_long_stands_alone() -> None:
    curves = Curves(SIZES)
    in_a_mood(curves, 1.0, 30)
    for _ in range(10):  # cold
        curves.observe(measured_round(rows=9, target_seconds=15.0))
    in_a_mood(curves, 1.0, 300)
    in_a_mood(curves, 1.0, 3, rows=9)
    assert target(curves, 9) == pytest.approx(7.5, rel=0.02)


def test_a_prediction_rests_on_rows_about_as_many_as_were_measured_and_not_while_memory_was_cold() -> None:
    curves = Curves(SIZES)
    in_a_mood(curves, 1.0, COLD_ROUNDS - 1, rows=64)
    assert not curves.covers(ONE, True, 64)
    in_a_mood(curves, 1.0, 8, rows=64)
    assert [rows for rows in (16, 48, 56, 64, 76, 90) if curves.covers(ONE, True, rows)] == [56, 64, 76]


def test_a_stall_is_no_mood() -> None:
    curves = Curves(SIZES)
    in_a_mood(curves, 1.0, 60)
    in_a_mood(curves, 50.0, 1)
    assert curves.mood.factor < 1.15


def test_a_change_of_rows_is_no_mood() -> None:
    """Of about the same number of rows, more of them take longer."""
    curves = Curves(SIZES)
    for _ in range(60):
        in_a_mood(curves, 1.0, 1, rows=100)
        in_a_mood(curves, 1.0, 1, rows=50)
    curves.times(Load(1, 50), beside=True)
    in_a_mood(curves, 1.0, 30, rows=104)
    assert curves.mood.factor == pytest.approx(1.0, abs=0.02)


def test_the_rest_of_a_round_is_the_hosts() -> None:
    curves = Curves(SIZES)
    curves.observe(measured_round(target_seconds=5.0, steps=1, overhead=0.7))
    curves.observe(measured_round(mode="speculative", target_seconds=5.0, steps=0, overhead=0.2))
    assert curves.overhead(1, "pearl") == pytest.approx(0.7)
    assert curves.overhead(3, "speculative") == pytest.approx(0.2)
    assert Curves(SIZES).overhead(1, "pearl") == 0.0


# Calibration ----------------------------------------------------------------------------------------------------------


def calibrated(rate: float, rounds: int, tokens: int = 1) -> Calibration:
    """Of PEARL, after rounds that were predicted to give ``rate`` tokens and gave ``tokens``."""
    calibration, stretch = Calibration(), Stretch()
    for _ in range(rounds):
        if found := stretch.add(tokens, 1.0):
            calibration.observe("pearl", *found, predicted_rate=rate, batch=1)
    return calibration


def test_predictions_are_corrected_as_far_as_there_is_evidence() -> None:
    assert Calibration().factor("pearl", 1) == 1.0
    assert calibrated(1.0, 500).factor("pearl", 1) == 1.0
    found = [calibrated(1.2, rounds).factor("pearl", 1) for rounds in (0, 20, 200, 3000)]
    assert found == sorted(found, reverse=True)
    assert found[1] > 0.97  # twenty rounds of luck
    assert found[3] == pytest.approx(1 / 1.2, abs=0.04)
    assert calibrated(4.0, 100).factor("pearl", 1) < 0.4  # more than luck
    assert calibrated(4.0, 100, tokens=16).factor("pearl", 1) == 1.5  # and never beyond reason


def test_corrections_are_those_of_batches_of_that_size_and_fade_while_others_run() -> None:
    calibration = calibrated(2.0, 300)
    before = calibration.factor("pearl", 1)
    assert before < 0.8
    assert calibration.factor("pearl", 16) == 1.0
    for _ in range(5000):
        calibration.observe("speculative", tokens=1, seconds=1.0, predicted_rate=1.0, batch=1)
    assert calibration.factor("pearl", 1) > before + 0.15


def test_how_often_windows_hit_is_learnt_whatever_number_there_was() -> None:
    hits = Hits()
    before = [hits.chance(number) for number in (1, 2, 8)]
    assert before == sorted(before)
    assert 0 < before[0] < before[-1] < 1
    for _ in range(400):
        hits.observe(2, rejections=4, hits=1)
    assert hits.chance(2) == pytest.approx(0.25, abs=0.02)
    assert 0.25 < hits.chance(8) < 0.5


# Which pace an engine gets --------------------------------------------------------------------------------------


def test_the_balance_is_the_smallest_window_whose_drafting_covers_the_target() -> None:
    for ratio, window in ((4.0, 4), (4.01, 5), (1.0, 1), (0.3, 1), (7.99, 8), (40.0, 16)):
        pace = BalancedPace("pearl", 16, SIZES)
        for rows in (1, 16):
            pace.observe(measured_round(rows=rows, target_seconds=ratio))
        assert pace.decide([1], ONE, False) == Pace("pearl", (window,)), ratio


def test_the_balance_counts_what_its_own_rows_cost_the_target() -> None:
    pace = BalancedPace("pearl", 16, SIZES)
    for rows in range(1, 17):
        pace.observe(measured_round(rows=rows, target_seconds=3.0 + 0.5 * rows))
    assert pace.decide([1], ONE, False).windows == (6,)


def test_a_fixed_pace_never_changes() -> None:
    pace = FixedPace("pearl", 3)
    pace.observe(measured_round(target_seconds=100.0))
    assert pace.decide([5, 6], Load(2, 9), False) == Pace("pearl", (3, 3))
    assert not pace.changes


@pytest.mark.parametrize(
    ("options", "kind", "modes"),
    [
        ({}, AutoPace, set(METHODS)),
        ({"pre_verify": False}, AutoPace, {"whole-windows"}),
        ({"post_verify": False}, AutoPace, {"pre-verify-only"}),
        ({"pre_verify": False, "post_verify": False}, AutoPace, {"speculative"}),
        ({"method": "speculative"}, AutoPace, {"speculative"}),
        ({"pace": "balanced"}, BalancedPace, {"pearl"}),
        ({"window": 5}, FixedPace, {"pearl"}),
        ({"method": "speculative", "window": 5}, FixedPace, {"speculative"}),
        ({"method": "autoregressive"}, FixedPace, {"autoregressive"}),
    ],
)
def test_a_configuration_means_a_pace(options: dict[str, object], kind: type, modes: set[str]) -> None:
    pace = build_pace(EngineConfig(device="cpu", **options), SIZES)  # type: ignore[arg-type]
    assert type(pace) is kind
    found = set()
    for batch in (1, 2) * 40:
        decided = pace.decide(range(batch), Load(batch, 9 * batch), False)
        found.add(decided.mode)
        assert all(1 <= window <= 16 for window in decided.windows)
        if isinstance(pace, AutoPace):
            assert set(pace._modes) == modes
        pace.observe(measured_round(batch, mode=decided.mode))
    assert found <= modes
