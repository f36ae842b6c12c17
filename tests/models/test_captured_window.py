"""Windows drafted by captured calls: those that are drafted token by token, with branches, whatever pads the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, load
from window_support import COPIES, GREEDY, HOT, LANES, LATE_COPIES, ROUNDS, Drafting, branching, item

from pearl.messages import Drafted, DraftProposal, Windows
from pearl.models import Decoder
from pearl.sampling_params import SamplingParams
from pearl_kernels import Rule

both_rules = pytest.mark.parametrize("rule", ["rejection", "coupled"])
PENALISED = SamplingParams(temperature=0.9, repetition_penalty=1.2)


@pytest.fixture(params=["llama", "mistral-window"], scope="module")
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(path)
    return load(path)


def both(decoder: Decoder, rule: Rule) -> tuple[Drafting, Drafting]:
    """Token by token, and captured: all that can come up is captured before."""
    step_by_step, captured = (
        Drafting(decoder, rule, fused=False, slots=LANES + 5, captured=captured) for captured in (False, True)
    )
    with torch.inference_mode():
        for capture in captured.drafter.captures():
            capture()
    assert all(memory.isnan().all() for memory in captured.memory()[:-1])
    return step_by_step, captured


def assert_alike(expected: Windows, found: Windows) -> None:
    assert found.keys() == expected.keys()
    for key, window in expected.items():
        assert len(window) == len(found[key])
        for one, other in zip(window, found[key], strict=True):
            assert (other.token, other.row) == (one.token, one.row)
            assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
            assert_ranked_alike(one, other)


def assert_ranked_alike(one: Drafted, other: Drafted) -> None:
    assert (one.ranked is None) == (other.ranked is None)
    if one.ranked is not None and other.ranked is not None:
        assert other.ranked.tokens == one.ranked.tokens
        assert other.ranked.drawn == pytest.approx(one.ranked.drawn, abs=1e-4)
        assert other.ranked.scores == pytest.approx(one.ranked.scores, abs=1e-4)


def propose(drafting: tuple[Drafting, Drafting], *work: Any, **plan: Any) -> DraftProposal:
    """By both, to the same. Nothing else is written, but for the ring's last row, which is nobody's."""
    graphs = drafting[1].drafter._graphs
    assert graphs is not None
    before = len(graphs._graphs)
    expected, found = (one.propose(work, **plan) for one in drafting)
    assert_alike(expected.windows, found.windows)
    assert_alike(expected.prepared, found.prepared)
    assert len(graphs._graphs) == before
    for one, other in zip(*(each.memory() for each in drafting), strict=True):
        kept = slice(None, -1 if one.dim() == 2 else None)
        torch.testing.assert_close(other[kept], one[kept], equal_nan=True, atol=1e-4, rtol=1e-4)
    return found


@both_rules
def test_windows(decoder: Decoder, rule: Rule) -> None:
    drafting = both(decoder, rule)
    for work in ROUNDS:
        propose(drafting, *work)
        propose(drafting, *work, alternatives=2)


@both_rules
@pytest.mark.parametrize(
    "params", [GREEDY, HOT, SamplingParams(temperature=0.9, top_k=2)], ids=("greedy", "hot", "narrow")
)
def test_branches(decoder: Decoder, rule: Rule, params: SamplingParams) -> None:
    """Of top_k = 2 there is one alternative: what hangs on another one is not drafted, and no other branch suffers."""
    drafting = both(decoder, rule)
    propose(drafting, item(0, 0, 8, 0), item(1, 0, 9, 0))
    found = propose(drafting, *branching(params), copies=COPIES, late_copies=LATE_COPIES, alternatives=3)
    narrow = params.top_k == 2
    assert {key: len(window) for key, window in found.prepared.items()} == {
        -1: 6, -2: 0 if narrow else 5, -3: 4, -4: 0 if narrow else 6, -5: 3
    }  # fmt: skip


@pytest.mark.parametrize("penalised", [0, 1])
def test_branches_beside_those_of_requests_that_need_the_host(decoder: Decoder, penalised: int) -> None:
    """Each one's late pages are copied when its own request has caught up; one of them lacks three tokens."""
    drafting = both(decoder, "rejection")
    propose(drafting, item(0, 0, 8, 0), item(1, 0, 9, 0))
    params = [PENALISED if index == penalised else HOT for index in range(2)]
    early, plain, other = branching(params[0])
    late = branching(params[1])[2]._replace(forward=item(1, 7, 3, 6, params[1]).forward)
    found = propose(drafting, early, plain, late, copies=COPIES, late_copies=LATE_COPIES, alternatives=3)
    assert all(found.prepared[branch.id] for one in (early, other) for branch in one.branches)
