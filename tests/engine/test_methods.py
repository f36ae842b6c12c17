"""The plan table of pearl/methods.py, and what pinned requests make of it."""

from __future__ import annotations

import pytest

from pearl.methods import METHODS, PLAIN, WAIT, Intent, Mode, Progress, plain_intent

DRAFT, VERIFY, BOTH = Intent(True, False), Intent(False, True), Intent(True, True)


@pytest.mark.parametrize(
    ("mode", "fresh", "pending", "dry"),
    [
        ("pearl", BOTH, BOTH, BOTH),
        ("whole-windows", DRAFT, BOTH, BOTH),
        ("pre-verify-only", BOTH, VERIFY, BOTH),
        ("speculative", DRAFT, VERIFY, VERIFY),
        ("two-halves", DRAFT, VERIFY, VERIFY),
        ("autoregressive", VERIFY, VERIFY, VERIFY),
    ],
)
def test_who_works(mode: Mode, fresh: Intent, pending: Intent, dry: Intent) -> None:
    def alone(progress: Progress) -> Intent:
        return METHODS[mode].intents([progress])[0]

    assert alone(Progress(0, False)) == fresh
    assert alone(Progress(1, False)) == alone(Progress(7, False)) == pending
    assert alone(Progress(0, True)) == dry


@pytest.mark.parametrize("mode", [mode for mode in METHODS if mode not in ("speculative", "two-halves")])
def test_requests_do_not_influence_each_other(mode: Mode) -> None:
    """In PEARL a batch mixes PRE and POST freely."""
    batch = [Progress(0, False), Progress(3, False), Progress(0, True), Progress(1, False)]
    assert METHODS[mode].intents(batch) == [METHODS[mode].intents([progress])[0] for progress in batch]


def test_speculative_drafts_for_those_without_a_window_while_the_others_wait() -> None:
    batch = [Progress(3, False), Progress(0, False), Progress(0, True)]
    assert METHODS["speculative"].intents(batch) == [WAIT, DRAFT, WAIT]


def test_speculative_verifies_all_at_once() -> None:
    batch = [Progress(3, False), Progress(1, False), Progress(0, True)]
    assert METHODS["speculative"].intents(batch) == [VERIFY] * 3


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_two_halves_come_out_of_step_and_stay_so(size: int) -> None:
    """Whatever state another mode left them in, in two rounds one half is drafted while the other is verified."""
    for begin in ([0] * size, [4] * size, [0, *[4] * (size - 1)]):
        pending = list(begin)
        for number in range(8):
            intents = METHODS["two-halves"].intents([Progress(k, False) for k in pending])
            drafted, verified = (sum(getattr(i, name) for i in intents) for name in ("draft", "verify"))
            assert max(drafted, verified) <= -(-size // 2)
            assert number < 2 or min(drafted, verified) >= size // 2
            pending = [4 if i.draft else 0 if i.verify else k for i, k in zip(intents, pending, strict=True)]


@pytest.mark.parametrize("mode", METHODS)
def test_a_plain_request_decodes_in_every_round_but_where_models_take_turns(mode: Mode) -> None:
    assert plain_intent(mode, []) == plain_intent(mode, [VERIFY, WAIT]) == PLAIN
    assert plain_intent(mode, [DRAFT, WAIT]) == (WAIT if mode == "speculative" else PLAIN)


@pytest.mark.parametrize("mode", METHODS)
def test_every_batch_makes_progress(mode: Mode) -> None:
    for batch in ([], [Progress(0, True)], [Progress(0, False), Progress(2, False)], [Progress(2, True)]):
        intents = METHODS[mode].intents(batch)
        assert len(intents) == len(batch)
        assert not batch or any(intent.draft or intent.verify for intent in intents)


@pytest.mark.parametrize(
    ("intent", "progress", "pinned"),
    [
        (VERIFY, Progress(3, False), Intent(draft=False, verify=True, bonus=False)),
        (VERIFY, Progress(0, False), BOTH),
        (VERIFY, Progress(0, True), VERIFY),  # its drafter has nothing
        (BOTH, Progress(3, False), BOTH),
        (DRAFT, Progress(0, False), DRAFT),
        (WAIT, Progress(3, False), WAIT),
    ],
)
def test_a_pinned_request_gets_no_token_that_was_not_drafted(
    intent: Intent, progress: Progress, pinned: Intent
) -> None:
    assert intent.pinned(progress) == pinned
