"""Simulated models over simulated KV pages, and the engine's own code around them.

The simulated target is a function of the whole prefix, which it reads from its pages alone: a page that holds anything
else than the sequence (a rollback, copy or sharing error) is found at the first forward that reads it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from random_branches import RandomBranches
from random_pace import RandomPace

from pearl.engine.branches import Branches
from pearl.engine.engine import Engine
from pearl.engine.odds import choose
from pearl.engine.output_processor import OutputProcessor
from pearl.engine.request import Request, Status
from pearl.engine.rounds import RoundRecord
from pearl.engine.scheduler import Scheduler
from pearl.kv import KVCacheManager, PageCopy, PrefixKey
from pearl.messages import (
    Branch,
    Decision,
    Drafted,
    DraftPlan,
    DraftProposal,
    DraftWork,
    ForwardWork,
    Ranked,
    SchedulerOutput,
    SequenceState,
    TargetOutput,
    TargetPlan,
    VerifyResult,
)
from pearl.methods import METHODS as MODES
from pearl.outputs import OutputDelta, RequestMetrics
from pearl.pace import FixedPace, PacePolicy, PreparingPace
from pearl.sampling_params import SamplingParams
from pearl.workers import HostQueue, InlineWorker, Reply, Worker

VOCAB = 29
EOS = 0
SWITCHING = "switching"
METHODS: tuple[str, ...] = (*MODES, SWITCHING)


def pace_of(method: str, window: int) -> PacePolicy:
    return RandomPace(window) if method == SWITCHING else FixedPace(method, window)  # type: ignore[arg-type]


class PieceDetokenizer:
    """One fixed text for each token id; ``tail`` is what only ``flush`` gives out."""

    def __init__(self, pieces: Sequence[str] | None = None, tail: str = "") -> None:
        self._pieces, self._tail = pieces, tail

    def feed(self, tokens: Sequence[int]) -> str:
        return "".join(f"<{token}>" if self._pieces is None else self._pieces[token] for token in tokens)

    def flush(self) -> str:
        return self._tail


def request_of(
    request_id: int,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    params: SamplingParams | None = None,
    eos_ids: Collection[int] = (EOS,),
    seed: int = 0,
    pinned: bool = False,
    rekeys: bool = False,
) -> Request:
    params = params or SamplingParams(max_tokens=max_tokens)
    output = OutputProcessor(PieceDetokenizer(), params, max_tokens, eos_ids)
    metrics = RequestMetrics()
    return Request(request_id, params, seed, list(prompt), len(prompt), max_tokens, output, metrics, pinned, rekeys)


def drafted(*tokens: int) -> tuple[Drafted, ...]:
    return tuple(Drafted(token, 0.0, -1) for token in tokens)


def sequence_state(
    params: SamplingParams, history: Sequence[int] | None = None, prompt_length: int = 1
) -> SequenceState:
    return SequenceState(1, 0, params, 0, prompt_length, None if history is None else tuple(history))


def target_token(prefix: Sequence[int]) -> int:
    """The token that the simulated target puts after ``prefix``."""
    return zlib.crc32(bytes(prefix)) % VOCAB


def expected_output(
    prompt: Sequence[int], max_tokens: int, params: SamplingParams | None = None
) -> tuple[list[int], str, str | None]:
    """Tokens, text and finish reason that a request must return: token by token, text at once."""
    output = OutputProcessor(PieceDetokenizer(), params or SamplingParams(max_tokens=max_tokens), max_tokens, (EOS,))
    tokens, text, reason = list[int](), "", None
    while reason is None:
        tokens.append(target_token([*prompt, *tokens]))
        _, piece, reason = output.text(tokens[-1:], output.end(tokens[-1:]))
        text += piece
    return tokens, text, reason


def target_sequence(prompt: Sequence[int], max_tokens: int, eos_ids: Collection[int] = (EOS,)) -> list[int]:
    """What a request must return: the target's own tokens up to EOS or max_tokens."""
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in eos_ids):
        output.append(target_token([*prompt, *output]))
    return output


class _Entry(NamedTuple):
    position: int
    token: int
    digest: int  # of the prefix that the entry was computed on: keys and values depend on all of it


