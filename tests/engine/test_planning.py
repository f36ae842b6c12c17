"""What methods are expected to bring: against simulated rounds, closed forms and data sheets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from pace_sim import Batch, Machine, speed

from pearl.bench.shapes import SHAPES
from pearl.errors import ConfigurationError
from pearl.methods import Mode
from pearl.models.weight_size import weight_bytes
from pearl.pace import FixedPace
from pearl.pace.acceptance import Odds
from pearl.planning import GPUS, Costs, Forecast, costs_on, forecast
from pearl.planning.forecast import speeds


def of(found: list[Forecast], method: str) -> Forecast:
    return next(one for one in found if one.method == method)


@pytest.mark.parametrize(("acceptance", "ratio", "row"), [(0.6, 4.0, 0.0), (0.8, 8.0, 0.1), (0.9, 20.0, 0.5)])
@pytest.mark.parametrize("mode", ["speculative", "pearl", "whole-windows", "pre-verify-only"])
def test_expected_speeds_are_those_of_simulated_rounds(mode: Mode, acceptance: float, ratio: float, row: float) -> None:
    one = of(forecast(Costs.measured(ratio, row, 1.0), acceptance), mode)
    machine = Machine(1.0, ratio - row, row)
    served = Batch(machine, 1, lambda *_: Odds(acceptance, acceptance), seed=3).serve(FixedPace(mode, one.window), 8000)
    assert one.tokens_per_second == pytest.approx(speed(served), rel=0.05)


def test_the_window_is_the_best_one() -> None:
    costs = Costs.measured(8.0, 0.1, 1.0)
    for one in forecast(costs, 0.8)[1:]:
        curve = speeds(one.mode, costs, 0.8, range(1, 17))
        assert one.tokens_per_second == max(curve) == curve[one.window - 1]


def test_taking_turns_is_leviathans_formula() -> None:
    """arXiv 2211.17192, theorem 3.8: (1 - a^(g+1)) / ((1 - a) (g / c + 1))."""
    a, c = 0.8, 10.0
    one = of(forecast(Costs.measured(c, 0.0, 1.0), a), "speculative")
    tokens = (1 - a ** (one.window + 1)) / (1 - a)
    assert one.tokens_per_forward == pytest.approx(tokens)
    assert one.speedup == pytest.approx(tokens / (one.window / c + 1))


def test_where_the_models_balance_overlap_wins_and_prepared_windows_more() -> None:
    found = forecast(Costs.measured(0.025, 0.0, 0.003), 0.8, hits=0.6)
    speedups = [of(found, name).speedup for name in ("autoregressive", "speculative", "pearl", "pearl, prepared")]
    assert speedups == sorted(speedups)
    assert speedups[0] == 1.0


def test_rows_that_are_dear_make_plain_decoding_the_best() -> None:
    found = forecast(Costs.measured(1.0, 0.9, 0.5), 0.6)
    assert max(one.speedup for one in found) == pytest.approx(1.0)


def test_several_requests_and_their_modes() -> None:
    found = forecast(Costs.measured(20.0, 0.5, 1.0), 0.8, batch=16)
    assert [one.method for one in found] == ["autoregressive", "speculative", "two-halves", "pearl"]
    assert of(found, "autoregressive").tokens_per_second == pytest.approx(16 / (20.0 + 15 * 0.5))


def test_a_gpus_forward_reads_all_weights_until_arithmetic_is_the_limit() -> None:
    import torch

    target, draft = (weight_bytes(SHAPES[name], torch.bfloat16) for name in ("70b", "1b"))
    costs = costs_on(GPUS["h100"], target, draft, target_gpus=2, share=0.8)
    assert costs.target(1) == costs.target(8) == pytest.approx(target / 2 / (0.8 * 3.35e12))
    assert costs.step == pytest.approx(draft / (0.8 * 3.35e12))
    assert costs.target(4096) > 5 * costs.target(1)
    assert costs_on(GPUS["h200"], target // 2, draft).target(1) < costs.target(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Costs.measured(0.0, 0.0, 1.0), "target"),
        (lambda: Costs.measured(1.0, 0.0, float("nan")), "draft"),
        (lambda: Costs.measured(1.0, -1.0, 1.0), "rows"),
        (lambda: Costs.measured(1.0, 0.0, 1.0, beside=0.5), "beside"),
        (lambda: forecast(Costs.measured(1.0, 0.0, 1.0), 1.0), "acceptance"),
        (lambda: forecast(Costs.measured(1.0, 0.0, 1.0), 0.5, hits=1.0), "hits"),
        (lambda: forecast(Costs.measured(1.0, 0.0, 1.0), 0.5, batch=0), "batch"),
        (lambda: costs_on(GPUS["a10"], 141 * 10**9, 10**9), "141.0 GB of a GPU that has 24"),
        (lambda: costs_on(GPUS["a10"], 10**9, 10**9, share=0.0), "share"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_forecasts_grow_with_acceptance() -> None:
    costs = Costs.measured(10.0, 0.0, 1.0)
    for low, high in itertools.pairwise(forecast(costs, a) for a in (0.3, 0.5, 0.7, 0.9)):
        assert all(one.speedup <= other.speedup for one, other in zip(low, high, strict=True))


def test_a_mixture_s_rows_read_the_experts_that_they_meet() -> None:
    """One row as a dense model of what it reads; more rows read more, at most everything."""
    gpu, held = GPUS["h100"], 90 * 10**9

    def reads(rows: float) -> float:
        return min(held, 20e9 + 8e9 * rows)

    mixture, dense = costs_on(gpu, held, 10**9, 2, target_reads=reads, draft_reads=3e8), costs_on(gpu, held, 10**9, 2)
    alike = costs_on(gpu, 28 * 10**9, 3 * 10**8, 2)
    assert mixture.target(1) == pytest.approx(alike.target(1))
    assert mixture.step == pytest.approx(alike.step)
    assert mixture.target(1) < mixture.target(3) < mixture.target(8) < dense.target(8) == mixture.target(20)
    with pytest.raises(ConfigurationError, match=r"90\.0 GB of a GPU that has 80"):  # all of it has to fit
        costs_on(gpu, held, 10**9, target_reads=reads)
