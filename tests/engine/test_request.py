"""Request.apply: one round's verdict, case by case (the tables of the algorithm), and what may never be broken."""

from __future__ import annotations

import pytest
from engine_requests import drafted, request_of

from pearl.engine.request import Request, Status
from pearl.messages import Decision, Drafted, DraftWork, ForwardWork

PROMPT = [1, 2, 3, 4]
L = len(PROMPT)


def running(pending: tuple[Drafted, ...] = (), max_tokens: int = 50) -> Request:
    """A request that decodes: the target has computed all but its last token, the draft likewise."""
    request = request_of(1, PROMPT, max_tokens)
    request.start_running(0, target_cached=L - 1, draft_cached=max(0, L + len(pending) - 1))
    request.pending = pending
    return request


def play(
    request: Request,
    *,
    window: tuple[int, ...] | None = None,
    accepted: int = 0,
    next_token: int | None = None,
    rows: int | None = None,
    num_draft: int | None = None,
    kept: int | None = None,
) -> tuple[int, ...]:
    """One round in which both models work as the scheduler would plan it. ``window=None``: the draft rests.

    ``rows``: how many rows are judged; None: the pending tokens and one more; 0: the target rests.
    ``kept``: how many committed tokens are the output's; None: all.
    """
    k = len(request.pending)
    rows = k + 1 if rows is None else rows
    state = request.state(with_history=False)
    target = draft = decision = None
    if rows:
        end = request.length + rows - 1
        tokens = request.token_range(request.target_computed, end)
        target = ForwardWork(state, tokens, request.target_computed, rows, ())
    if window is not None:
        tokens = request.token_range(request.draft_computed, request.length + k)
        wanted = len(window) if num_draft is None else num_draft
        draft = DraftWork(ForwardWork(state, tokens, request.draft_computed, 1, ()), wanted)
    if rows:
        tested = tuple(d.token for d in (*request.pending, *drafted(*(window or ())[:1])))[:rows]
        decision = Decision(tested, accepted, next_token, None)
    committed = request.apply(target, draft, drafted(*(window or ())), decision)
    if decision is not None:
        request.count(decision, len(committed) if kept is None else kept)
    assert 0 <= request.target_computed < request.length
    assert 0 <= request.draft_computed < request.length + len(request.pending)
    return committed


def test_pre_verify_accept_commits_the_first_and_keeps_the_rest_pending() -> None:
    request = running()
    assert play(request, window=(10, 11, 12), accepted=1) == (10,)
    assert request.tokens == [*PROMPT, 10]
    assert request.pending == drafted(11, 12)
    assert request.target_computed == L  # all but the new last token
    assert request.draft_computed == L + 2  # all but token 12


def test_pre_verify_reject_commits_the_correction_and_drops_the_window() -> None:
    request = running()
    assert play(request, window=(10, 11, 12), accepted=0, next_token=20) == (20,)
    assert request.tokens == [*PROMPT, 20]
    assert request.pending == ()
    assert (request.target_computed, request.draft_computed) == (L, L)  # tokens 10 and 11 are rolled back


def test_post_verify_all_accepted_stays_in_post() -> None:
    request = running(drafted(10, 11))
    assert play(request, window=(12, 13, 14), accepted=3) == (10, 11, 12)
    assert request.tokens == [*PROMPT, 10, 11, 12]
    assert request.pending == drafted(13, 14)
    assert request.target_computed == L + 2
    assert request.draft_computed == L + 4  # 10, 11, 12, 13 stay valid: never computed again


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_post_verify_reject_at_n_commits_n_and_one_residual(n: int) -> None:
    request = running(drafted(10, 11, 12))
    assert play(request, window=(13, 14), accepted=n, next_token=20) == (*(10, 11, 12)[:n], 20)
    assert request.pending == ()
    assert request.target_computed == L + n == request.length - 1
    assert request.draft_computed == L + n


def test_rejecting_the_first_new_token_keeps_the_pending_ones() -> None:
    """The verdict on the token drafted in this round is part of the same chain of tests."""
    request = running(drafted(10))
    assert play(request, window=(11, 12), accepted=1, next_token=20) == (10, 20)
    assert request.pending == ()
    assert request.draft_computed == L + 1


def test_bonus_token_without_a_new_window() -> None:
    """Vanilla speculative decoding and PEARL without post-verify: k accepted, then one token of the target's own."""
    request = running(drafted(10, 11))
    assert play(request, window=None, accepted=2, next_token=30) == (10, 11, 30)
    assert request.pending == ()
    assert request.target_computed == L + 2
    assert request.draft_computed == L + 1  # two tokens behind: 11 and 30


