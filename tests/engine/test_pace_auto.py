"""The automatic pace in simulated service: near the best that there is, steady, and quick to learn."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from pace_sim import LARGEST, Batch, Machine, auto, served
from pace_support import SIZES, measured_round
from test_pace_speed import ALONE, situation

from pearl.methods import METHODS, Mode
from pearl.pace import AutoPace, FixedPace, Load, MeasuredRound, Pace, Progressed, Sizes
from pearl.pace.acceptance import Odds
from pearl.pace.curves import COLD_ROUNDS
from pearl.pace.speed import tokens_per_second


def candidates(batch: int) -> list[tuple[Mode, int]]:
    modes = [mode for mode in METHODS if batch == 1 or mode not in ALONE]
    return [(mode, g) for mode in modes for g in range(1, LARGEST + 1) if mode != "autoregressive" or g == 1]


def value(pace: Pace, machine: Machine, batch: int, odds: Odds, pinned: bool) -> float:
    now = situation(machine, batch, odds, pinned)
    return float(tokens_per_second(pace.mode, now, np.array([[float(np.mean(pace.windows))]]))[0])


def share_of_the_best(machine: Machine, batch: int, odds: Odds, pinned: bool, seed: int) -> float:
    """Of what is settled on after 64 rounds, over exhaustive search with the true speeds and odds."""
    policy = auto(machine)
    for _ in Batch(machine, batch, lambda *_: odds, pinned, seed).serve(policy, 64):
        pass
    policy._decisions.clear()
    policy._latest = None  # what it would choose now, if it were not to look at what it does not know
    policy._probe = policy._hope = lambda *_: None  # type: ignore[method-assign, assignment]
    pace = policy.decide(range(batch), Load(batch, 100 * batch), pinned)
    best = max(value(Pace(m, (g,) * batch), machine, batch, odds, pinned) for m, g in candidates(batch))
    return value(pace, machine, batch, odds, pinned) / best


@pytest.mark.parametrize("batch", [1, 4, 32, 128])
def test_after_64_rounds_the_choice_is_nearly_that_of_exhaustive_search(batch: int) -> None:
    """Within 2 % nearly everywhere; a request alone has shown 64 tokens' luck by then, and cannot be known better."""
    found = []
    for a, c, row, pinned in itertools.product((0.3, 0.5, 0.8, 0.95), (2, 8, 30), (0.0, 0.02, 0.2), (False, True)):
        machine = Machine(1.0, c * (1 - row), c * row, 0.05 * c, noise=0.03)
        found.append(share_of_the_best(machine, batch, Odds(a, a), pinned, seed=1))
    assert np.mean(np.array(found) >= 0.98) >= (0.8 if batch == 1 else 0.85)
    assert np.mean(found) > 0.985
    assert min(found) > 0.85


