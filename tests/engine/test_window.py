"""The draft length: the fastest one by measured speeds and acceptance, for the batch at hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pearl.config import EngineConfig
from pearl.engine.builder import _window_policy
from pearl.engine.window import (
    FixedWindow,
    MeasuredRound,
    MeasuredWindow,
    Pace,
    Speeds,
    TokensPerSecond,
    WindowPolicy,
    balanced_window,
    fastest,
    pearl_tokens_per_second,
    sequential_tokens_per_second,
    whole_windows_tokens_per_second,
)


def round_of(
    batch: int = 1,
    draft_step: float = 1.0,
    target: float = 5.0,
    steps: int = 4,
    accepted: int = 3,
    rows: float = 4,
    overhead: float = 0.0,
) -> MeasuredRound:
    return MeasuredRound(batch, steps, steps * draft_step, rows, target, 4, accepted, overhead)


def best(speeds: Speeds, acceptance: float) -> int:
    return max(range(1, 33), key=lambda g: pearl_tokens_per_second(speeds, acceptance, g))


@pytest.mark.parametrize("acceptance", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 4.5, 8.0])
def test_where_rows_are_free_the_best_window_is_the_papers_balance(ratio: float, acceptance: float) -> None:
    window = best(Speeds(1.0, ratio), acceptance)
    assert ratio - 1 < window < ratio + 1


def test_where_rows_cost_something_a_window_is_no_longer_than_it_pays() -> None:
    assert best(Speeds(1.0, 8.0, target_row=0.5), 0.6) < 8
    assert best(Speeds(1.0, 8.0, target_row=0.5), 0.95) > best(Speeds(1.0, 8.0, target_row=0.5), 0.6)


@dataclass(frozen=True)
class Fixed(FixedWindow):
    pre_verify: bool

    def pre_verifies(self, batch: int) -> bool:
        return self.pre_verify


def serve(
    policy: WindowPolicy, speeds: Speeds, acceptance: Callable[[int], float], rounds: int, seed: int = 0
) -> Iterator[tuple[int, float]]:
    """Tokens and seconds of PEARL's rounds, for one request, with this acceptance rate in round n."""
    rng, pending = random.Random(seed), 0
    for number in range(rounds):
        window, verifies = policy.window(1), pending > 0 or policy.pre_verifies(1)
        drafting, target = window * speeds.draft_step, speeds.target(pending + 1) if verifies else 0.0
        tested, rate = pending + 1 if verifies else 0, acceptance(number)
        held = next((i for i in range(tested) if rng.random() >= rate), tested)
        policy.observe(MeasuredRound(1, window, drafting, tested, target, min(tested, held + 1), held, speeds.overhead))
        yield min(held + 1, tested), max(drafting, target) + speeds.overhead
        pending = 0 if held < tested else window - 1 if verifies else window


def speed_of(rounds: Iterable[tuple[int, float]]) -> float:
    tokens, seconds = zip(*rounds, strict=True)
    return float(sum(tokens)) / sum(seconds)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.9])
@pytest.mark.parametrize(
    ("expected", "pre_verify", "draft_step"),
    [(pearl_tokens_per_second, True, 0.4), (whole_windows_tokens_per_second, False, 0.1)],
    ids=("pearl", "whole windows"),
)
def test_the_expected_speed_is_what_a_simulation_gives(
    expected: TokensPerSecond, pre_verify: bool, draft_step: float, window: int, acceptance: float
) -> None:
    speeds = Speeds(draft_step, target_base=1.0, target_row=0.1, overhead=0.2)
    found = speed_of(serve(Fixed(window, pre_verify), speeds, lambda number: acceptance, 60_000))
    assert expected(speeds, acceptance, window) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.9])
def test_the_expected_speed_of_taking_turns(window: int, acceptance: float) -> None:
    speeds = Speeds(draft_step=0.5, target_base=3.0, target_row=0.1, overhead=0.2)
    tokens = sum(acceptance**i for i in range(window + 1))  # accepted drafts, then one of the target's own
    seconds = 0.5 * window + 3.0 + 0.1 * (window + 1) + 0.4
    assert sequential_tokens_per_second(speeds, acceptance, window) == pytest.approx(tokens / seconds)


