"""The meeting point of a round: the target's rows judge the drafted tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.engine.logits_processing import process_rows
from pearl.host_tensors import array, from_numbers, start_download, upload
from pearl.messages import (
    Decision,
    DeviceWindows,
    Drafted,
    DraftProposal,
    ForwardWork,
    SchedulerOutput,
    SequenceState,
    TargetOutput,
    TokenLogprobs,
    VerifyResult,
    VerifyWork,
    Windows,
)
from pearl.sampling_batch import SamplingBatches, draft_temperature
from pearl.workers.queue import DeviceQueue
from pearl_kernels import KernelSet, Rule

_BONUS = Drafted(-1, 0.0, -1)
_OF_NO_DISTRIBUTION = 0  # what the operators draw from a row without one, and seldom from others
_DTYPES = {
    "draft_tokens": torch.int64,
    "row_start": torch.int32,
    "positions": torch.int64,
    "draft_logprobs": torch.float32,
    "draft_rows": torch.int32,
    "draft_temperature": torch.float32,
}


class _Rows(NamedTuple):
    """One request's logits rows [begin, end) and what is tested on each; a last _BONUS is drawn, not tested."""

    work: VerifyWork
    forward: ForwardWork
    begin: int
    tokens: tuple[Drafted, ...]

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    def drafts_late(self, proposal: DraftProposal) -> bool:
        """Whether the last token is still being drafted on a device."""
        late = proposal.on_device
        has_window = late is not None and self.work.request_id in late.rows
        return has_window and len(self.tokens) > len(self.work.pending)

    @property
    def tested(self) -> tuple[int, ...]:
        return tuple([d.token for d in self.tokens if d is not _BONUS])