class PagedMemory:
    """What a model's KV tensors hold, slot by slot."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._slots: dict[int, _Entry] = {}

    def copy(self, copies: Sequence[PageCopy]) -> None:
        sources, destinations = {c.source for c in copies}, [c.destination for c in copies]
        assert len(set(destinations)) == len(destinations), copies
        assert not sources & set(destinations), copies
        for pair in copies:
            for slot in range(self._page_size):
                self._slots.pop(pair.destination * self._page_size + slot, None)
                held = self._slots.get(pair.source * self._page_size + slot)
                if held is not None:
                    self._slots[pair.destination * self._page_size + slot] = held

    def write(self, table: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        """What a forward does: each entry is computed on what the pages hold below it, right or wrong."""
        below = self._slots.get(self._slot(table, start - 1)) if start else None
        digest = below.digest if below else 0
        for position, token in enumerate(tokens, start):
            digest = zlib.crc32(bytes([token]), digest)
            self._slots[self._slot(table, position)] = _Entry(position, token, digest)

    def read(self, table: Sequence[int], end: int) -> list[int]:
        """The tokens of positions [0, end), each computed on exactly the ones before it."""
        tokens: list[int] = []
        digest = 0
        for position in range(end):
            entry = self._slots.get(self._slot(table, position))
            assert entry is not None, f"position {position} of {end} was never computed"
            digest = zlib.crc32(bytes([entry.token]), digest)
            assert entry == _Entry(position, entry.token, digest), f"stale KV at position {position}: {entry}"
            tokens.append(entry.token)
        return tokens

    def _slot(self, table: Sequence[int], position: int) -> int:
        return table[position // self._page_size] * self._page_size + position % self._page_size


Truth = Callable[[int], list[int]]  # committed + pending tokens of a request


def compute(memory: PagedMemory, work: Sequence[ForwardWork], truth: Truth) -> list[list[int]]:
    """One ragged forward: everything is written, then everything is read. Returns each item's whole prefix."""
    for item in work:
        assert item.tokens, item
        assert item.num_logits <= len(item.tokens), item
        memory.write(item.block_table, item.start, item.tokens)
    prefixes = [memory.read(item.block_table, item.end) for item in work]
    for item, prefix in zip(work, prefixes, strict=True):
        assert prefix == truth(item.state.request_id)[: item.end]
    return prefixes


class SimulatedTarget:
    """``TargetRunner``'s interface; ``logits`` are simply the target's token for each wanted row."""

    def __init__(self, memory: PagedMemory, truth: Truth) -> None:
        self._memory, self._truth = memory, truth

    def run(self, plan: TargetPlan) -> TargetOutput:
        self._memory.copy(plan.copies)
        rows: list[int] = []
        for item, prefix in zip(plan.work, compute(self._memory, plan.work, self._truth), strict=True):
            first = len(prefix) - item.num_logits + 1
            rows.extend(target_token(prefix[:end]) for end in range(first, first + item.num_logits))
        return TargetOutput(torch.tensor(rows, dtype=torch.int64))

    def check(self) -> None:
        pass


