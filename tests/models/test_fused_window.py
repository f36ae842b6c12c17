"""A window drafted in one C++ call gives the same bits as token by token: tokens, log q, kept logits, KV."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, load
from window_support import (
    COPIES,
    CPU,
    GREEDY,
    HOT,
    HOT_DRAFT,
    LATE_COPIES,
    MIXED,
    PAGES,
    ROUNDS,
    SLOTS,
    TABLES,
    Drafting,
    assert_same,
    assert_same_memory,
    branching,
    item,
)

from pearl.drafting.draft_rows import draft_rows
from pearl.kv import PageCopy
from pearl.messages import Drafted, DraftPlan, DraftProposal, DraftWork, ForwardWork
from pearl.models import Decoder, bundled_path, load_model
from pearl.sampling_params import SamplingParams
from pearl_kernels import Rule, Situation, select

both_rules = pytest.mark.parametrize("rule", ["rejection", "coupled"])


@pytest.fixture(params=["llama", "mistral-window", "qwen3"], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return load(path)


@pytest.mark.parametrize("fused", [False, True])
def test_a_window_takes_the_time_that_its_forwards_take(llama: Decoder, fused: bool) -> None:
    """The pace compares it with the target's."""
    drafting, begin = Drafting(llama, "rejection", fused), time.perf_counter()
    busy = drafting.propose((item(0, 0, 9, 8),)).busy
    assert 0 < busy.seconds < time.perf_counter() - begin
    assert begin < busy.begin


@both_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_same_bits_as_token_by_token(folder: Path, dtype: torch.dtype, rule: Rule) -> None:
    decoder = load(folder, dtype)
    step_by_step, fused = (Drafting(decoder, rule, fused) for fused in (False, True))
    for work in ROUNDS:
        expected, found = step_by_step.propose(work), fused.propose(work)
        assert {i: len(window) for i, window in expected.windows.items()} == {
            w.forward.state.request_id: w.num_draft for w in work if w.num_draft
        }
        assert_same(expected, found)
        assert_same_memory(step_by_step, fused)
    kept = {d.row for window in expected.windows.values() for d in window}
    assert kept == {-1}  # of the last round's request: its draft is greedy


