"""The scheduler with the real KV managers: who computes what, when, and who has to go when pages run out."""

from __future__ import annotations

import pytest
from engine_requests import drafted, request_of
from engine_sim import simulate
from method_paces import METHODS
from simulated_models import target_sequence

from pearl.engine.request import Request, Status
from pearl.errors import InvalidRequestError, QueueFullError
from pearl.messages import SchedulerOutput


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + 3 * i) % 29 for i in range(length)]


def long_running(request_id: int, length: int = 3, max_tokens: int = 60) -> Request:
    return request_of(request_id, prompt(length, request_id), max_tokens, eos_ids=())


def target_chunks(plan: SchedulerOutput) -> dict[int, tuple[int, int, int]]:
    """(start, tokens, logits) of each request's share of the target's forward."""
    return {w.state.request_id: (w.start, len(w.tokens), w.num_logits) for w in plan.target.work}


def draft_chunks(plan: SchedulerOutput) -> dict[int, tuple[int, int, int]]:
    """(start, tokens, drafted) of each request's share of the draft's forward."""
    return {w.forward.state.request_id: (w.forward.start, len(w.forward.tokens), w.num_draft) for w in plan.draft.work}


# Who works: the plan table, end to end ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rounds"),
    [
        # (drafted, rows judged) in each of the first rounds, with a draft that is always right and a window of 3
        ("pearl", [(3, 1), (3, 3), (3, 3)]),
        ("whole-windows", [(3, 0), (3, 4), (3, 3)]),
        ("pre-verify-only", [(3, 1), (0, 3), (3, 1), (0, 3)]),
        ("two-halves", [(3, 0), (0, 4), (3, 0), (0, 4)]),
        ("speculative", [(3, 0), (0, 4), (3, 0), (0, 4)]),
        ("autoregressive", [(0, 1), (0, 1)]),
    ],
)
def test_who_drafts_and_how_many_rows_are_judged(method: str, rounds: list[tuple[int, int]]) -> None:
    simulation = simulate(method, window=3, accuracy=1.0)
    simulation.add(long_running(1))
    seen = []
    for _ in rounds:
        plan = simulation.step()
        seen.append((draft_chunks(plan).get(1, (0, 0, 0))[2], target_chunks(plan).get(1, (0, 0, 0))[2]))
        assert plan.draft.alone == (not target_chunks(plan))
    assert seen == rounds


def test_a_rejection_sends_pearl_back_to_pre_verify() -> None:
    simulation = simulate("pearl", window=3, accuracy=0.0)
    simulation.add(long_running(1))
    for position in range(3, 9):
        plan = simulation.step()
        assert target_chunks(plan)[1] == ((0, 3, 1) if position == 3 else (position - 1, 1, 1))
        assert draft_chunks(plan)[1] == ((0, 3, 3) if position == 3 else (position - 1, 1, 3))


def test_the_draft_catches_up_two_tokens_after_a_bonus_token() -> None:
    simulation = simulate("speculative", window=3, accuracy=1.0)
    simulation.add(long_running(1))
    plans = [simulation.step() for _ in range(3)]
    assert draft_chunks(plans[0])[1] == (0, 3, 3)
    assert target_chunks(plans[1])[1] == (0, 6, 4)
    assert draft_chunks(plans[2])[1] == (5, 2, 3)  # the last drafted token and the bonus token


def test_speculative_requests_stay_in_step() -> None:
    simulation = simulate("speculative", window=2)
    simulation.add(long_running(1), long_running(2))
    for _ in range(8):
        plan = simulation.step()
        assert not (plan.target.work and plan.draft.work)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_num_draft_is_clipped_to_what_is_left(method: str, max_tokens: int) -> None:
    """No token past max_tokens is ever drafted or judged (CheckedScheduler), and none is missing."""
    simulation = simulate(method, window=4, accuracy=1.0)
    request = request_of(1, prompt(3), max_tokens, eos_ids=())
    simulation.add(request)
    simulation.run()
    assert len(simulation.outputs[1]) == request.metrics.output_tokens == max_tokens
    assert request.length == 3 + max_tokens  # not even committed
    simulation.check_empty()


