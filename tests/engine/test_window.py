"""The draft length: the paper's rule, from measured speeds, for the batch at hand."""

from __future__ import annotations

import pytest

from pearl.engine.window import (
    FixedWindow,
    MeasuredRound,
    MeasuredWindow,
    balanced_window,
    best_sequential_window,
)


def round_of(
    batch: int = 1, draft_step: float = 1.0, target: float = 5.0, steps: int = 4, accepted: int = 3
) -> MeasuredRound:
    return MeasuredRound(batch, steps, steps * draft_step, target, tested=4, accepted=accepted)


@pytest.mark.parametrize(("ratio", "window"), [(4.0, 4), (4.01, 5), (1.0, 1), (0.3, 1), (7.99, 8)])
def test_balanced_window_is_the_smallest_whose_drafting_covers_the_target(ratio: float, window: int) -> None:
    assert balanced_window(ratio, 0.8) == window
    assert window >= ratio
    assert window == 1 or window - 1 < ratio


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0, 10.0])
def test_sequential_window_maximises_the_expected_speed(ratio: float, acceptance: float) -> None:
    def speed(g: int) -> float:
        tokens = sum(acceptance**i for i in range(g + 1))  # accepted drafts, then one of the target's own
        return tokens / (g / ratio + 1)

    best = max(speed(g) for g in range(1, 65))
    assert speed(best_sequential_window(ratio, acceptance)) == pytest.approx(best, rel=0.02)


def test_fixed_window_never_changes() -> None:
    window = FixedWindow(3)
    window.observe(round_of(target=100.0))
    assert [window.window(batch) for batch in (1, 8, 64)] == [3, 3, 3]


def test_first_guess_before_anything_is_measured_respects_the_bound() -> None:
    assert MeasuredWindow(balanced_window, 16).window(1) == 4
    assert MeasuredWindow(balanced_window, 2).window(1) == 2
    assert MeasuredWindow(balanced_window, 1).window(1) == 1


def test_measured_window_is_the_ratio_of_median_times() -> None:
    window = MeasuredWindow(balanced_window, 16)
    for target in (6.5, 6.5, 6.5, 6.5, 400.0):  # one hiccup does not count
        window.observe(round_of(target=target))
    assert window.window(1) == 7


def test_draft_time_counts_per_step() -> None:
    window = MeasuredWindow(balanced_window, 16)
    for steps in (2, 8, 5):
        window.observe(round_of(steps=steps, draft_step=2.0, target=9.0))
    assert window.window(1) == 5


@pytest.mark.parametrize(("target", "expected"), [(0.001, 1), (1000.0, 6)])
def test_window_stays_within_its_bounds(target: float, expected: int) -> None:
    window = MeasuredWindow(balanced_window, 6)
    window.observe(round_of(target=target))
    assert window.window(1) == expected


def test_rounds_where_one_model_rested_are_joined() -> None:
    """Speculative decoding drafts in one round and verifies in the next."""
    window = MeasuredWindow(balanced_window, 16)
    window.observe(MeasuredRound(1, draft_steps=4, draft_seconds=4.0, target_seconds=0.0, tested=0, accepted=0))
    assert window.window(1) == 4
    window.observe(MeasuredRound(1, draft_steps=0, draft_seconds=0.0, target_seconds=6.0, tested=4, accepted=4))
    assert window.window(1) == 6


def test_old_speeds_are_forgotten() -> None:
    window = MeasuredWindow(balanced_window, 16)
    for target in [3.0] * 30 + [9.0] * 15:
        window.observe(round_of(target=target))
    assert window.window(1) == 9


def test_batches_of_similar_size_share_their_measurements() -> None:
    window = MeasuredWindow(balanced_window, 16)
    window.observe(round_of(batch=1, target=3.0))
    window.observe(round_of(batch=8, target=9.0))
    assert [window.window(batch) for batch in (1, 8, 15)] == [3, 9, 9]
    assert window.window(100) == 9  # nothing measured there: the nearest size
    assert window.window(2) == 3


def test_acceptance_is_measured_too() -> None:
    def learned(accepted: int) -> int:
        window = MeasuredWindow(best_sequential_window, 16)
        for _ in range(50):
            window.observe(round_of(target=10.0, accepted=accepted))
        return window.window(1)

    assert learned(0) == 1
    assert learned(0) < learned(2) < learned(4)