def test_it_shares_cores_but_in_rounds_in_which_the_target_rests(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting, told = Drafting(llama, "rejection", fused=True), list[bool]()
    runner = drafting.drafter._runner
    monkeypatch.setattr(runner.fused, "share_cores", told.append)
    for alone in (False, True, False):
        drafting.propose((item(0, 0, 9, 2),), alone=alone)
    assert told == [True, False, True]


def test_q_is_kept_under_the_rejection_rule_alone(llama: Decoder) -> None:
    for rule, rows in (("rejection", True), ("coupled", False)):
        drafting = Drafting(llama, rule, fused=True)  # type: ignore[arg-type]
        work = item(0, 0, 3, 6, GREEDY), item(1, 0, 2, 8, HOT), item(2, 0, 4, 2, HOT_DRAFT), item(3, 0, 1, 1, HOT)
        windows = drafting.propose(work).windows
        assert all(d.row == -1 for d in (*windows[0], *windows[2]))
        assert all((d.row >= 0) is rows for d in (*windows[1], *windows[3]))
        assert drafting.ring.logits is not None
        assert drafting.ring.logits.isfinite().all(-1).sum() == (9 if rows else 0)


def test_nothing_is_allocated_for_a_batch_that_keeps_no_q(llama: Decoder) -> None:
    drafting = Drafting(llama, "rejection", fused=True)
    drafting.ring.logits = None
    drafting.propose((item(0, 0, 3, 6, GREEDY),))
    assert drafting.ring.logits is None


def test_threads_change_no_bit() -> None:
    """At a real size, where helpers are woken."""
    kernels = select(Situation("cpu", torch.bfloat16))
    decoder = load_model(bundled_path("target"), device=CPU, dtype=torch.bfloat16, max_model_len=128, kernels=kernels)
    alone, helped = (Drafting(decoder, "rejection", True, threads) for threads in (1, 3))
    for work in ROUNDS:
        assert_same(alone.propose(work), helped.propose(work))
    assert_same_memory(alone, helped)


def test_requests_whose_logits_depend_on_the_host_are_drafted_step_by_step(llama: Decoder) -> None:
    """And so is the whole batch, to the same tokens."""
    work = (item(0, 0, 5, 6), item(1, 0, 3, 6, HOT))
    plain = Drafting(llama, "rejection", fused=True).propose(work)
    biased = SamplingParams(logit_bias={plain.windows[0][2].token: -100.0})
    work = (item(0, 0, 5, 6, biased), work[1])
    step_by_step, fused = (Drafting(llama, "rejection", fused) for fused in (False, True))
    found = fused.propose(work)
    assert_same(step_by_step.propose(work), found)
    assert found.windows[0][:2] == plain.windows[0][:2]
    assert found.windows[0][2] != plain.windows[0][2]
    assert [d.token for d in found.windows[1]] == [d.token for d in plain.windows[1]]


@both_rules
def test_alternatives_are_those_of_each_draw(llama: Decoder, rule: Rule) -> None:
    """Beside the operator's, in a window drafted token by token; windows of several lengths."""
    work = item(0, 0, 9, 8), item(1, 0, 7, 5, MIXED[1]), item(2, 0, 3, 3, MIXED[2]), item(3, 0, 6, 4, MIXED[3])
    step_by_step, fused = (Drafting(llama, rule, fused) for fused in (False, True))
    expected, found = (drafting.propose(work, alternatives=3) for drafting in (step_by_step, fused))
    assert_same(expected, found)
    for window in found.windows.values():
        for drafted in window:
            assert drafted.ranked is not None
            assert len(drafted.ranked.tokens) == 3
            assert drafted.token not in drafted.ranked.tokens
    assert all(d.ranked is None for window in fused.propose(work).windows.values() for d in window)


def test_alternatives_out_of_range_are_refused(llama: Decoder) -> None:
    drafting = Drafting(llama, "rejection", fused=True)
    for count in (-1, 9):
        with pytest.raises(ValueError, match=rf"alternatives is {count}, must be in \[0, 9\)"):
            drafting.propose((item(0, 0, 2, 2),), alternatives=count)


@both_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_branches_are_the_same_bits_too(folder: Path, dtype: torch.dtype, rule: Rule) -> None:
    """And the windows that the draft would have drafted there, had it begun with them."""
    decoder = load(folder, dtype)
    for params in (GREEDY, HOT):
        step_by_step, fused, alone = (Drafting(decoder, rule, fused) for fused in (False, True, False))
        for drafting in (step_by_step, fused, alone):
            drafting.propose((item(0, 0, 8, 0), item(1, 0, 9, 0)))
        work = branching(params)
        plan: dict[str, Any] = {"copies": COPIES, "late_copies": LATE_COPIES, "alternatives": 3}
        expected, found = step_by_step.propose(work, **plan), fused.propose(work, **plan)
        assert_same(expected, found)
        assert_same_memory(step_by_step, fused)
        assert found.steps == 6
        for one in work:
            for branch in one.branches:
                window, state = found.prepared[branch.id], one.state_of(branch)
                assert len(window) == 1 + branch.num_draft
                ranked = found.windows[state.request_id][0].ranked
                assert ranked is not None
                own = ranked.tokens[branch.rank] if branch.token is None else branch.token
                assert window[0] == (own, 0.0, -1, None)
                assert state.history is not None
                text = (*state.history[: branch.start], own)
                forward = ForwardWork(state, text, 0, 1, TABLES[state.request_id])
                same = alone.propose((DraftWork(forward, branch.num_draft),), alternatives=3).windows[state.request_id]
                assert [d._replace(row=0) for d in same] == [d._replace(row=0) for d in window[1:]]
                check_rows(fused, found, window, alone, same)


def check_rows(
    drafting: Drafting, found: DraftProposal, window: tuple[Drafted, ...], alone: Drafting, same: tuple[Drafted, ...]
) -> None:
    """Each kept row is the token's own, and nobody else's."""
    every = [d.row for w in (*found.windows.values(), *found.prepared.values()) for d in w if d.row >= 0]
    assert len(every) == len(set(every))
    assert drafting.ring.logits is not None
    assert alone.ring.logits is not None
    for one, other in zip(window[1:], same, strict=True):
        assert (one.row >= 0) == (other.row >= 0)
        if one.row >= 0:
            assert torch.equal(drafting.ring.logits[one.row], alone.ring.logits[other.row])


def test_a_late_branch_without_a_token_is_not_drafted(llama: Decoder) -> None:
    """Of top_k = 2 there is one alternative; no other branch suffers."""
    narrow = SamplingParams(temperature=0.9, top_k=2)
    for fused in (False, True):
        drafting = Drafting(llama, "rejection", fused)
        drafting.propose((item(0, 0, 8, 0), item(1, 0, 9, 0)))
        prepared = drafting.propose(branching(narrow), copies=COPIES, late_copies=LATE_COPIES, alternatives=3).prepared
        assert {i: len(window) for i, window in prepared.items()} == {-1: 6, -2: 0, -3: 4, -4: 0, -5: 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "a late branch's rank is 3"),
        ({"block_table": (5, 2, PAGES, 8)}, "a page is 24"),
        ({"block_table": (5, 2, 23)}, "a page is -1"),
        ({"slot": SLOTS + 1}, "ring_base is"),
        ({"num_draft": 130}, "the end of a window is 139"),
    ],
)
def test_a_branch_that_does_not_fit_is_refused_before_anything_is_written(
    llama: Decoder, change: dict[str, Any], message: str
) -> None:
    drafting = Drafting(llama, "rejection", fused=True)
    work = branching(HOT)
    bad = work[0]._replace(branches=(work[0].branches[0]._replace(**change),))
    with pytest.raises(ValueError, match=message):
        drafting.propose((bad,), alternatives=3)
    for copies in ((PageCopy(0, PAGES),), (PageCopy(-1, 0),)):
        with pytest.raises(ValueError, match="a page is"):
            drafting.propose(work[:1], alternatives=3, late_copies=copies)
    assert all(memory.isnan().all() for memory in drafting.memory())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": (5, 2)}, r"a page is -1"),
        ({"block_table": (5, 2, PAGES)}, r"a page is 24"),
        ({"block_table": (5, 2, -1)}, r"a page is -1"),
        ({"block_table": (5,)}, "6 tokens from position 0, 1 of them with logits, on 1 pages of 4"),
        ({"num_logits": 0}, "drafts without its last row's logits"),
        ({"num_logits": 2}, "drafts without its last row's logits"),
        ({"tokens": (1, 2, 3, 4, 5, 131)}, "input_ids holds 131"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    llama: Decoder, change: dict[str, object], message: str
) -> None:
    drafting = Drafting(llama, "rejection", fused=True)
    good = item(0, 0, 6, 6, HOT)
    bad = DraftWork(good.forward._replace(**change), good.num_draft)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        drafting.propose((item(1, 0, 2, 2), bad))
    assert all(memory.isnan().all() for memory in drafting.memory())
    assert drafting.propose((good,)).steps == 6  # and goes on


