"""What the rounds of a run were made of: kinds, times by part, acceptance by position, prepared windows."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.shared.round_times import only_decodes, together
from pearl.engine.branches import is_hit
from pearl.engine.judge import Judge
from pearl.engine.rounds import RoundRecord
from pearl.messages import Busy, DraftProposal, SchedulerOutput, TargetOutput, VerifyResult


class TimedJudge:
    """Around a verifier; ``verdicts``: when each was made, by the id() of its result, which rounds hold on to."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.verdicts: dict[int, Busy] = {}

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        begin = time.perf_counter()
        result = self._judge.verify(plan, proposal, target)
        self.verdicts[id(result)] = Busy.since(begin)
        return result


@dataclass
class Anatomy:
    """Of a run, or of several. Times are of rounds that only decoded. All of it goes into JSON and comes back.

    kinds: rounds of a request: "pre" (nothing pending, and both models work), "post" (a pending window is verified
    while the next is drafted), "verify" (one is verified, no draft), "draft" (the target rests), "plain" (no draft at
    all). seconds: whole, target, draft, verify, host (none of these), target_idle, draft_idle. target_rows: seconds of
    forwards by "alone 5" or "beside 5", and rows; draft_steps: of a step, "alone" or "beside". overheads: of rounds,
    beside the longer of two forwards, or both where they took turns. positions: tested and held, by place in the
    verdict. first, later: tested and held, of the first drafted token after one of the target's own, and of those
    behind it. branches: by "held rank", prepared and hit.
    """

    rounds: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    target_rows: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    draft_steps: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    overheads: list[float] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    first: list[int] = field(default_factory=lambda: [0, 0])
    later: list[int] = field(default_factory=lambda: [0, 0])
    branches: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    @classmethod
    def of(cls, rounds: Sequence[RoundRecord], verdicts: Mapping[int, Busy]) -> Anatomy:
        """``verdicts``: as of TimedJudge."""
        found = cls()
        corrected: dict[int, bool] = {}  # requests whose latest token is the target's own
        for record in rounds:
            found.rounds += 1
            found._count_kinds(record)
            found._count_acceptance(record, corrected)
            found._count_branches(record)
            if only_decodes(record):
                found._add_times(record, verdicts[id(record.result)])
        return found

    def _count_kinds(self, record: RoundRecord) -> None:
        drafts = {w.forward.state.request_id for w in record.plan.draft.work if w.num_draft}
        verified = {work.request_id: work for work in record.plan.verify}
        for request_id in drafts | set(verified):
            work = verified.get(request_id)
            if work is None:
                kind = "draft"
            elif request_id in drafts:
                kind = "post" if work.pending else "pre"
            else:
                kind = "verify" if work.pending else "plain"
            self.kinds[kind] += 1

    def _count_acceptance(self, record: RoundRecord, corrected: dict[int, bool]) -> None:
        for request_id, decision in record.result.decisions.items():
            reached = decision.accepted + decision.rejected
            for place in range(reached):
                if place == len(self.positions):
                    self.positions.append([0, 0])
                held = place < decision.accepted
                after_own = corrected.get(request_id, True) if place == 0 else False
                for counts in (self.positions[place], self.first if after_own else self.later):
                    counts[0] += 1
                    counts[1] += held
            corrected[request_id] = decision.next_token is not None

    def _count_branches(self, record: RoundRecord) -> None:
        for item in record.plan.draft.work:
            decision = record.result.decisions.get(item.forward.state.request_id)
            hit = False
            for branch in item.branches:
                counts = self.branches[f"{branch.held} {branch.rank}"]
                counts[0] += 1
                window = record.result.prepared.get(branch.id, ())
                if decision is not None and not hit and is_hit(branch, window, decision):
                    hit = True  # the first one is taken
                    counts[1] += 1

    def _add_times(self, record: RoundRecord, verdict: Busy) -> None:
        target, draft, whole = record.target, record.proposal.busy, record.whole.seconds
        both = together([target, draft])
        verify = together([target, draft, verdict]) - both
        for part, seconds in (
            ("whole", whole), ("target", target.seconds), ("draft", draft.seconds), ("verify", verify),
            ("host", max(0.0, whole - both - verify)), ("target_idle", max(0.0, whole - target.seconds)),
            ("draft_idle", max(0.0, whole - draft.seconds)),
        ):  # fmt: skip
            self.seconds[part] += seconds
        where = "beside" if target.seconds and draft.seconds else "alone"
        if target.seconds:
            self.target_rows[f"{where} {sum(len(w.tokens) for w in record.plan.target.work)}"].append(target.seconds)
        if draft.seconds and record.proposal.steps:
            self.draft_steps[where].append(draft.seconds / record.proposal.steps)
        self.overheads.append(max(0.0, whole - max(target.seconds, draft.seconds)))

    def as_json(self) -> dict[str, Any]:
        """Times as [number, mean]: a run of a thousand rounds takes a line."""
        return {
            "rounds": self.rounds, "kinds": dict(self.kinds), "seconds": dict(self.seconds),
            "target_rows": {key: _mean(times) for key, times in self.target_rows.items()},
            "draft_steps": {key: _mean(times) for key, times in self.draft_steps.items()},
            "overhead": _mean(self.overheads),
            "positions": self.positions, "first": self.first, "later": self.later, "branches": dict(self.branches),
        }  # fmt: skip

    @classmethod
    def together(cls, runs: Iterable[dict[str, Any]]) -> Anatomy:
        """Of several runs' JSON."""
        found = cls()
        for run in runs:
            found.rounds += run["rounds"]
            found.kinds.update(run["kinds"])
            for part, seconds in run["seconds"].items():
                found.seconds[part] += seconds
            for mine, theirs in ((found.target_rows, run["target_rows"]), (found.draft_steps, run["draft_steps"])):
                for key, (count, mean) in theirs.items():
                    mine[key] += [mean] * count
            found.overheads += [run["overhead"][1]] * run["overhead"][0]
            for place, counts in enumerate(run["positions"]):
                if place == len(found.positions):
                    found.positions.append([0, 0])
                _add(found.positions[place], counts)
            _add(found.first, run["first"])
            _add(found.later, run["later"])
            for key, counts in run["branches"].items():
                _add(found.branches[key], counts)
        return found

    @property
    def acceptance(self) -> float | None:
        tested, held = (a + b for a, b in zip(self.first, self.later, strict=True))
        return held / tested if tested else None


def _mean(times: Sequence[float]) -> list[float]:
    return [len(times), statistics.fmean(times) if times else 0.0]


def _add(counts: list[int], more: Sequence[int]) -> None:
    for index, number in enumerate(more):
        counts[index] += number