# Chunked prefill ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 12, 14])
def test_prompts_are_computed_in_chunks_for_both_models(method: str, budget: int) -> None:
    simulation = simulate(method, budget=budget, page_size=1, window=4)
    simulation.add(request_of(1, prompt(10)))
    assert simulation.run() == {1: target_sequence(prompt(10), 8)}
    for record in simulation.records:
        for start, tokens, logits in target_chunks(record.plan).values():
            assert tokens - max(0, logits - 1) <= max(budget, 1)
            assert logits or start + tokens < 10
        for _, tokens, _ in draft_chunks(record.plan).values():
            assert tokens <= max(budget, 2)
    simulation.check_empty()


def test_chunks_follow_the_budget_exactly() -> None:
    simulation = simulate("pearl", budget=4, page_size=1)
    simulation.add(long_running(1, length=11))
    plans = [simulation.step() for _ in range(3)]
    assert [target_chunks(plan)[1] for plan in plans] == [(0, 4, 0), (4, 4, 0), (8, 3, 1)]
    assert [draft_chunks(plan)[1] for plan in plans] == [(0, 4, 0), (4, 4, 0), (8, 3, 3)]


def test_pending_tokens_are_never_computed_before_they_are_judged() -> None:
    """The draft is ready first; the target's prompt then fills a budget that ends within the pending window."""
    simulation = simulate("whole-windows", window=4, budget=12, page_size=1)
    simulation.add(long_running(1, length=10))
    plans = [simulation.step() for _ in range(3)]
    assert [target_chunks(plan).get(1) for plan in plans] == [None, (0, 9, 0), (9, 5, 5)]


@pytest.mark.parametrize("ahead", ["target", "draft"])
def test_a_token_is_only_decided_when_both_models_are_ready(ahead: str) -> None:
    simulation = simulate("pearl", budget=5, page_size=1, prefix_caching=False)
    request = long_running(1, length=12)
    simulation.add(request)
    simulation.step()
    if ahead == "target":
        request.target_computed, request.draft_computed = 5, 0
        simulation.scheduler.draft_kv.truncate(1, 0)
    else:
        request.target_computed, request.draft_computed = 0, 5
        simulation.scheduler.target_kv.truncate(1, 0)
    plans = [simulation.step() for _ in range(3)]
    decided = [bool(plan.verify) for plan in plans]
    assert decided == [False, False, True]
    waiting = target_chunks(plans[1]) if ahead == "target" else draft_chunks(plans[1])
    assert waiting == {1: (5, 5, 0)} or waiting == {}


def test_the_target_waits_for_a_draft_that_computes_the_prompt_again() -> None:
    """As after a preemption, where only the target's pages were still in a prefix cache."""
    simulation = simulate("pearl", budget=5, page_size=1, window=1, prefix_caching=False)  # nothing is pending
    request = long_running(1, length=11)
    simulation.add(request)
    while request.num_output == 0:
        simulation.step()
    request.draft_computed = 0
    simulation.scheduler.draft_kv.truncate(1, 0)
    plans = [simulation.step() for _ in range(3)]
    assert [target_chunks(plan) for plan in plans] == [{}, {}, {1: (11, 1, 1)}]
    assert [draft_chunks(plan)[1] for plan in plans] == [(0, 5, 0), (5, 5, 0), (10, 2, 1)]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("speculative", "two-halves", "switching")])
def test_decoding_requests_work_in_every_round_while_prompts_are_computed(method: str) -> None:
    simulation = simulate(method, budget=4, page_size=1, num_pages=600, window=2)
    simulation.add(long_running(1, max_tokens=200), long_running(2, max_tokens=200))
    for _ in range(6):
        simulation.step()
    simulation.add(long_running(3, length=40))
    while simulation.scheduler.requests[3].target_computed < 39:
        before = {i: simulation.scheduler.requests[i].target_computed for i in (1, 2)}
        plan = simulation.step()
        for request_id in (1, 2):
            assert request_id in target_chunks(plan) or request_id in draft_chunks(plan)
        if method == "autoregressive":
            assert all(simulation.scheduler.requests[i].target_computed > before[i] for i in (1, 2))
        assert len(simulation.records) < 80


@pytest.mark.parametrize("method", METHODS)
def test_prompts_progress_beside_more_decoding_requests_than_the_budget(method: str) -> None:
    """The rows of decoding requests may use up the budget; a waiting prompt still gets its share."""
    simulation = simulate(method, budget=2, page_size=2, num_pages=400, window=2, lanes=6)
    simulation.add(*(long_running(i, max_tokens=100) for i in range(1, 6)))
    while min(r.num_output for r in simulation.scheduler.requests.values()) == 0:
        simulation.step()
        assert len(simulation.records) < 60
    simulation.add(long_running(6, length=8))
    for _ in range(30):
        simulation.step()
    assert simulation.scheduler.requests[6].num_output > 0


