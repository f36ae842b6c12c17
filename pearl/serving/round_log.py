"""The rounds that an HTTP request's outputs took part in: when both models worked, what became of drafted tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from pearl.engine.rounds import RoundRecord, hits
from pearl.messages import DraftWork, ForwardWork, Interval
from pearl.sampling_params import SamplingParams


class RoundLog:
    """An observer, until it is taken away. The engine's thread calls it, the event loop takes what it wrote."""

    def __init__(self, params: Sequence[SamplingParams]) -> None:
        """``params``: the very objects that the outputs are submitted with, by which rounds know them."""
        self._params = {id(each): each for each in params}
        self._begin = time.perf_counter()
        self._written: deque[dict[str, Any]] = deque()

    def __call__(self, record: RoundRecord) -> None:
        plan = record.plan
        target = [work for work in plan.target.work if id(work.state.params) in self._params]
        draft = [item for item in plan.draft.work if id(item.forward.state.params) in self._params]
        if target or draft:
            self._written.append(self._entry(record, target, draft))

    def take(self) -> list[dict[str, Any]]:
        """What was written since the last call, in order."""
        return [self._written.popleft() for _ in range(len(self._written))]

    def _entry(self, record: RoundRecord, target: Sequence[ForwardWork], draft: Sequence[DraftWork]) -> dict[str, Any]:
        """Times are milliseconds, since the request was queued; tokens are those of its outputs together."""
        plan, result = record.plan, record.result
        own = {work.state.request_id for work in target}
        decisions = [decision for key, decision in result.decisions.items() if key in own]
        windows = [result.windows.get(item.forward.state.request_id, ()) for item in draft if item.num_draft]
        prepared = [max(0, len(result.prepared.get(b.id, ())) - 1) for item in draft for b in item.branches]
        entry: dict[str, Any] = {
            "mode": None if plan.pace is None else plan.pace.mode,
            "target": self._forward(record.target, "rows", sum(len(work.tokens) for work in target)),
            "draft": self._forward(record.proposal.busy, "steps", record.proposal.steps),
            "pending": sum(len(verify.pending) for verify in plan.verify if verify.request_id in own),
            "drafted": sum(map(len, windows)),
            "tested": sum(len(decision.tested) for decision in decisions),
            "accepted": sum(decision.accepted for decision in decisions),
            "committed": sum(len(decision.committed) for decision in decisions),
        }
        if prepared:
            came_true = [tokens for key, tokens in hits(record).items() if key in own]
            entry |= {"prepared": len(prepared), "prepared_tokens": sum(prepared), "hit_tokens": sum(came_true)}
        return entry

    def _forward(self, busy: Interval, counted: str, count: int) -> dict[str, Any] | None:
        """None where the model rested. ``count`` is 0 where it worked for other requests alone."""
        if not busy.seconds:
            return None
        return {"begin": _milliseconds(busy.begin - self._begin), "ms": _milliseconds(busy.seconds), counted: count}


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
