"""The meeting point of a round: the target's rows judge the drafted tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pearl.engine.grammar_masks import GrammarMasks
from pearl.engine.judged_rows import JudgedRows, align, in_blocks, joined
from pearl.engine.logits_processing import process_rows
from pearl.engine.prompt_logprobs import find_prompts
from pearl.engine.token_logprobs import FoundLogprobs, Span, TopLogprobs
from pearl.engine.verdict_arguments import VerdictArguments
from pearl.host_tensors import array, from_numbers, start_download, upload
from pearl.messages import (
    Decision,
    DraftProposal,
    FoundPrompt,
    SchedulerOutput,
    TargetOutput,
    VerifyResult,
)
from pearl.sampling_batch import SamplingBatches
from pearl.workers.queue import DeviceQueue
from pearl_kernels import KernelSet, Rule

_OF_NO_DISTRIBUTION = 0  # what the operators draw from a row without one, and seldom from others


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
        """``draft_queue``: of the device of the drafter whose logits proposals name rows of, not its own: rows are sent
        from there while it drafts on.
        """
        self._kernels, self._rule, self._vocab_size = kernels, rule, vocab_size
        self._eos_ids, self._queue = eos_ids, queue
        self._arguments = VerdictArguments(rule, queue, draft_queue)
        self._batches = SamplingBatches(queue.device)
        self._grammars = GrammarMasks(vocab_size, eos_ids)

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        """Judge the pending tokens and the first token of the windows drafted in this round.

        When it returns, the target is at rest, and so is the draft but for prompts, which wait in its own queue.
        """
        if not (self._queue.asynchronous and plan.verify) or _reads_tokens(plan):
            proposal = _read(proposal)
        prompts, rows = self._find_prompts(plan, target.logits)
        if not plan.verify:
            self._queue.synchronize()
            return VerifyResult({}, proposal.windows, proposal.prepared, prompts)
        with self._queue.enter("verify"):
            assert rows is not None
            late = proposal.on_device
            requests = align(plan, proposal.windows if late is None else proposal.windows | late.outlines())
            top = self._top_logprobs(rows, requests)  # of raw rows, before processing changes them in place
            logits = self._process(rows, requests)
            read_verdict = self._judge(in_blocks(requests, self._rule), logits, proposal, top)
            self._queue.mark().wait()
        if late is not None:
            proposal = _read(proposal)
            requests = align(plan, proposal.windows)
        accepted, next_tokens = joined(requests, *read_verdict())
        found = top.found() if top else None
        decisions = map(partial(self._decision, logits, found), requests, accepted, next_tokens)
        ids = [rows.work.request_id for rows in requests]
        return VerifyResult(dict(zip(ids, decisions, strict=True)), proposal.windows, proposal.prepared, prompts)

    def _find_prompts(
        self, plan: SchedulerOutput, logits: Tensor | None
    ) -> tuple[dict[int, FoundPrompt], Tensor | None]:
        """What the plan wants of prompts; and the verdicts' rows of logits."""
        if not plan.target.prompts:
            return {}, logits
        assert logits is not None
        with self._queue.enter("prompt log-probabilities"):
            return find_prompts(logits, plan.target.work, plan.target.prompts, self._vocab_size)

    def _judge(
        self, requests: Sequence[JudgedRows], logits: Tensor, proposal: DraftProposal, top: TopLogprobs | None
    ) -> Callable[[], tuple[list[int], list[int]]]:
        """Ask for the verdict, and for the log-probabilities of what it commits.

        What is returned gives accepted counts and next tokens, once the target is at rest.
        """
        states = [rows.forward.state for rows in requests]
        numbers, draft_logits = self._arguments.numbers(requests, states, proposal)
        params = self._batches.tensors(states)
        common = {"vocab_size": self._vocab_size, "rule": self._rule, "draft_logits": draft_logits}
        if self._kernels.verify_numbers is not None and not self._queue.asynchronous:
            counts, following = self._kernels.verify_numbers(logits, **numbers, params=params, **common)
            if top is not None:
                drafted, here = numbers["draft_tokens"], self._queue.device
                verdict = [from_numbers(values, torch.int64, here) for values in (drafted, counts, following)]
                top.choose(self._committed(requests, *verdict))
            return lambda: (counts, following)
        with torch.inference_mode():
            tensors = self._arguments.tensors(requests, numbers, proposal)
            verdict = self._kernels.verify(logits, **tensors, params=params, **common)
            if top is not None:
                top.choose(self._committed(requests, tensors["draft_tokens"], *verdict))
            accepted, next_token = start_download(verdict)
        return lambda: (accepted.tolist(), next_token.tolist())

    def _committed(
        self, requests: Sequence[JudgedRows], draft_tokens: Tensor, accepted: Tensor, next_token: Tensor
    ) -> Tensor:
        """The token that each row of logits commits, int64 ``[N]``; of rows behind the last one that does, any."""
        owners = [index for index, rows in enumerate(requests) for _ in rows.tokens]
        places = [place for rows in requests for place in range(len(rows.tokens))]
        owner, place = upload([array(v, torch.int64) for v in (owners, places)], self._queue.device)
        return torch.where(place < accepted[owner], draft_tokens, next_token[owner])

    @torch.inference_mode()
    def _process(self, logits: Tensor, requests: Sequence[JudgedRows]) -> Tensor:
        """The rows as they are to be judged. In fp32 where any are changed: the others mean the same in it."""
        changed = [rows for rows in requests if rows.forward.state.params.changes_logits]
        if changed:
            logits = logits.float()
        for rows in changed:
            window = logits[rows.begin : rows.end]
            process_rows(window, rows.forward.state, rows.tested, self._eos_ids, rows.work.position)
        self._grammars.apply(logits, [row for rows in changed for row in rows.masked()])
        return logits

    def _top_logprobs(self, logits: Tensor, requests: Sequence[JudgedRows]) -> TopLogprobs | None:
        counts = [rows.forward.state.params.logprobs for rows in requests]
        spans = [
            Span(rows.begin, rows.end, count) for rows, count in zip(requests, counts, strict=True) if count is not None
        ]
        return TopLogprobs(logits, spans, self._vocab_size) if spans else None

    def _decision(
        self,
        logits: Tensor,
        logprobs: FoundLogprobs | None,
        rows: JudgedRows,
        accepted: int,
        next_token: int,
    ) -> Decision:
        decision = Decision(rows.tested, accepted, next_token if next_token >= 0 else None, None)
        committed = decision.committed
        if _OF_NO_DISTRIBUTION in committed and (error := self._nothing_to_draw(logits, rows, committed)):
            return decision._replace(error=error)
        if logprobs is None or rows.forward.state.params.logprobs is None:
            return decision
        return decision._replace(logprobs=partial(logprobs.of, rows.begin, len(committed)))

    @torch.inference_mode()
    def _nothing_to_draw(self, logits: Tensor, rows: JudgedRows, committed: Sequence[int]) -> str | None:
        """What is wrong with a row that the committed tokens are from, if it is no distribution."""
        for index, token in enumerate(committed):
            if token == _OF_NO_DISTRIBUTION:
                peak = logits[rows.begin + index, : self._vocab_size].max().item()
                if peak == -math.inf:
                    if masked := rows.masked():
                        return self._grammars.failure(masked[index])
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
    if late is None:
        return proposal
    windows, prepared = late.read()
    return replace(proposal, windows=proposal.windows | windows, prepared=proposal.prepared | prepared, on_device=None)
