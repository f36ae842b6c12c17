"""The engine's own code around simulated models, with the invariants that hold between rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from checked_scheduler import CheckedScheduler
from late_worker import LateWorker
from method_paces import pace_of
from paged_memory import PagedMemory
from random_branches import RandomBranches
from simulated_models import SimulatedDrafter, SimulatedTarget, SimulatedVerifier

from pearl.engine.branches import Branches
from pearl.engine.engine import Engine
from pearl.engine.model_workers import ModelWorkers
from pearl.engine.odds import choose
from pearl.engine.request import Request, Status
from pearl.engine.rounds import RoundRecord
from pearl.kv import KVCacheManager, PrefixKey
from pearl.messages import DraftPlan, SchedulerOutput, TargetPlan
from pearl.outputs import OutputDelta
from pearl.pace import PacePolicy, PreparingPace
from pearl.workers import HostQueue, InlineWorker, Worker


def prefix_of(key: PrefixKey) -> tuple[int, ...]:
    return (*(prefix_of(key.parent) if key.parent else ()), *key.tokens)


@dataclass
class Simulation:
    """An engine over simulated models. ``step`` checks the invariants that hold between rounds."""

    engine: Engine
    scheduler: CheckedScheduler
    drafter: SimulatedDrafter
    records: list[RoundRecord]
    lanes: int
    outputs: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    last: dict[int, OutputDelta] = field(default_factory=dict)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.engine.add(request)
            self.outputs[request.id], self.texts[request.id] = [], ""

    def step(self) -> SchedulerOutput:
        """One round; returns its plan."""
        self.receive(self.engine.step())
        self.check()
        return self.records[-1].plan if self.records else SchedulerOutput(TargetPlan(()), DraftPlan(()))

    def receive(self, deltas: Sequence[OutputDelta]) -> None:
        for delta in deltas:
            assert delta.error is None, delta.error
            assert delta.request_id not in self.last or self.last[delta.request_id].finish_reason is None, "shown late"
            self.outputs[delta.request_id].extend(delta.token_ids)
            self.texts[delta.request_id] += delta.text
            self.last[delta.request_id] = delta

    def run(self, limit: int = 2000) -> dict[int, list[int]]:
        for _ in range(limit):
            if not self.engine.has_work:
                return self.outputs
            self.step()
        raise AssertionError(f"not finished after {limit} rounds")

    def check(self) -> None:
        for kv in self.pools:
            kv.check_integrity()
            for key in kv._pool._cache:
                prefix = prefix_of(key)
                texts = self.scheduler.texts.values()
                assert any(text[: len(prefix)] == prefix for text in texts), f"cached, but never committed: {prefix}"
        # A branch lives as long as its round, and no longer than its request.
        branches = [branch for request in self.scheduler.requests.values() for branch in request.branches]
        assert not branches or any(worker.is_busy for worker in self.scheduler.workers)
        if self.scheduler.branches is not None:
            slots = [r.slot for r in self.scheduler.requests.values() if r.slot is not None]
            slots += [branch.slot for branch in branches]
            free = self.scheduler.branches._free_slots
            assert sorted([*free, *slots]) == list(range(len(free) + len(slots)))
        if self.scheduler.draft_kv is not None:
            assert set(self.scheduler.draft_kv._branches) == {branch.id for branch in branches}
        lanes = [request.lane for request in self.scheduler.running]
        assert len(set(lanes)) == len(lanes)
        assert set(lanes) <= set(range(self.lanes))
        for request in self.scheduler.requests.values():
            assert 0 <= request.target_computed < request.length
            assert 0 <= request.draft_computed < request.length + len(request.pending)
            assert len(request.pending) <= request.remaining
            assert (request.status is Status.RUNNING) == (request.lane >= 0)

    def check_empty(self) -> None:
        """Nothing is left behind once every request has ended."""
        self.check()
        assert not self.engine.has_work
        assert not self.scheduler.requests
        assert all(kv.num_free_pages == kv.num_pages for kv in self.pools)
        assert sorted(self.scheduler._free_lanes) == list(range(self.lanes))

    @property
    def pools(self) -> list[KVCacheManager]:
        return [kv for kv in (self.scheduler.target_kv, self.scheduler.draft_kv) if kv is not None]


def simulate(
    method: str = "pearl",
    *,
    window: int = 3,
    num_pages: int = 100,
    page_size: int = 4,
    budget: int = 64,
    prefill_chunk: int | None = None,
    lanes: int = 4,
    max_waiting: int = 100,
    draft_keeps_kv: bool = True,
    accuracy: float = 0.7,
    moody: bool = False,
    prefix_caching: bool = True,
    lookahead: int = 64,
    overlaps: bool = False,
    log: list[tuple[str, str]] | None = None,
    branches: int = 0,
    branch_seed: int | None = None,
) -> Simulation:
    """``overlaps``: with workers that are asynchronous (``LateWorker``), which write to ``log``. ``branches``: windows
    to prepare in a round; with a seed random ones, else the likeliest.
    """
    pace: PacePolicy = pace_of(method, window)
    pace = PreparingPace(pace, branches) if branches else pace
    draft_keeps_kv = draft_keeps_kv and method != "autoregressive"
    scheduler = CheckedScheduler(
        pace,
        KVCacheManager(num_pages, page_size, prefix_caching, lookahead),
        KVCacheManager(num_pages, page_size, prefix_caching, lookahead) if draft_keeps_kv else None,
        max_num_seqs=lanes,
        max_num_batched_tokens=budget,
        max_waiting=max_waiting,
        prefill_chunk=prefill_chunk,
    )
    if branches:
        chooser = choose if branch_seed is None else RandomBranches(branch_seed)
        scheduler.branches = Branches(scheduler.draft_kv, lanes, branches, "rejection", chooser)

    def truth(request_id: int) -> list[int]:
        return scheduler.planned[request_id].copy()

    drafter = SimulatedDrafter(PagedMemory(page_size) if draft_keeps_kv else None, truth, accuracy, moody)
    records: list[RoundRecord] = []
    workers: list[Worker] = [InlineWorker(HostQueue(torch.device("cpu"))) for _ in range(2)]
    if overlaps:
        scheduler.workers = [LateWorker(name, log) for name in ("target", "draft")]
        workers = list(scheduler.workers)
    engine = Engine(
        scheduler,
        ModelWorkers(SimulatedTarget(PagedMemory(page_size), truth), workers[0], drafter, workers[1]),  # type: ignore[arg-type]
        SimulatedVerifier(),  # type: ignore[arg-type]
        pace,
        records.append,
    )
    return Simulation(engine, scheduler, drafter, records, lanes)
