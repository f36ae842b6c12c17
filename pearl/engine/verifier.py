"""The meeting point of a round: the target's rows judge the drafted tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.engine.logits_processing import process_rows
from pearl.host_tensors import from_numbers
from pearl.messages import (
    Decision,
    Drafted,
    DraftProposal,
    ForwardWork,
    SchedulerOutput,
    TargetOutput,
    TokenLogprobs,
    VerifyResult,
    VerifyWork,
)
from pearl.sampling_batch import SamplingBatches, draft_temperature
from pearl_kernels import KernelSet, Rule

_BONUS = Drafted(-1, 0.0, -1)


@dataclass(frozen=True)
class _Rows:
    """One request's logits rows [begin, end) and what is tested on each; a last _BONUS is drawn, not tested."""

    work: VerifyWork
    forward: ForwardWork
    begin: int
    tokens: tuple[Drafted, ...]

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    @property
    def tested(self) -> tuple[int, ...]:
        return tuple(d.token for d in self.tokens if d is not _BONUS)


class Verifier:
    """Runs on the target's device, with the target worker's kernels."""

    def __init__(
        self, kernels: KernelSet, rule: Rule, vocab_size: int, eos_ids: Collection[int], device: torch.device
    ) -> None:
        self._kernels, self._rule, self._vocab_size = kernels, rule, vocab_size
        self._eos_ids, self._device = eos_ids, device
        self._batches = SamplingBatches(device)

    @torch.inference_mode()
    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        """Judge the pending tokens and the first token of the windows drafted in this round."""
        if not plan.verify:
            return VerifyResult()
        assert target.logits is not None
        requests = self._align(plan, proposal)
        logprobs = {r.work.request_id: self._top_logprobs(target.logits, r) for r in requests}
        for rows in requests:
            if rows.forward.state.params.changes_logits:
                window = target.logits[rows.begin : rows.end]
                process_rows(window, rows.forward.state, rows.tested, self._eos_ids, rows.work.position)
        accepted, next_tokens = self._judge(requests, target.logits, proposal.logits)
        decisions = {}
        for rows, count, token in zip(requests, accepted, next_tokens, strict=True):
            decision = Decision(rows.tested, count, token if token >= 0 else None, None)
            top = logprobs[rows.work.request_id]
            if top is not None:
                decision = Decision(rows.tested, count, decision.next_token, _pick(*top, decision.committed))
            decisions[rows.work.request_id] = decision
        return VerifyResult(decisions)

    @staticmethod
    def _align(plan: SchedulerOutput, proposal: DraftProposal) -> list[_Rows]:
        """Put beside each logits row the token that it judges."""
        forwards = [work for work in plan.target.work if work.num_logits]
        aligned, begin = [], 0
        for work, forward in zip(plan.verify, forwards, strict=True):
            tokens = work.pending
            if forward.num_logits > len(tokens):
                window = proposal.windows.get(work.request_id)
                tokens = (*tokens, window[0] if window else _BONUS)
            aligned.append(_Rows(work, forward, begin, tokens))
            begin += forward.num_logits
        return aligned

    def _judge(
        self, requests: Sequence[_Rows], logits: Tensor, draft_logits: Tensor | None
    ) -> tuple[list[int], list[int]]:
        tokens = [drafted for rows in requests for drafted in rows.tokens]
        positions = [rows.work.position + i for rows in requests for i in range(len(rows.tokens))]
        states = [rows.forward.state for rows in requests]
        optional = {}
        if self._rule == "rejection" and any(state.params.temperature > 0 for state in states):
            temperatures = [draft_temperature(state.params) for state in states]
            optional = {
                "draft_logprobs": self._tensor([d.logprob for d in tokens], torch.float32),
                "draft_rows": self._tensor([d.row for d in tokens], torch.int32),
                "draft_logits": None if draft_logits is None else draft_logits.to(self._device),
                "draft_temperature": self._tensor(temperatures, torch.float32),
            }
        verdict = self._kernels.verify(
            logits,
            self._tensor([d.token for d in tokens], torch.int64),
            self._tensor([*(rows.begin for rows in requests), requests[-1].end], torch.int32),
            self._tensor(positions, torch.int64),
            self._batches.tensors(states),
            self._vocab_size,
            self._rule,
            **optional,
        )
        return verdict.accepted.tolist(), verdict.next_token.tolist()

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return from_numbers(values, dtype, self._device)

    def _top_logprobs(self, logits: Tensor, rows: _Rows) -> tuple[Tensor, int] | None:
        """Log-softmax of the request's raw rows, before any processing changes them in place."""
        count = rows.forward.state.params.logprobs
        if count is None:
            return None
        raw = logits[rows.begin : rows.end, : self._vocab_size].float()
        return raw.log_softmax(-1), count


def _pick(logprobs: Tensor, count: int, committed: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    values, ids = logprobs.topk(count, dim=-1)
    return tuple(
        TokenLogprobs(logprobs[row, token].item(), tuple(zip(ids[row].tolist(), values[row].tolist(), strict=True)))
        for row, token in enumerate(committed)
    )
