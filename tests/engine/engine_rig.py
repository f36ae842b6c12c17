"""An engine with real worker threads around fakes that say what tests want."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from engine_requests import drafted, request_of
from simulated_models import SimulatedVerifier

from pearl.engine.engine import Engine
from pearl.engine.model_workers import ModelWorkers
from pearl.engine.rounds import RoundRecord
from pearl.engine.scheduler import Scheduler
from pearl.kv import KVCacheManager
from pearl.messages import DraftPlan, DraftProposal, SchedulerOutput, TargetOutput, TargetPlan, VerifyResult
from pearl.outputs import OutputDelta
from pearl.pace import Load, MeasuredRound, Pace
from pearl.workers import ThreadWorker, Worker

TOKEN = 5  # what both fakes always say


class FakeTarget:
    def __init__(self) -> None:
        self.before: Callable[[TargetPlan], Any] = lambda plan: None
        self.check: Callable[[], None] = lambda: None

    def run(self, plan: TargetPlan) -> TargetOutput:
        self.before(plan)
        return TargetOutput(torch.full((sum(work.num_logits for work in plan.work),), TOKEN))


class FakeDrafter:
    reads_history = False
    prepares = False
    hidden_layers: tuple[int, ...] = ()
    most_behind = 2

    def __init__(self) -> None:
        self.before: Callable[[DraftPlan], Any] = lambda plan: None

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def propose(self, plan: DraftPlan) -> DraftProposal:
        self.before(plan)
        windows = {item.forward.state.request_id: drafted(*[TOKEN] * item.num_draft) for item in plan.work}
        return DraftProposal(windows, steps=max(item.num_draft for item in plan.work))


class FakeVerifier(SimulatedVerifier):
    def __init__(self) -> None:
        self.before: Callable[[], Any] = lambda: None

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        self.before()
        return super().verify(plan, proposal, target)


class RecordingPace:
    changes = listens = True

    def __init__(self, mode: str) -> None:
        self.mode, self.size = mode, 2
        self.batches: list[int] = []
        self.measured: list[MeasuredRound] = []

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        self.batches.append(load.batch)
        return Pace(self.mode, (self.size,) * load.batch)  # type: ignore[arg-type]

    def observe(self, measured: MeasuredRound) -> None:
        self.measured.append(measured)


class AwaitedThread(ThreadWorker):
    """One that counts as keeping the engine's thread busy: outputs come before the next round."""

    blocks = True


class Rig:
    """``overlaps``: outputs are made while the next round runs, so that between two steps one is in flight."""

    def __init__(
        self,
        method: str = "pearl",
        lanes: int = 4,
        budget: int = 64,
        draft_alone: Worker | None = None,
        overlaps: bool = True,
    ) -> None:
        self.target, self.drafter, self.verifier = FakeTarget(), FakeDrafter(), FakeVerifier()
        self.pace = RecordingPace(method)
        self.records: list[RoundRecord] = []
        self.prepared = 5  # before the engine was built
        kind = ThreadWorker if overlaps else AwaitedThread
        self.workers = [kind("target", 1), kind("draft", 1)]
        self.scheduler = Scheduler(
            self.pace,
            KVCacheManager(64, 4),
            KVCacheManager(64, 4),
            max_num_seqs=lanes,
            max_num_batched_tokens=budget,
            max_waiting=100,
        )
        self.engine = Engine(
            self.scheduler,
            ModelWorkers(self.target, self.workers[0], self.drafter, self.workers[1], draft_alone),  # type: ignore[arg-type]
            self.verifier,  # type: ignore[arg-type]
            self.pace,
            self.records.append,
            lambda: self.prepared,
        )

    def add(self, *ids: int, max_tokens: int = 9, length: int = 3) -> None:
        for request_id in ids:
            self.engine.add(request_of(request_id, [1] * length, max_tokens))

    def run(self) -> dict[int, list[OutputDelta]]:
        deltas: dict[int, list[OutputDelta]] = {}
        while self.engine.has_work:
            for delta in self.engine.step():
                deltas.setdefault(delta.request_id, []).append(delta)
        return deltas

    def settle(self) -> list[OutputDelta]:
        """Step, and no round is in flight any more: what comes next is planned by the next step."""
        self.engine.step()
        self.engine.rest()
        return self.engine.take()

    def check_empty(self) -> None:
        assert not self.scheduler.requests
        for kv in (self.scheduler.target_kv, self.scheduler.draft_kv):
            assert kv is not None
            assert kv.num_free_pages == 64
            kv.check_integrity()


def tokens_of(deltas: list[OutputDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def fail(*args: object) -> None:
    raise RuntimeError("out of luck")


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*args: object) -> None:
        raise error

    return call
