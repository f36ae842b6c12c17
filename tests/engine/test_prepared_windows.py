"""Prepared windows under the engine's real drafter and verifier: they come true, and no output knows of them.

Toy models read all of their text from its pages: a wrong page, copy or token of a branch is found where it is read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_requests import request_of
from engine_toy import COLUMNS, Toy
from hypothesis import given, settings
from hypothesis import strategies as st
from method_paces import METHODS, SWITCHING

from pearl.outputs import RequestMetrics

PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [1, 2, 9])
PREPARING = ("pearl", "whole-windows", "pre-verify-only")  # where both models work in one round
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_k": 12},
    {"temperature": 1.0, "draft_temperature": 2.0},
    {"temperature": 1.0, "draft_temperature": 0.0},
    {"temperature": 0.8, "repetition_penalty": 1.2, "logit_bias": {3: 1.5}},
]
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": {3: 1.5, 7: -4.0}}
chosen = pytest.mark.parametrize("branch_seed", [None, 0], ids=("likeliest", "random"))


def poisoned(toy: Toy) -> Toy:
    """NaN wherever q will be kept: a row that is read must be one that was written."""
    toy.ring.allocate(COLUMNS, torch.float32).fill_(torch.nan)
    return toy


def hits(toy: Toy) -> int:
    assert toy.scheduler.branches is not None
    return sum(toy.scheduler.branches.counts.hits.values())


def check_empty(toy: Toy) -> None:
    kv, branches = toy.scheduler.draft_kv, toy.scheduler.branches
    assert branches is not None
    if kv is not None:
        kv.check_integrity()
        assert kv.num_free_pages == kv.num_pages
    assert len(set(branches._free_slots)) == branches._most + len(toy.scheduler._free_lanes)


def outputs(method: str, rule: str, params: dict[str, Any], **options: Any) -> tuple[list[list[int]], Toy]:
    toy = poisoned(Toy(method, rule, pinned=method == SWITCHING, **options))  # type: ignore[arg-type]
    return toy.generate(*PROMPTS, max_tokens=24, **params), toy


@chosen
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_greedy_outputs_are_the_targets(method: str, rule: str, branch_seed: int | None) -> None:
    found, toy = outputs(method, rule, {}, branches=5, branch_seed=branch_seed)
    assert found == outputs("autoregressive", rule, {})[0]
    assert (hits(toy) > 0) == (method in (*PREPARING, SWITCHING))
    check_empty(toy)


@chosen
@pytest.mark.parametrize("method", ["pearl", "whole-windows", SWITCHING])
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("params", SAMPLED, ids=str)
def test_outputs_are_drawn_the_same_with_and_without(
    method: str, rule: str, params: dict[str, Any], branch_seed: int | None
) -> None:
    """Draw for draw: every token is drafted and tested, at last where requests are pinned."""
    found, toy = outputs(method, rule, params, branches=5, branch_seed=branch_seed)
    assert found == outputs("pearl", rule, params)[0]
    assert hits(toy) > 0 or method == SWITCHING  # to other modes most of the time
    check_empty(toy)


@settings(max_examples=25)
@given(
    st.sampled_from([*PREPARING, SWITCHING]),
    st.sampled_from(["rejection", "coupled"]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 6),
    st.sampled_from([1, 2, 5, 9]),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
)
def test_outputs_do_not_depend_on_window_memory_or_company(
    method: str,
    rule: str,
    window: int,
    lanes: int,
    budget: int,
    spare: int,
    branches: int,
    seed: int | None,
    penalties: bool,
) -> None:
    """Nor on what had to be given up for lack of pages."""
    params: dict[str, Any] = {"max_tokens": 7, **(PENALTIES if penalties else {})}
    if rule == "coupled" or method != "pre-verify-only":
        params["temperature"] = 1.0
    memory = {"lanes": lanes, "budget": budget, "num_pages": 7 + spare, "page_size": 2}
    pinned = method == SWITCHING
    toy = poisoned(Toy(method, rule, window=window, branches=branches, branch_seed=seed, pinned=pinned, **memory))  # type: ignore[arg-type]
    plain = Toy("pearl", rule)  # type: ignore[arg-type]
    assert toy.generate(*PROMPTS, **params) == plain.generate(*PROMPTS, **params)
    check_empty(toy)


@pytest.mark.parametrize(
    ("rule", "params"),
    [("rejection", {}), ("coupled", {"temperature": 0.8}), ("rejection", {"temperature": 0.8})],
    ids=("greedy", "coupled", "rejection"),
)
def test_fewer_rounds_are_needed(rule: str, params: dict[str, Any]) -> None:
    """The point of it all."""
    rounds = []
    for branches in (0, 1, 8):
        toy = Toy("pearl", rule, window=4, branches=branches, lanes=1)  # type: ignore[arg-type]
        toy.generate(*PROMPTS, max_tokens=40, **params)
        rounds.append(len(toy.records))
    assert rounds[0] > rounds[1] > rounds[2]


def test_counters_say_what_became_of_them() -> None:
    toy = Toy("pearl", "rejection", window=3, branches=4)
    for index, prompt in enumerate(PROMPTS):
        toy.engine.add(request_of(index, prompt, 24, eos_ids=()))
    last: dict[int, RequestMetrics] = {}
    while toy.engine.has_work:
        last |= {delta.request_id: delta.metrics for delta in toy.engine.step()}
    assert toy.scheduler.branches is not None
    counts, every = toy.scheduler.branches.counts, list(last.values())
    assert (
        sum(m.prepared for m in every)
        == sum(counts.tried.values())
        == sum(len(item.branches) for record in toy.records for item in record.plan.draft.work)
    )
    assert sum(m.prepared_hits for m in every) == sum(counts.hits.values()) > 0
    windows = [w for record in toy.records for w in record.result.prepared.values()]
    ahead = sum(len(window) - 1 for window in windows if window) - sum(m.prepared_in_vain for m in every)
    mains = sum(len(window) for record in toy.records for window in record.result.windows.values())
    assert sum(m.drafted for m in every) == mains + ahead
    assert 0 < sum(m.prepared_accepted for m in every) <= ahead
    assert all(kind.rank < 4 and hit <= counts.tried[kind] for kind, hit in counts.hits.items())
    for held, late in {(kind.held, kind.late) for kind in counts.hits}:
        there = sum(hit for kind, hit in counts.hits.items() if (kind.held, kind.late) == (held, late))
        assert there <= counts.corrections[held, late]