def test_autoregressive_round_commits_the_bonus_token() -> None:
    request = running()
    assert play(request, next_token=30) == (30,)
    assert (request.target_computed, request.pending) == (L, ())
    assert (request.metrics.tested, request.metrics.runs) == (0, 0)


def test_draft_only_round_makes_the_window_pending_and_commits_nothing() -> None:
    request = running()
    assert play(request, window=(10, 11), rows=0) == ()
    assert request.tokens == PROMPT
    assert request.pending == drafted(10, 11)
    assert (request.target_computed, request.draft_computed) == (L - 1, L + 1)
    assert (request.metrics.target_forwards, request.metrics.draft_forwards) == (0, 2)


def test_window_of_one_accepted_leaves_nothing_pending() -> None:
    request = running()
    assert play(request, window=(10,), accepted=1) == (10,)
    assert request.pending == ()
    assert (request.target_computed, request.draft_computed) == (L, L)


def test_window_of_one_in_post_verify() -> None:
    request = running(drafted(10))
    assert play(request, window=(11,), accepted=2) == (10, 11)
    assert request.pending == ()
    assert (request.target_computed, request.draft_computed) == (L + 1, L + 1)


def test_pending_that_fills_what_remains_is_verified_without_another_row() -> None:
    request = running(drafted(10, 11), max_tokens=2)
    assert play(request, window=None, rows=2, accepted=2) == (10, 11)
    assert request.remaining == 0
    assert request.pending == ()
    assert request.target_computed == L + 1  # never computed token 11


@pytest.mark.parametrize("pending", [(), (10, 11)])
def test_empty_proposal_takes_the_bonus_token(pending: tuple[int, ...]) -> None:
    request = running(drafted(*pending))
    assert play(request, window=(), num_draft=3, accepted=len(pending), next_token=30) == (*pending, 30)
    assert request.pending == ()


def test_empty_proposal_without_a_verdict_makes_the_drafter_dry() -> None:
    request = running()
    assert play(request, window=(), num_draft=3, rows=0) == ()
    assert request.draft_is_dry
    play(request, window=(), num_draft=3, next_token=30)
    assert not request.draft_is_dry  # the text has changed: the drafter is asked again


def test_drafter_without_kv_never_counts_as_computed() -> None:
    """An n-gram drafter gets no tokens to compute; its draft forwards and its KV stay at zero."""
    request = running()
    request.draft_computed = 0
    for accepted in (True, False):
        forward = ForwardWork(request.state(True), (), 0, 1, ())
        target = ForwardWork(request.state(True), (request.tokens[-1],), request.length - 1, 1, ())
        request.pending = ()
        decision = Decision((10,), int(accepted), None if accepted else 20, None)
        request.apply(target, DraftWork(forward, 3), drafted(10, 11, 12), decision)
        assert request.draft_computed == 0
    assert request.metrics.draft_forwards == 0
    assert request.metrics.drafted == 6


def test_catch_up_chunk_computes_without_changing_the_tokens() -> None:
    request = request_of(1, PROMPT)
    request.start_running(0, 0, 0)
    chunk = ForwardWork(request.state(False), (1, 2), 0, 0, ())
    assert request.apply(chunk, DraftWork(chunk, 0), (), None) == ()
    assert (request.target_computed, request.draft_computed) == (2, 2)
    assert not request.draft_is_dry
    assert (request.metrics.target_forwards, request.metrics.draft_forwards, request.metrics.drafted) == (1, 1, 0)


def test_a_run_spans_accepted_windows_and_ends_with_the_rejection() -> None:
    request = running()
    play(request, window=(10, 11, 12), accepted=1)
    play(request, window=(13, 14, 15), accepted=3)
    assert (request.metrics.runs, request.metrics.accepted, request.metrics.tested) == (0, 4, 4)
    play(request, window=(16, 17), accepted=1, next_token=20)
    assert (request.metrics.runs, request.metrics.accepted, request.metrics.tested) == (1, 5, 6)
    assert request.metrics.mean_accepted_tokens == 5.0
    assert request.metrics.acceptance_rate == pytest.approx(5 / 6)
    assert (request.metrics.rounds, request.metrics.target_forwards) == (3, 3)
    assert (request.metrics.drafted, request.metrics.draft_forwards) == (8, 8)


def test_tokens_after_a_rejection_were_not_tested() -> None:
    request = running(drafted(10, 11, 12))
    play(request, window=(13, 14), accepted=1, next_token=20)
    assert (request.metrics.tested, request.metrics.accepted, request.metrics.runs) == (2, 1, 1)