def changing(rates: Sequence[float], period: int) -> Callable[[int, int], Odds]:
    return lambda _, number: Odds(rates[number // period % len(rates)], rates[number // period % len(rates)])


@pytest.mark.parametrize("batch", [1, 8])
def test_where_acceptance_changes_it_keeps_up(batch: int) -> None:
    """On average at least 95 % of the best fixed choice, which knows what is to come."""
    machine, found = Machine(1.0, 9.0, 0.25, 0.8, noise=0.03), []
    for seed in range(1, 4):
        rng = random.Random(seed)
        odds = changing([rng.choice((0.5, 0.7, 0.9)) for _ in range(8)], 150)
        best = max(
            served(FixedPace(mode, g), Batch(machine, batch, odds), 1200, 150)
            for mode, g in candidates(batch)
            if g in (2, 4, 8)
        )
        found.append(served(auto(machine), Batch(machine, batch, odds), 1200, 150) / best)
    assert np.mean(found) > 0.95


@pytest.mark.parametrize(
    ("machine", "batch", "odds", "best"),
    [
        (Machine(1.0, 15.0, 0.6, 3.5, beside=1.45), 64, Odds(0.74, 0.78), ("autoregressive", 1)),
        (Machine(1.0, 9.0, 0.4, 0.5, beside=1.38), 4, Odds(0.55, 0.57), ("speculative", 1)),
        (Machine(1.0, 5.0, 0.2, 0.5, beside=1.1), 4, Odds(0.75, 0.8), ("pearl", 4)),
    ],
)
def test_a_machine_whose_speed_wanders(machine: Machine, batch: int, odds: Odds, best: tuple[Mode, int]) -> None:
    """By a third, for some hundred rounds at a time: that one mode ran in bad times must not speak against it."""
    fixed = served(FixedPace(*best), Batch(machine, batch, lambda *_: odds), 900, 100)
    wanders = replace(machine, noise=0.1, wanders=0.3)
    found = [served(auto(machine), Batch(wanders, batch, lambda *_: odds, seed=seed), 900, 100) for seed in (1, 2)]
    assert min(found) > 0.95 * fixed


def test_it_switches_off_under_load_and_on_again() -> None:
    """Rows are dear at 64 requests: drafting costs more than it brings. At one request it pays."""
    machine, odds = Machine(0.2, 4.0, 0.5, 0.1, beside=1.3, noise=0.02), Odds(0.6, 0.6)
    policy = auto(machine)
    seen = []
    for batch in (1, 64, 1, 64):
        for _ in Batch(machine, batch, lambda *_: odds).serve(policy, 120):
            pass
        seen.append(policy.decide(range(batch), Load(batch, 100 * batch), False).mode)
    assert seen[1] == seen[3] == "autoregressive"
    assert "autoregressive" not in (seen[0], seen[2])


def test_a_batch_that_shrinks_stays_at_plain_decoding_for_a_while() -> None:
    """Its last tokens would not pay for the draft's catching up; what goes on for longer is drafted again."""
    machine, odds = Machine(0.2, 4.0, 0.5, 0.1, beside=1.3, noise=0.02), Odds(0.6, 0.6)
    policy = auto(machine)
    for batch in (1, 64):
        for _ in Batch(machine, batch, lambda *_: odds).serve(policy, 120):
            pass
    modes = []
    for batch, rounds in ((16, 5), (2, 60)):
        for _ in Batch(machine, batch, lambda *_: odds).serve(policy, rounds):
            modes.append(policy._running.mode)  # type: ignore[union-attr]
    assert set(modes[:16]) == {"autoregressive"}
    assert "autoregressive" not in modes[20:]


def test_it_does_not_waver_between_paces_of_about_the_same_speed() -> None:
    machine, odds = Machine(1.0, 5.0, 0.1, 0.3, noise=0.1), Odds(0.75, 0.75)
    policy = auto(machine)
    modes: list[str] = []
    for _ in Batch(machine, 4, lambda *_: odds).serve(policy, 3000):
        modes.append(policy._running.mode)  # type: ignore[union-attr]
    changes = sum(a != b for a, b in itertools.pairwise(modes[200:]))
    assert changes < 2 * 12 * len(METHODS)  # there and back, for what is looked at once in 256 rounds
    assert modes[200:].count(statistics.mode(modes[200:])) > 0.9 * len(modes[200:])


def test_easy_and_hard_requests_of_a_batch_get_windows_of_different_length() -> None:
    machine = Machine(1.0, 9.0, 0.3, 0.2, noise=0.02)
    policy = AutoPace(["pearl"], LARGEST, SIZES)
    odds = [Odds(0.3, 0.3), Odds(0.95, 0.95)]
    for _ in Batch(machine, 8, lambda i, _: odds[i % 2]).serve(policy, 400):
        pass
    windows = policy.decide(range(8), Load(8, 800), False).windows
    assert max(windows[::2]) < min(windows[1::2])


def test_a_stall_of_the_machine_says_nothing_of_the_mode_in_which_it_fell() -> None:
    """As of Python's garbage collection: a hundred rounds long."""
    machine, odds = Machine(1.0, 5.0, 0.1, 0.3, noise=0.03), Odds(0.75, 0.75)
    calm, stalled = auto(machine), auto(machine)
    for policy in (calm, stalled):
        for _ in Batch(machine, 1, lambda *_: odds).serve(policy, 600):
            pass
        mode = policy._latest.best.mode  # type: ignore[union-attr]
        policy.observe(measured_round(mode=mode, rows=6, target_seconds=600.0 if policy is stalled else 5.6, steps=5))
        assert min(policy._calibration.factor(other, 1) for other in METHODS) > 0.95
        for _ in Batch(machine, 1, lambda *_: odds, seed=1).serve(policy, 200):
            pass
    assert stalled._latest.best.rate == pytest.approx(calm._latest.best.rate, rel=0.05)  # type: ignore[union-attr]


def test_a_prediction_is_judged_by_batches_of_about_that_size() -> None:
    """Twenty requests get as much done as thirty only if the prediction for thirty was wrong."""
    machine, policy = Machine(1.0, 5.0, 0.1, 0.3, noise=0.03), AutoPace(["pearl"], LARGEST, SIZES)
    for _ in Batch(machine, 30, lambda *_: Odds(0.75, 0.75)).serve(policy, 200):
        pass
    before = policy._calibration.factor("pearl", 30)
    for batch, changes in ((20, False), (29, True)):
        for _ in range(40):
            policy._asked += 1  # and its choice stayed
            policy.observe(measured_round(batch, rows=60, target_seconds=11.0, steps=4))
        assert (policy._calibration.factor("pearl", 30) != before) is changes


def test_what_rows_cost_that_nobody_has_seen_is_a_guess_that_is_soon_looked_at() -> None:
    """Rows were dear while memory was cold, which is forgotten: then longer windows look free, for a few rounds."""
    policy = AutoPace(("pearl",), LARGEST, SIZES)
    held, most, spans = [Progressed(index, 1, 1, 1) for index in range(16)], 1, []
    for number in range(100):
        rows = sum(policy.decide(range(16), Load(16, 1600), False).windows)
        if number >= COLD_ROUNDS and rows > 1.3 * most:
            spans.append(policy._until - policy._rounds)
        most = max(most, rows) if number >= COLD_ROUNDS else rows
        policy.observe(measured_round(16, rows=rows, target_seconds=0.25 * rows, steps=1, requests=held))
    assert spans
    assert max(spans) <= 6


def test_rounds_between_prompts_are_not_judged_alone() -> None:
    """Where the target's rounds have prompts, only those are heard of in which nothing is committed."""
    machine, odds = Machine(1.0, 5.0, 0.1, 0.3, noise=0.03), Odds(0.75, 0.75)
    policy = AutoPace(("speculative",), LARGEST, SIZES)
    for _ in Batch(machine, 8, lambda *_: odds).serve(policy, 300):
        pass
    before = policy._calibration.factor("speculative", 8)
    for number in range(200):
        policy.decide(range(8), Load(8, 800), False)
        if number % 2:
            policy.observe(measured_round(8, mode="speculative", rows=0, target_seconds=0.0, steps=4, requests=()))
    assert policy._calibration.factor("speculative", 8) == before


def test_a_slow_machine_is_no_fault_of_a_prediction() -> None:
    policy, found = AutoPace(("pearl",), LARGEST, SIZES), []
    for slow in (1.0, 2.0):
        for _ in range(150):
            windows = policy.decide(range(8), Load(8, 800), False).windows
            rows, steps = sum(windows), max(windows)
            policy.observe(measured_round(8, rows=rows, target_seconds=5.0 * slow, steps=steps, draft_step=slow))
            found.append(policy._calibration.factor("pearl", 8))
    assert min(found[100:150]) != 1.0
    assert found[-1] == pytest.approx(found[149], rel=0.02)
    assert min(found[150:]) > 0.98 * found[149]


@pytest.mark.parametrize(("batch", "heard"), [(1, 64), (64, 16)])
def test_it_listens_to_the_last_rounds_before_a_choice_to_fewer_of_many_requests(batch: int, heard: int) -> None:
    policy, listening = AutoPace(("pearl",), LARGEST, SIZES), list[bool]()
    policy._probe = policy._hope = lambda *_: None  # type: ignore[method-assign, assignment]
    for _ in range(1200):
        policy._deciding, policy._round = 1.0, 1.0  # so that a choice is kept for 200 rounds
        policy.decide(range(batch), Load(batch, 100 * batch), False)
        listening.append(policy.listens)
        if policy.listens:
            policy.observe(measured_round(batch, rows=4 * batch))
    stretches = [len(list(rounds)) for listens, rounds in itertools.groupby(listening) if listens]
    assert heard - 1 <= stretches[-2] <= heard


def test_what_was_looked_at_in_a_bad_moment_is_looked_at_again() -> None:
    """All of a mode's first rounds take twice as long; nobody can tell that from the mode."""
    machine, odds = Machine(1.0, 15.0, 0.6, 3.5, beside=1.45, noise=0.02), Odds(0.6, 0.6)
    policy, seen = auto(machine), 0
    observe = policy.observe

    def in_a_bad_moment(measured: MeasuredRound) -> None:
        nonlocal seen
        plain = measured.mode == "autoregressive"
        seen += plain
        slow = 1.9 if plain and seen <= 8 else 1.0
        observe(measured._replace(target_seconds=slow * measured.target_seconds, seconds=slow * measured.seconds))

    policy.observe = in_a_bad_moment  # type: ignore[method-assign]
    for _ in Batch(machine, 64, lambda *_: odds).serve(policy, 1500):
        pass
    assert seen > 8
    assert policy._latest is not None
    assert policy._latest.best.mode == "autoregressive"


def test_a_mode_that_never_keeps_its_promise_is_left() -> None:
    """A drafter that is mostly dry gives fewer tokens than its acceptance and windows let expect."""
    policy = AutoPace(("autoregressive", "speculative"), 8, SIZES)
    chosen: list[str] = []
    drafting = False
    for _ in range(2000):
        pace = policy.decide([1], Load(1, 100), False)
        chosen.append(pace.mode)
        drafting = pace.mode == "speculative" and not drafting
        if drafting:
            policy.observe(measured_round(mode=pace.mode, rows=0, target_seconds=0.0, draft_step=0.5, requests=()))
            continue
        held = [Progressed(1, 0, 0, 1)] if pace.mode == "autoregressive" else [Progressed(1, 1, 1, 1)]
        rows = 1 if pace.mode == "autoregressive" else 9
        policy.observe(measured_round(mode=pace.mode, rows=rows, target_seconds=5.0, steps=0, requests=held))
    assert chosen[:100].count("speculative") > 50
    assert chosen[-1000:].count("autoregressive") > 850


@pytest.mark.parametrize(("row", "hits", "pays"), [(0.01, 0.75, True), (0.9, 0.1, False)])
def test_windows_are_prepared_where_that_pays(row: float, hits: float, pays: bool) -> None:
    machine = Machine(1.0, 5.0, 0.1, 0.2, noise=0.05, draft_row=row, hits=hits)
    policy = AutoPace(("pearl",), LARGEST, SIZES, most_prepared=16)
    plain = AutoPace(("pearl",), LARGEST, SIZES)
    odds = Odds(0.55, 0.8)
    found = served(policy, Batch(machine, 1, lambda *_: odds), 2000, 200)
    without = served(plain, Batch(machine, 1, lambda *_: odds), 2000, 200)
    assert found > (1.05 if pays else 0.95) * without
    assert (policy.decide([0], Load(1, 100), False).branches > 0) is pays
    assert plain.decide([0], Load(1, 100), False).branches == 0


def test_before_anything_is_measured_sizes_decide() -> None:
    for ratio, shortest in ((2, 1), (16, 5)):
        pace = AutoPace(["pearl"], LARGEST, Sizes(ratio * 10**9, 10**9)).decide([1], Load(1, 100), False)
        assert shortest <= pace.windows[0] <= ratio + 1


def test_new_requests_get_the_windows_of_the_others() -> None:
    machine, odds = Machine(1.0, 9.0, 0.1, noise=0.02), Odds(0.8, 0.8)
    policy = AutoPace(["pearl"], LARGEST, SIZES)
    for _ in Batch(machine, 4, lambda *_: odds).serve(policy, 100):
        pass
    windows = policy.decide([0, 1, 2, 99], Load(4, 400), False).windows
    assert len(windows) == 4
    assert min(windows[:3]) <= windows[3] <= max(windows[:3])


def test_batches_of_other_sizes_do_not_change_a_requests_window() -> None:
    """A second one comes and goes; for two plain decoding is best."""
    policy = AutoPace(tuple(METHODS), LARGEST, SIZES)
    alone = [Progressed(0, 4, 4, 4)]
    for _ in range(100):
        pace = policy.decide([0], Load(1, 50), False)
        policy.observe(measured_round(1, mode=pace.mode, rows=4, target_seconds=9.0, draft_step=0.1, requests=alone))
    before = policy.decide([0], Load(1, 50), False)
    assert before.windows[0] > 1
    policy._decisions[2, False] = replace(
        policy._decisions[1, False], choice=replace(policy._decisions[1, False].choice, mode="autoregressive"),
        windows={0: 1, 1: 1}, typical=1,
    )  # fmt: skip
    assert policy.decide([0, 1], Load(2, 100), False).windows == (1, 1)
    later = [policy.decide([0], Load(1, 50), False) for _ in range(20)]  # it lingers where it was
    assert later[0].mode == "autoregressive"
    assert later[-1] == before


def test_predictions_are_not_judged_while_requests_are_as_another_mode_left_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, judged, modes = auto(MACHINE), [], []
    monkeypatch.setattr(policy._calibration, "observe", lambda *_: judged.append(policy._asked))
    for _ in Batch(MACHINE, 4, lambda *_: Odds(0.8, 0.8)).serve(policy, 500):
        modes.append(policy._running.mode)  # type: ignore[union-attr]
    assert len(set(modes)) > 2
    assert len(judged) > 8
    assert all(number > 14 and len(set(modes[number - 14 : number])) == 1 for number in judged)


def test_an_empty_batch_needs_no_decision() -> None:
    assert auto(MACHINE).decide([], Load(0, 0), False).windows == ()


MACHINE = Machine()