def test_a_shorter_table_holds_nothing_of_the_one_before(llama: Decoder) -> None:
    """It would be written to, by a window that the table does not reach. Also where the one before was refused."""
    drafting = Drafting(llama, "rejection", fused=True)
    good = item(0, 0, 6, 6, HOT)
    table = good.forward.block_table
    short, broken = (
        DraftWork(good.forward._replace(block_table=other), good.num_draft)
        for other in (table[:2], (*table[1:], table[0], "no page"))
    )
    for before in (good, broken):
        with suppress(TypeError):
            drafting.propose((before,))
        with pytest.raises(ValueError, match="a page is -1"):
            drafting.propose((short,))


def test_a_window_past_the_models_last_position_is_refused(llama: Decoder) -> None:
    table = tuple(range(PAGES)) * 2  # room for 192 positions; the model has 128
    state = item(0, 0, 1, 1).forward.state
    for num_draft, fits in ((4, True), (5, False)):
        drafting = Drafting(llama, "rejection", fused=True)
        work = DraftWork(ForwardWork(state, (3,), 124, 1, table), num_draft)
        if fits:
            assert len(drafting.propose((work,)).windows[0]) == num_draft
            continue
        with pytest.raises(ValueError, match="the end of a window is 129"):
            drafting.propose((work,))


def test_a_lane_that_the_ring_does_not_have_is_refused(llama: Decoder) -> None:
    drafting = Drafting(llama, "rejection", fused=True, lanes=1, slots=0)
    with pytest.raises(ValueError, match="ring_base is 16"):
        drafting.propose((item(1, 0, 2, 2, HOT),))


def test_parameters_for_another_batch_are_refused(llama: Decoder) -> None:
    drafting = Drafting(llama, "rejection", fused=True)
    fused = drafting.drafter._fused
    assert fused is not None
    rows = draft_rows((item(0, 0, 2, 2), item(1, 0, 2, 2)), drafting.ring, "rejection")
    params = fused._call._batches.tensors([rows[0].forward.state])
    with pytest.raises(ValueError, match=r"parameters for 2 requests on cpu, not \(device\(type='cpu'\), 1\)"):
        fused._call._draw(rows, params, DraftPlan(()), None)