def test_the_budget_bounds_all_prompt_chunks_of_a_forward_together() -> None:
    simulation = simulate("autoregressive", budget=5, page_size=1, lanes=4)
    simulation.add(*(long_running(i, length=9, max_tokens=3) for i in range(1, 5)))
    while simulation.engine.has_work:
        decoding = sum(1 for r in simulation.scheduler.running if r.length - r.target_computed == 1)
        plan = simulation.step()
        assert sum(len(w.tokens) for w in plan.target.work) <= max(5, decoding + 1)


def test_the_budget_bounds_the_drafts_chunks_together_too() -> None:
    """Beside requests that decode, each of which takes a row of it."""
    simulation = simulate("pearl", budget=8, page_size=1, lanes=5, num_pages=200, window=1)
    simulation.add(long_running(1), long_running(2))
    for _ in range(4):
        simulation.step()
    simulation.add(*(long_running(i, length=12) for i in (3, 4, 5)))
    seen = []
    while len(simulation.scheduler.running) < 5 or any(r.draft_computed < 11 for r in simulation.scheduler.running[2:]):
        plan = simulation.step()
        seen.append(sum(len(work.forward.tokens) for work in plan.draft.work))
        assert {1, 2} <= draft_chunks(plan).keys()
    assert seen[0] == 8
    assert max(seen) <= 8 + 1  # a prompt's last two tokens are not cut apart