def measured(draft_step: float, **options: Any) -> WindowPolicy:
    policy = _window_policy(EngineConfig(device="cpu", **options))
    for rows in (1, 6) * 10:
        policy.observe(round_of(draft_step=draft_step, rows=rows, target=6.0 + 0.1 * rows))
    return policy


@pytest.mark.parametrize(("draft_step", "pre_verifies"), [(0.1, False), (2.0, True)])
def test_a_cheap_draft_writes_its_window_before_the_target_works(draft_step: float, pre_verifies: bool) -> None:
    policy = measured(draft_step, window_rule="fastest")
    assert policy.pre_verifies(1) is pre_verifies
    assert policy.pre_verifies(2)  # the target works anyway, for the other


@pytest.mark.parametrize(
    ("options", "pre_verifies"),
    [
        ({}, True),
        ({"window": 4, "window_rule": "fastest"}, True),
        ({"window_rule": "fastest", "post_verify": False}, True),
        ({"window_rule": "fastest", "pre_verify": False}, False),
        ({"window_rule": "fastest", "pre_verify": False, "post_verify": False}, False),
    ],
)
def test_only_the_fastest_rule_decides_about_pre_verify(options: dict[str, Any], pre_verifies: bool) -> None:
    assert measured(0.1, **options).pre_verifies(1) is pre_verifies


def test_a_window_of_the_right_length_for_each_way() -> None:
    """What the fastest rule takes is the best of both formulas."""
    choose = fastest(pre_verified=pearl_tokens_per_second, whole=whole_windows_tokens_per_second)
    for draft_step in (0.05, 0.2, 0.5, 1.5):
        speeds = Speeds(draft_step, 4.0, target_row=0.05, overhead=0.3)
        pace = choose(speeds, 0.8, 16)
        formula = pearl_tokens_per_second if pace.pre_verify else whole_windows_tokens_per_second
        best_of_all = max(
            rate(speeds, 0.8, g)
            for rate in (pearl_tokens_per_second, whole_windows_tokens_per_second)
            for g in range(1, 17)
        )
        assert formula(speeds, 0.8, pace.window) == best_of_all


class TwoPasses(Speeds):
    """Nine rows and more pass over the weights twice."""

    def target(self, rows: int) -> float:
        return super().target(rows) + (0.15 if rows > 8 else 0.0)


def test_what_is_measured_leads_to_nearly_the_best_pace() -> None:
    """Although the rows' cost is no straight line and acceptance changes."""
    speeds, rng = TwoPasses(0.042, 0.6, 0.015, overhead=0.14), random.Random(1)
    rates = [rng.choice((0.7, 0.8, 0.9)) for _ in range(20)]

    def served(policy: WindowPolicy) -> float:
        rounds = serve(policy, speeds, lambda number: rates[number // 60], 1200, seed=2)
        return speed_of(itertools.islice(rounds, 400, None))

    best_fixed = max(served(Fixed(g, pre)) for g in range(1, 17) for pre in (True, False))
    assert served(_window_policy(EngineConfig(device="cpu", window_rule="fastest"))) > 0.985 * best_fixed


@pytest.mark.parametrize(("ratio", "window"), [(4.0, 4), (4.01, 5), (1.0, 1), (0.3, 1), (7.99, 8), (40.0, 16)])
def test_balanced_window_is_the_smallest_whose_drafting_covers_the_target(ratio: float, window: int) -> None:
    assert balanced_window(Speeds(1.0, ratio), 0.8, 16) == Pace(window)


@pytest.mark.parametrize("row", [0.1, 0.5, 0.9, 2.0])
def test_balanced_window_counts_what_its_own_rows_cost_the_target(row: float) -> None:
    speeds = Speeds(1.0, 3.0, target_row=row)
    window = balanced_window(speeds, 0.8, 16).window
    assert window == 16 or window * speeds.draft_step >= speeds.target(window)
    assert all(g * speeds.draft_step < speeds.target(g) for g in range(1, window))


@pytest.mark.parametrize(
    ("options", "window"), [({}, 6), ({"window_rule": "fastest"}, 3), ({"method": "speculative"}, 1)]
)
def test_auto_is_the_balance_unless_the_fastest_is_asked_for(options: dict[str, Any], window: int) -> None:
    policy = _window_policy(EngineConfig(device="cpu", **options))
    for rows in (1, 6) * 10:
        policy.observe(round_of(rows=rows, target=3.0 + 0.5 * rows, accepted=2))
    assert policy.window(1) == window


def test_fixed_window_never_changes() -> None:
    window = FixedWindow(3)
    window.observe(round_of(target=100.0))
    assert [window.window(batch) for batch in (1, 8, 64)] == [3, 3, 3]


def test_first_guess_before_anything_is_measured_respects_the_bound() -> None:
    assert [
        MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), largest).window(1) for largest in (16, 2, 1)
    ] == [4, 2, 1]