class Verifier:
    """Enqueues behind the target's forward, with the target worker's kernels, and waits once: for the verdict."""

    def __init__(
        self,
        kernels: KernelSet,
        rule: Rule,
        vocab_size: int,
        eos_ids: Collection[int],
        queue: DeviceQueue,
        draft_queue: DeviceQueue | None = None,
    ) -> None:
        """``draft_queue``: of the drafter whose logits proposals name rows of."""
        self._kernels, self._rule, self._vocab_size = kernels, rule, vocab_size
        self._eos_ids, self._queue, self._draft_queue = eos_ids, queue, draft_queue
        self._batches = SamplingBatches(queue.device)

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        """Judge the pending tokens and the first token of the windows drafted in this round.

        When it returns, the target is at rest, and so is the draft but for prompts, which wait in its own queue.
        """
        if not (self._queue.asynchronous and plan.verify) or _reads_tokens(plan):
            proposal = _read(proposal)
        if not plan.verify:
            self._queue.synchronize()
            return VerifyResult({}, proposal.windows)
        with self._queue.enter("verify"):
            assert target.logits is not None
            late = proposal.on_device
            requests = self._align(plan, proposal.windows if late is None else proposal.windows | late.outlines())
            # Log-softmax of raw rows, before any processing changes them in place.
            logprobs = [self._top_logprobs(target.logits, rows) for rows in requests]
            logits = self._process(target.logits, requests)
            read_verdict = self._judge(requests, logits, proposal)
            self._queue.mark().wait()
        if late is not None:
            proposal = _read(proposal)
            requests = self._align(plan, proposal.windows)
        accepted, next_tokens = read_verdict()
        decisions = map(partial(self._decision, logits), requests, accepted, next_tokens, logprobs)
        ids = [rows.work.request_id for rows in requests]
        return VerifyResult(dict(zip(ids, decisions, strict=True)), proposal.windows)

    @staticmethod
    def _align(plan: SchedulerOutput, windows: Windows) -> list[_Rows]:
        """Put beside each logits row the token that it judges."""
        forwards = [work for work in plan.target.work if work.num_logits]
        aligned, begin = [], 0
        for work, forward in zip(plan.verify, forwards, strict=True):
            tokens = work.pending
            if forward.num_logits > len(tokens):
                window = windows.get(work.request_id)
                tokens = (*tokens, window[0] if window else _BONUS)
            aligned.append(_Rows(work, forward, begin, tokens))
            begin += forward.num_logits
        return aligned

    def _judge(
        self, requests: Sequence[_Rows], logits: Tensor, proposal: DraftProposal
    ) -> Callable[[], tuple[list[int], list[int]]]:
        """Ask for the verdict. What is returned gives accepted counts and next tokens, once the target is at rest."""
        states = [rows.forward.state for rows in requests]
        numbers, draft_logits = self._numbers(requests, states, proposal)
        params = self._batches.tensors(states)
        common = {"vocab_size": self._vocab_size, "rule": self._rule, "draft_logits": draft_logits}
        if self._kernels.verify_numbers is not None and not self._queue.asynchronous:
            verdict = self._kernels.verify_numbers(logits, **numbers, params=params, **common)
            return lambda: verdict
        with torch.inference_mode():
            tensors = self._tensors(requests, numbers, proposal)
            verdict = self._kernels.verify(logits, **tensors, params=params, **common)
            accepted, next_token = start_download((verdict.accepted, verdict.next_token))
        return lambda: (accepted.tolist(), next_token.tolist())

    def _numbers(
        self, requests: Sequence[_Rows], states: Sequence[SequenceState], proposal: DraftProposal
    ) -> tuple[dict[str, Sequence[float]], Tensor | None]:
        """The operator's index arguments, and the draft's logits."""
        drafted: list[Drafted] = []
        positions: list[int] = []
        starts = [0]
        for rows in requests:
            drafted += rows.tokens
            positions += range(rows.work.position, rows.work.position + len(rows.tokens))
            starts.append(rows.end)
        numbers: dict[str, Sequence[float]] = {
            "draft_tokens": [d.token for d in drafted],
            "row_start": starts,
            "positions": positions,
        }
        if self._rule != "rejection" or all(state.params.temperature <= 0 for state in states):
            return numbers, None
        draft_logits, draft_rows = self._draft_logits(drafted, proposal.logits)
        numbers["draft_logprobs"] = [d.logprob for d in drafted]
        numbers["draft_rows"] = draft_rows
        numbers["draft_temperature"] = [draft_temperature(state.params) for state in states]
        return numbers, draft_logits

    def _tensors(
        self, requests: Sequence[_Rows], numbers: Mapping[str, Sequence[float]], proposal: DraftProposal
    ) -> dict[str, Tensor]:
        """The index arguments where the target is."""
        arrays = {name: array(values, _DTYPES[name]) for name, values in numbers.items()}
        late = proposal.on_device
        if late is not None:
            columns = {request_id: column for column, request_id in enumerate(late.rows)}
            waiting = [rows for rows in requests if rows.drafts_late(proposal)]
            arrays["late_rows"] = array([rows.end - 1 for rows in waiting], torch.int64)
            arrays["late_columns"] = array([columns[rows.work.request_id] for rows in waiting], torch.int64)
        tensors = dict(zip(arrays, upload(list(arrays.values()), self._queue.device), strict=True))
        if late is not None:
            self._fill_in(late, tensors, tensors.pop("late_rows"), tensors.pop("late_columns"))
        return tensors

    def _fill_in(self, late: DeviceWindows, tensors: dict[str, Tensor], rows: Tensor, columns: Tensor) -> None:
        """The first drafted tokens, from where the drafter's device writes them."""
        self._queue.follow(late.ready)
        for name, values in (("draft_tokens", late.tokens[0]), ("draft_logprobs", late.logprobs[0])):
            if name in tensors:
                tensors[name][rows] = values.to(self._queue.device, non_blocking=True)[columns]

    def _draft_logits(self, drafted: Sequence[Drafted], logits: Tensor | None) -> tuple[Tensor | None, list[int]]:
        """The drafter's logits where the target is, and each token's row of them; other devices send what is named."""
        rows = [token.row for token in drafted]
        if logits is None or logits.device == self._queue.device or self._draft_queue is None:
            return logits, rows
        named = sorted({row for row in rows if row >= 0})
        if not named:
            return None, rows
        with self._draft_queue.enter("send q"):
            near = logits[from_numbers(named, torch.int64, logits.device)].to(self._queue.device, non_blocking=True)
            sent = self._draft_queue.mark()
        self._queue.follow(sent)
        place = {row: index for index, row in enumerate(named)}
        return near, [place.get(row, -1) for row in rows]

    @torch.inference_mode()
    def _process(self, logits: Tensor, requests: Sequence[_Rows]) -> Tensor:
        """The rows as they are to be judged. In fp32 where any are changed: the others mean the same in it."""
        changed = [rows for rows in requests if rows.forward.state.params.changes_logits]
        if changed:
            logits = logits.float()
        for rows in changed:
            window = logits[rows.begin : rows.end]
            process_rows(window, rows.forward.state, rows.tested, self._eos_ids, rows.work.position)
        return logits

    def _top_logprobs(self, logits: Tensor, rows: _Rows) -> tuple[Tensor, int] | None:
        count = rows.forward.state.params.logprobs
        if count is None:
            return None
        with torch.inference_mode():
            return logits[rows.begin : rows.end, : self._vocab_size].float().log_softmax(-1), count

    def _decision(
        self, logits: Tensor, rows: _Rows, accepted: int, next_token: int, top: tuple[Tensor, int] | None
    ) -> Decision:
        decision = Decision(rows.tested, accepted, next_token if next_token >= 0 else None, None)
        committed = decision.committed
        if _OF_NO_DISTRIBUTION in committed and (error := self._nothing_to_draw(logits, rows, committed)):
            return decision._replace(error=error)
        return decision if top is None else decision._replace(logprobs=_pick(*top, committed))

    @torch.inference_mode()
    def _nothing_to_draw(self, logits: Tensor, rows: _Rows, committed: Sequence[int]) -> str | None:
        """What is wrong with a row that the committed tokens are from, if it is no distribution."""
        for index, token in enumerate(committed):
            if token == _OF_NO_DISTRIBUTION:
                peak = logits[rows.begin + index, : self._vocab_size].max().item()
                if peak == -math.inf:
                    return "no token is left to draw: logit_bias, or min_tokens, bans all of them; ban fewer"
                if not math.isfinite(peak):
                    return (
                        "the target's logits are NaN or infinite; its weights, or a dtype that is too narrow for them, "
                        "are at fault: try dtype='float32'"
                    )
        return None


def _reads_tokens(plan: SchedulerOutput) -> bool:
    """Whether the host must know the drafted tokens before they are judged: penalties count them."""
    return any(work.state.params.changes_logits for work in plan.target.work)


def _read(proposal: DraftProposal) -> DraftProposal:
    """With the windows on the host."""
    late = proposal.on_device
    return proposal if late is None else replace(proposal, windows=proposal.windows | late.read(), on_device=None)


def _pick(logprobs: Tensor, count: int, committed: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    values, ids = logprobs.topk(count, dim=-1)
    return tuple(
        TokenLogprobs(logprobs[row, token].item(), tuple(zip(ids[row].tolist(), values[row].tolist(), strict=True)))
        for row, token in enumerate(committed)
    )