def test_prompts_beside_requests_that_decode_are_computed_in_chunks_of_their_own() -> None:
    """These wait for the forward; before and after them a prompt has the whole budget."""
    simulation = simulate("pearl", budget=20, prefill_chunk=6, page_size=1, window=1, num_pages=200)
    simulation.add(long_running(1, length=50, max_tokens=4))
    assert [simulation.step().target.work[0].tokens for _ in range(2)] == [
        tuple(prompt(50, 1)[a : a + 20]) for a in (0, 20)
    ]
    while simulation.scheduler.requests[1].num_output == 0:
        simulation.step()
    simulation.add(long_running(2, length=80))
    beside = alone = 0
    while simulation.scheduler.requests.get(2) is None or simulation.scheduler.requests[2].num_output == 0:
        plan = simulation.step()
        tokens = target_chunks(plan)[2][1]
        if 1 in target_chunks(plan):
            beside += 1
            assert tokens == draft_chunks(plan)[2][1] == 6
        else:
            alone += 1
            assert tokens <= 20
    assert beside >= 2
    assert alone == -(-(80 - 6 * beside) // 20)


def test_a_short_prompt_does_not_wait_until_a_long_one_is_computed() -> None:
    simulation = simulate("pearl", budget=8, page_size=1, window=1, num_pages=400)
    simulation.add(long_running(1, length=90))
    simulation.step()
    simulation.add(long_running(2, length=90), long_running(3, length=9))
    seen = []
    while simulation.scheduler.requests[3].num_output == 0:
        plan = simulation.step()
        seen.append(target_chunks(plan))
        assert target_chunks(plan)[1][1] >= 4, "half of the budget is the oldest's"
    assert len(seen) <= 4
    assert all(2 not in chunks for chunks in seen), "the longest comes last"


# Lanes, order, limits ----------------------------------------------------------------------------------------------


def test_no_more_than_max_num_seqs_run_each_on_its_own_lane() -> None:
    simulation = simulate("pearl", lanes=2)
    simulation.add(*(request_of(i, prompt(3, i)) for i in range(1, 6)))
    seen: set[int] = set()
    while simulation.engine.has_work:
        plan = simulation.step()
        lanes = {w.state.request_id: w.state.lane for w in plan.target.work}
        assert len(lanes) <= 2
        assert len(set(lanes.values())) == len(lanes)
        seen |= set(lanes.values())
    assert seen == {0, 1}
    simulation.check_empty()


def test_first_come_first_served() -> None:
    simulation = simulate("pearl", lanes=2)
    simulation.add(*(request_of(i, prompt(3, i), 6, eos_ids=()) for i in (5, 3, 9, 1)))
    order: list[int] = []
    while simulation.engine.has_work:
        plan = simulation.step()
        order += [w.state.request_id for w in plan.target.work if w.state.request_id not in order]
    assert order == [5, 3, 9, 1]


def test_waiting_limit() -> None:
    simulation = simulate("pearl", lanes=1, max_waiting=2)
    simulation.add(*(request_of(i, prompt(3)) for i in (1, 2, 3)))  # the first will not wait
    with pytest.raises(QueueFullError, match=r"2 requests are waiting, the limit \(max_waiting\); try again later"):
        simulation.engine.add(request_of(4, prompt(3)))
    simulation.step()  # takes the first, as was counted on
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        simulation.engine.add(request_of(4, prompt(3)))
    while 1 in simulation.scheduler.requests:
        simulation.step()
    simulation.add(request_of(4, prompt(3)))
    assert set(simulation.run()) == {1, 2, 3, 4}
    simulation.check_empty()


def test_requests_that_can_run_at_once_do_not_wait() -> None:
    simulation = simulate("pearl", lanes=5, max_waiting=2)
    simulation.scheduler.require_room(7)
    with pytest.raises(
        QueueFullError, match=r"8 requests at once, but there is room for 7: 5 lanes are free, and 2 may"
    ):
        simulation.scheduler.require_room(8)
    simulation.add(*(request_of(i, prompt(3, i)) for i in range(1, 6)))
    simulation.step()
    with pytest.raises(QueueFullError, match="room for 2: 0 lanes are free"):
        simulation.scheduler.require_room(3)
    simulation.add(request_of(6, prompt(3)), request_of(7, prompt(3)))
    assert set(simulation.run()) == set(range(1, 8))


def test_a_request_that_can_never_fit_is_refused() -> None:
    simulation = simulate("pearl", num_pages=4, page_size=4)
    with pytest.raises(
        InvalidRequestError, match="needs KV for 17 tokens, the cache holds 16; lower max_tokens or raise"
    ):
        simulation.engine.add(request_of(1, prompt(9), 8))
    assert not simulation.engine.has_work
    simulation.add(request_of(2, prompt(8), 8))
    simulation.run()
    simulation.check_empty()


# Abort -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["waiting", "prefill", "pre", "post", "preempted"])
def test_abort_in_every_state_frees_everything_and_leaves_the_others_alone(state: str) -> None:
    simulation = simulate(
        "pearl", num_pages=11, page_size=2, lanes=2, budget=4, accuracy=0.0 if state == "pre" else 1.0
    )
    other = request_of(1, prompt(4), 12, eos_ids=())
    wanted = target_sequence(prompt(4), 12, eos_ids=())
    victim = request_of(2, prompt(9, 2), 12, eos_ids=())
    simulation.add(other, *([request_of(3, prompt(3, 3), 12)] if state == "waiting" else []), victim)
    while not {
        "waiting": victim.status is Status.WAITING and other.num_output > 0,
        "prefill": 0 < victim.target_computed < 8,
        "pre": victim.num_output > 1 and not victim.pending,
        "post": bool(victim.pending),
        "preempted": victim.metrics.preemptions > 0 and victim.status is Status.WAITING,
    }[state]:
        simulation.step()
        assert simulation.engine.has_work
    delta = simulation.engine.abort(2)
    simulation.check()
    assert (delta.request_id, delta.finish_reason, delta.error, delta.token_ids) == (2, "abort", None, ())
    assert victim.status is Status.FINISHED
    assert victim.metrics.finished_at is not None
    with pytest.raises(KeyError):
        simulation.engine.abort(2)
    assert simulation.run()[1] == wanted
    simulation.check_empty()


def test_a_finished_requests_pages_and_lane_serve_the_next() -> None:
    simulation = simulate("pearl", num_pages=5, page_size=2, lanes=1)
    for i in range(1, 6):
        request = request_of(i, prompt(4, i), 6)
        simulation.add(request)
        assert simulation.run()[i] == target_sequence(prompt(4, i), 6)
        simulation.check_empty()


def test_pending_is_carried_to_the_verifier_with_its_position() -> None:
    simulation = simulate("pearl", window=3, accuracy=1.0)
    request = long_running(1)
    simulation.add(request)
    simulation.step()
    pending, length = request.pending, request.length
    plan = simulation.step()
    assert (plan.verify[0].pending, plan.verify[0].position) == (pending, length)
    assert pending == drafted(*(d.token for d in pending))
    assert len(pending) == 2
