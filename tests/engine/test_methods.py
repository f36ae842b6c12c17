"""The plan table of pearl/methods.py."""

from __future__ import annotations

import pytest
from engine_sim import METHODS

from pearl.config import EngineConfig
from pearl.methods import Autoregressive, DecodingMethod, Intent, Pearl, Progress, Speculative, build_method

EVEN = "pearl-with-pre-verify-in-even-batches"
DRAFT, VERIFY, BOTH, WAIT = Intent(True, False), Intent(False, True), Intent(True, True), Intent(False, False)


@pytest.mark.parametrize(
    ("name", "fresh", "pending", "dry"),
    [
        ("pearl", BOTH, BOTH, BOTH),
        ("pearl-without-pre-verify", DRAFT, BOTH, BOTH),
        (EVEN, DRAFT, BOTH, BOTH),
        ("pearl-without-post-verify", BOTH, VERIFY, BOTH),
        ("pearl-without-both", DRAFT, VERIFY, BOTH),
        ("speculative", DRAFT, VERIFY, VERIFY),
        ("autoregressive", VERIFY, VERIFY, VERIFY),
    ],
)
def test_who_works(name: str, fresh: Intent, pending: Intent, dry: Intent) -> None:
    def alone(progress: Progress) -> Intent:
        return METHODS[name].intents([progress])[0]

    assert alone(Progress(0, False)) == fresh
    assert alone(Progress(1, False)) == alone(Progress(7, False)) == pending
    assert alone(Progress(0, True)) == dry


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("speculative", EVEN)])
def test_requests_do_not_influence_each_other(name: str) -> None:
    """In PEARL a batch mixes PRE and POST freely."""
    batch = [Progress(0, False), Progress(3, False), Progress(0, True), Progress(1, False)]
    assert METHODS[name].intents(batch) == [METHODS[name].intents([progress])[0] for progress in batch]


def test_speculative_drafts_for_those_without_a_window_while_the_others_wait() -> None:
    batch = [Progress(3, False), Progress(0, False), Progress(0, True)]
    assert Speculative().intents(batch) == [WAIT, DRAFT, WAIT]


def test_speculative_verifies_all_at_once() -> None:
    assert Speculative().intents([Progress(3, False), Progress(1, False), Progress(0, True)]) == [VERIFY] * 3


def test_pre_verify_only_where_it_pays() -> None:
    fresh = Progress(0, False)
    assert METHODS[EVEN].intents([fresh] * 2) == [BOTH] * 2
    assert METHODS[EVEN].intents([fresh] * 3) == [DRAFT] * 3
    assert Pearl(pre_verify=False, pays=lambda batch: True).intents([fresh]) == [DRAFT]


@pytest.mark.parametrize("name", METHODS)
def test_every_batch_makes_progress(name: str) -> None:
    for batch in ([], [Progress(0, True)], [Progress(0, False), Progress(2, False)], [Progress(2, True)]):
        intents = METHODS[name].intents(batch)
        assert len(intents) == len(batch)
        assert not batch or any(intent != WAIT for intent in intents)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, Pearl()),
        ({"pre_verify": False}, Pearl(pre_verify=False, post_verify=True)),
        ({"post_verify": False}, Pearl(pre_verify=True, post_verify=False)),
        ({"method": "speculative"}, Speculative()),
        ({"method": "autoregressive"}, Autoregressive()),
    ],
)
def test_configuration_chooses_the_method(options: dict[str, object], method: DecodingMethod) -> None:
    assert build_method(EngineConfig(**options)) == method  # type: ignore[arg-type]