def test_one_hiccup_does_not_count() -> None:
    window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 16)
    for target in (7.0, 7.0, 7.0, 7.0, 400.0):
        window.observe(round_of(target=target))
    assert window.window(1) == 7


def test_draft_time_counts_per_step() -> None:
    window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 16)
    for steps in (2, 8, 5):
        window.observe(round_of(steps=steps, draft_step=2.0, target=10.0))
    assert window.window(1) == 5


def test_what_a_row_costs_is_learnt_from_rounds_of_different_length() -> None:
    def learned(row: float) -> int:
        window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 16)
        for rows in (1, 4, 8, 1, 6, 3):
            window.observe(round_of(rows=rows, target=8.0 + row * rows, accepted=2))
        return window.window(1)

    assert learned(0.0) == 8
    assert learned(1.0) < 8


def test_a_rounds_overhead_makes_longer_windows_worthwhile() -> None:
    def learned(overhead: float) -> int:
        window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 16)
        window.observe(round_of(target=2.0, overhead=overhead))
        return window.window(1)

    assert learned(20.0) > learned(0.0)


@pytest.mark.parametrize(("target", "expected"), [(0.001, 1), (1000.0, 6)])
def test_window_stays_within_its_bounds(target: float, expected: int) -> None:
    window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 6)
    window.observe(round_of(target=target, accepted=4))
    assert window.window(1) == expected


def test_rounds_where_one_model_rested_are_joined() -> None:
    """Speculative decoding drafts in one round and verifies in the next."""
    window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 16)
    window.observe(MeasuredRound(1, 4, 4.0, target_rows=0, target_seconds=0.0, tested=0, accepted=0))
    assert window.window(1) == 4  # the first guess: half is not enough
    window.observe(MeasuredRound(1, 0, 0.0, target_rows=5, target_seconds=6.0, tested=4, accepted=4))
    assert window.window(1) == 6


def test_old_speeds_are_forgotten() -> None:
    window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 16)
    for target in [3.0] * 60 + [9.0] * 36:
        window.observe(round_of(target=target))
    assert window.window(1) == 9


def test_batches_of_similar_size_share_their_measurements() -> None:
    window = MeasuredWindow(fastest(pre_verified=pearl_tokens_per_second), 16)
    window.observe(round_of(batch=1, target=3.0))
    window.observe(round_of(batch=8, target=9.0))
    assert [window.window(batch) for batch in (1, 8, 15)] == [3, 9, 9]
    assert window.window(100) == 9  # nothing measured there: the nearest size
    assert window.window(2) == 3


@pytest.mark.parametrize("rate", [pearl_tokens_per_second, sequential_tokens_per_second])
def test_acceptance_is_measured_too(rate: object) -> None:
    def learned(accepted: int) -> int:
        window = MeasuredWindow(fastest(pre_verified=rate), 16)  # type: ignore[arg-type]
        for rows in (1, 5) * 25:
            window.observe(round_of(target=10.0 + rows, rows=rows, accepted=accepted))
        return window.window(1)

    assert learned(0) <= 2
    assert learned(0) < learned(2) < learned(4)