class SimulatedDrafter:
    """Right with probability ``accuracy``; ``moody`` also makes it propose fewer tokens than asked, or none."""

    prepares = True

    def __init__(self, memory: PagedMemory | None, truth: Truth, accuracy: float = 0.7, moody: bool = False) -> None:
        self._memory, self._truth = memory, truth
        self._accuracy, self._moody = accuracy, moody
        self.reads_history = memory is None

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def propose(self, plan: DraftPlan) -> DraftProposal:
        if self._memory is not None:
            self._memory.copy(plan.copies)
            compute(self._memory, [item.forward for item in plan.work], self._truth)
            for item in plan.work:
                for branch in item.branches:
                    if branch.token is not None:
                        self._compute(branch.block_table, self._before(item, branch), branch.token)
        windows, prepared = {}, {}
        for item in plan.work:
            texts = self._truth(item.forward.state.request_id)
            windows[item.forward.state.request_id] = self._draft(texts, item.num_draft, plan.alternatives)
        if self._memory is not None:
            self._memory.copy(plan.late_copies)
        for item in plan.work:
            request_id, table = item.forward.state.request_id, item.forward.block_table
            self._write(self._truth(request_id), windows[request_id], table)
            for branch in item.branches:
                prepared[branch.id] = self._prepare(item, branch, windows[request_id], plan.alternatives)
        steps = max((item.num_draft for item in plan.work), default=0)
        return DraftProposal(windows, steps=steps, prepared=prepared)

    def _before(self, item: DraftWork, branch: Branch) -> list[int]:
        text = self._truth(item.forward.state.request_id)
        assert branch.start <= len(text)
        return text[: branch.start]

    def _prepare(
        self, item: DraftWork, branch: Branch, window: tuple[Drafted, ...], alternatives: int
    ) -> tuple[Drafted, ...]:
        before, token = self._before(item, branch), branch.token
        if token is None:
            ranked = window[0].ranked if window else None
            if ranked is None or branch.rank >= len(ranked.tokens):
                return ()
            token = ranked.tokens[branch.rank]
            if self._memory is not None:
                self._compute(branch.block_table, before, token)
        text = [*before, token]
        own = self._draft(text, branch.num_draft, alternatives)
        self._write(text, own, branch.block_table)
        return (*drafted(token), *own)

    def _draft(self, text: list[int], wanted: int, alternatives: int) -> tuple[Drafted, ...]:
        text, window = list(text), []
        for _ in range(self._count(text, wanted)):
            token = self.guess(text)
            near = [(target_token(text) + i) % VOCAB for i in (0, 1, 2, 5)]
            others = tuple([other for other in near if other != token][:alternatives])
            ranked = Ranked(-0.5, others, tuple([-1.5 - i for i in range(len(others))])) if alternatives else None
            window.append(Drafted(token, 0.0, -1, ranked))
            text.append(token)
        return tuple(window)

    def _write(self, before: list[int], window: tuple[Drafted, ...], table: Sequence[int]) -> None:
        """What drafting a window computes: all but its last token."""
        text = list(before)
        for drafted_token in window[:-1] if self._memory is not None else ():
            self._compute(table, text, drafted_token.token)
            text.append(drafted_token.token)

    def _compute(self, table: Sequence[int], before: list[int], token: int) -> None:
        assert self._memory is not None
        self._memory.write(table, len(before), [token])
        assert self._memory.read(table, len(before) + 1) == [*before, token]

    def guess(self, prefix: Sequence[int]) -> int:
        right = zlib.crc32(bytes(prefix), 1) % 1000 < 1000 * self._accuracy
        return (target_token(prefix) + (not right)) % VOCAB

    def _count(self, prefix: Sequence[int], wanted: int) -> int:
        return min(wanted, zlib.crc32(bytes(prefix), 2) % (wanted + 1)) if self._moody else wanted


class SimulatedVerifier:
    """The greedy rule, written out: pending tokens in order, then the first one drafted in this round."""

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        rows: list[int] = [] if target.logits is None else target.logits.tolist()
        forwards = [item for item in plan.target.work if item.num_logits]
        decisions = {}
        for work, forward in zip(plan.verify, forwards, strict=True):
            assert work.request_id == forward.state.request_id
            assert work.position == forward.end - forward.num_logits + 1
            own, rows = rows[: forward.num_logits], rows[forward.num_logits :]
            window = proposal.windows.get(work.request_id, ())
            tested = [d.token for d in (*work.pending, *window[:1])][: len(own)]
            accepted = 0
            while accepted < len(tested) and tested[accepted] == own[accepted]:
                accepted += 1
            following = own[accepted] if accepted < len(own) else None
            decisions[work.request_id] = Decision(tuple(tested), accepted, following, None)
        assert not rows
        return VerifyResult(decisions, proposal.windows, proposal.prepared)


class _LateReply(Reply[Any]):
    __slots__ = ("_call", "_worker")

    def __init__(self, worker: LateWorker, call: Callable[[], Any]) -> None:
        super().__init__()
        self._worker, self._call = worker, call

    def result(self, timeout: float = -1) -> Any:
        self._worker.log.append((self._worker.name, "asked"))
        self._worker.rest()
        return super().result(timeout)

    def make(self) -> None:
        self.run(self._worker.work, self._call)


