"""From which rounds the engine lets its pace learn, and what it asks it about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine_rig import Rig

from pearl.engine.rounds import EngineStats, measured
from pearl.messages import Busy
from pearl.pace import Progressed


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(overlaps=False)
    yield made
    made.engine.close()


def test_window_learns_from_decoding_rounds_only() -> None:
    rig = Rig(budget=4)
    rig.add(1, length=12)
    rig.run()
    prefill = sum(1 for record in rig.records if any(len(w.tokens) != w.num_logits for w in record.plan.target.work))
    assert prefill > 1
    assert len(rig.pace.measured) == len(rig.records) - prefill
    first = rig.pace.measured[0]
    assert (first.mode, first.load.batch, first.draft_steps, first.target_rows) == ("pearl", 1, 2, 2)
    assert first.requests == (Progressed(1, 2, 2, 2),)
    rig.engine.close()


def test_window_does_not_learn_from_rounds_in_which_the_draft_catches_up(rig: Rig) -> None:
    """As after plain decoding, when the target has no prompt to compute."""
    rig.add(1, length=9, max_tokens=30)
    for _ in range(3):
        rig.engine.step()
    learned = len(rig.pace.measured)
    for behind in (0, 6, 0):
        rig.scheduler.requests[1].draft_computed -= behind
        rig.engine.step()
        plan = rig.records[-1].plan
        assert all(len(work.tokens) == work.num_logits for work in plan.target.work)
        assert (len(plan.draft.work[0].forward.tokens) > 2) == bool(behind)
        learned += not behind
        assert len(rig.pace.measured) == learned


def test_a_draft_that_only_catches_up_is_part_of_a_plain_round(rig: Rig) -> None:
    """As a head does with every token: it is no drafting beside the target."""
    rig.add(1, max_tokens=30)
    rig.engine.step()
    record = replace(rig.records[-1], proposal=replace(rig.records[-1].proposal, busy=Busy(0.0, 1.0)))
    assert measured(record).draft_seconds == 1.0
    work = tuple(work._replace(num_draft=0) for work in record.plan.draft.work)
    plain = replace(record, plan=replace(record.plan, draft=replace(record.plan.draft, work=work)))
    assert (measured(plain).draft_sequences, measured(plain).draft_seconds) == (0, 0.0)


def test_window_does_not_learn_from_rounds_that_prepared_something(rig: Rig) -> None:
    """A graph that is captured, or a kernel that is compiled, takes a hundred times as long as the round."""
    rig.add(1, max_tokens=30)
    rig.engine.step()
    learned = len(rig.pace.measured)
    for new in (0, 2, 0, 0, 1):
        rig.prepared += new
        rig.engine.step()
        learned += new == 0
        assert len(rig.pace.measured) == learned
        assert rig.records[-1].preparations == new
    assert rig.engine.stats == EngineStats(rounds=6, preparations=3)


def test_window_does_not_learn_from_rounds_with_a_preemption(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.add(1, max_tokens=30)
    rig.engine.step()
    schedule, learned = rig.scheduler.schedule, len(rig.pace.measured)
    for preempted in ((), (7,), (), (8, 9)):
        monkeypatch.setattr(rig.scheduler, "schedule", lambda gone=preempted: replace(schedule(), preempted=gone))
        rig.engine.step()
        learned += not preempted
        assert len(rig.pace.measured) == learned


def test_window_is_asked_for_the_batch_at_hand(rig: Rig) -> None:
    rig.add(1)
    rig.engine.step()
    rig.add(2, 3)
    rig.engine.step()
    assert rig.pace.batches == [1, 3]