@pytest.mark.parametrize(
    ("kept", "tested", "accepted"),
    [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 2)],  # of two accepted tokens and the correction
)
def test_what_lies_behind_the_end_is_not_counted(kept: int, tested: int, accepted: int) -> None:
    request = running(drafted(10, 11, 12))
    play(request, window=(13, 14), accepted=2, next_token=20, kept=kept)
    request.end_run()
    metrics = request.metrics
    assert (metrics.output_tokens, metrics.tested, metrics.accepted) == (kept, tested, accepted)
    assert metrics.runs == min(1, kept)


def test_a_bonus_token_behind_the_end_is_not_counted() -> None:
    request = running(drafted(10, 11))
    play(request, accepted=2, next_token=30, kept=2)
    assert (request.metrics.output_tokens, request.metrics.tested, request.metrics.accepted) == (2, 2, 2)


def test_a_rejected_first_token_is_a_run_of_length_zero() -> None:
    request = running()
    play(request, window=(10, 11), next_token=20)
    assert (request.metrics.runs, request.metrics.mean_accepted_tokens) == (1, 0.0)


def test_the_run_in_progress_ends_once_and_not_before_all_of_it_is_counted() -> None:
    """What a verdict gave may be counted when its request has been finished, or preempted, already."""
    for gone in (Request.finish, Request.preempt):
        request = running()
        play(request, window=(10, 11, 12), accepted=1)
        gone(request)
        assert request.metrics.runs == 0
        request.count(Decision((11, 12), 2, None, None), 2)
        for _ in range(2):
            request.end_run()
            assert (request.metrics.runs, request.metrics.mean_accepted_tokens) == (1, 3.0)


def test_preemption_forgets_pending_and_computed_but_keeps_the_tokens() -> None:
    request = running(drafted(10, 11))
    request.preempt()
    assert request.tokens == PROMPT
    assert (request.pending, request.target_computed, request.draft_computed) == ((), 0, 0)
    assert (request.status, request.lane, request.metrics.preemptions) == (Status.WAITING, -1, 1)


def test_cached_tokens_are_counted_at_the_first_start_only() -> None:
    request = request_of(1, PROMPT)
    request.start_running(0, target_cached=2, draft_cached=0)
    assert request.metrics.cached_tokens == 2
    play(request, next_token=9)
    request.preempt()
    request.start_running(1, target_cached=4, draft_cached=4)
    assert request.metrics.cached_tokens == 2


@pytest.mark.parametrize(
    ("start", "end", "tokens"),
    [(0, 4, (1, 2, 3, 4)), (3, 4, (4,)), (3, 6, (4, 10, 11)), (4, 6, (10, 11)), (5, 7, (11, 12)), (6, 6, ())],
)
def test_token_range_runs_from_committed_into_pending(start: int, end: int, tokens: tuple[int, ...]) -> None:
    assert running(drafted(10, 11, 12)).token_range(start, end) == tokens


def test_the_state_without_history_is_one_object_while_the_request_keeps_its_lane() -> None:
    request = running(drafted(10))
    state = request.state(with_history=False)
    play(request, window=(11,), accepted=2)
    assert request.state(with_history=False) is state
    request.preempt()
    request.start_running(3, target_cached=0, draft_cached=0)
    assert request.state(with_history=False).lane == 3


def test_state_carries_the_history_only_where_it_is_read() -> None:
    request = running(drafted(10, 11))
    assert request.state(with_history=True).history == (*PROMPT, 10, 11)
    assert request.state(with_history=False).history is None


def test_a_rejection_gives_new_keys_to_what_is_drawn_after_it() -> None:
    """Only where that is asked for; a state with a history has the same key."""
    for rekeys in (True, False):
        request = request_of(1, PROMPT, 50, seed=-3, rekeys=rekeys)
        request.start_running(0, target_cached=L - 1, draft_cached=L + 2)
        seeds = [request.state(with_history=False).seed]
        for accepted, next_token in ((4, None), (1, 7), (0, 9)):
            request.pending = drafted(10, 11, 12)
            play(request, window=(13, 14), accepted=accepted, next_token=next_token)
            seeds.append(request.state(with_history=False).seed)
            assert request.state(with_history=True).seed == seeds[-1]
        assert seeds[:2] == [-3, -3]  # all held
        assert len(set(seeds)) == (3 if rekeys else 1)
        assert all(-(2**63) <= seed < 2**64 for seed in seeds)


def test_two_seeds_have_no_keys_in_common() -> None:
    found = set()
    for seed in (0, 1, 2**63, -1):
        request = request_of(1, PROMPT, 90, seed=seed, rekeys=True)
        request.start_running(0, target_cached=L - 1, draft_cached=L - 1)
        for _ in range(20):
            play(request, window=(13, 14), accepted=0, next_token=7)
            found.add(request.state(with_history=False).seed)
    assert len(found) == 80