class LateWorker:
    """Really asynchronous, in one thread: a call is made when somebody asks for what it returns, as late as can be."""

    blocks = False

    def __init__(self, name: str = "", log: list[tuple[str, str]] | None = None) -> None:
        self.name, self.log = name, [] if log is None else log
        self._waiting: _LateReply | None = None

    @property
    def is_busy(self) -> bool:
        return self._waiting is not None

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Reply[Any]:
        assert not self.is_busy, "it was not at rest when this round began"
        self.log.append((self.name, "begun"))
        self._waiting = _LateReply(self, partial(call, *args, **kwargs))
        return self._waiting

    def work(self, call: Callable[[], Any]) -> Any:
        return call()

    def rest(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.make()

    def close(self) -> None:
        assert not self.is_busy, "closed while it works"
        self.log.append((self.name, "closed"))


class CheckedScheduler(Scheduler):
    """Checks every plan before anyone works on it. Keeps what was committed of every request."""

    workers: Sequence[LateWorker] = ()
    planned: Mapping[int, list[int]]  # committed and pending tokens of each request, at the latest plan

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.texts: dict[int, tuple[int, ...]] = {}

    def update(self, request: Request, *of_round: Any) -> tuple[int, ...]:
        committed = super().update(request, *of_round)
        self.texts[request.id] = tuple(request.tokens)
        return committed

    def schedule(self) -> SchedulerOutput:
        assert not any(worker.is_busy for worker in self.workers), "pages may move while they are written to"
        plan = super().schedule()
        self.planned = {r.id: [*r.tokens, *(d.token for d in r.pending)] for r in self.requests.values()}
        target = {item.state.request_id: item for item in plan.target.work}
        draft = {item.forward.state.request_id: item for item in plan.draft.work}
        assert len(target) == len(plan.target.work), "planned twice"
        assert len(draft) == len(plan.draft.work), "planned twice"
        assert not set(plan.preempted) & (target.keys() | draft.keys()), "preempted after it was planned"
        assert len({r.lane for r in self.running}) == len(self.running)
        for work in plan.verify:
            request, forward = self.requests[work.request_id], target[work.request_id]
            bonus = not request.pinned or work.request_id in draft or request.draft_is_dry
            assert forward.num_logits == min(len(request.pending) + bonus, request.remaining)
            assert forward.end == request.length + forward.num_logits - 1
            assert work.request_id not in draft or draft[work.request_id].num_draft, "decided before the draft is ready"
        for request_id, forward in target.items():
            request = self.requests[request_id]
            assert forward.start == request.target_computed
            assert request.status is Status.RUNNING
            assert forward.num_logits or forward.end < request.length, "computed without judging"
        for request_id, item in draft.items():
            request = self.requests[request_id]
            assert item.forward.start == request.draft_computed
            assert request.status is Status.RUNNING
            assert item.num_draft <= request.remaining - len(request.pending)
            if item.num_draft and self.draft_kv:
                assert item.forward.end == request.length + len(request.pending)
            assert item.branches == request.branches
            assert len({(b.held, b.rank) for b in item.branches}) == len(item.branches)
            for branch in item.branches:
                self._check_branch(request, item, branch)
        assert sum(len(item.branches) for item in plan.draft.work) <= (plan.pace.branches if plan.pace else 0)
        return plan

    @staticmethod
    def _check_branch(request: Request, item: DraftWork, branch: Branch) -> None:
        k = len(request.pending)
        assert branch.start == request.length + branch.held
        assert branch.num_draft in range(1, request.remaining - branch.held)
        assert branch.token is None if branch.held == k else branch.token != request.pending[branch.held].token
        if item.forward.block_table:
            assert branch.held == k or branch.start <= item.forward.start


def prefix_of(key: PrefixKey) -> tuple[int, ...]:
    return (*(prefix_of(key.parent) if key.parent else ()), *key.tokens)


@dataclass
class Simulation:
    """An engine over simulated models. ``step`` checks the invariants that hold between rounds."""

    engine: Engine
    scheduler: CheckedScheduler
    drafter: SimulatedDrafter
    records: list[RoundRecord]
    num_pages: int
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
        assert all(kv.num_free_pages == self.num_pages for kv in self.pools)
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
        SimulatedTarget(PagedMemory(page_size), truth),  # type: ignore[arg-type]
        workers[0],
        drafter,
        workers[1],
        SimulatedVerifier(),  # type: ignore[arg-type]
        pace,
        records.append,
    )
    return Simulation(engine, scheduler, drafter, records, num_pages, lanes)
