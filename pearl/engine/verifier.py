"""The meeting point of a round: the target's rows judge the drafted tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.engine.grammar_masks import GrammarMasks, MaskedRow
from pearl.engine.logits_processing import process_rows
from pearl.engine.prompt_logprobs import find_prompts
from pearl.engine.token_logprobs import FoundLogprobs, Span, TopLogprobs
from pearl.host_tensors import array, from_numbers, send_rows, start_download, upload
from pearl.messages import (
    Decision,
    DeviceWindows,
    Drafted,
    DraftProposal,
    DrawnTokens,
    ForwardWork,
    FoundPrompt,
    SchedulerOutput,
    SequenceState,
    TargetOutput,
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

    def each(self) -> list[_Rows]:
        """The same rows, each by itself."""
        pending = len(self.work.pending)
        return [
            self._replace(
                work=self.work._replace(pending=(token,) if i < pending else (), position=self.work.position + i),
                begin=self.begin + i,
                tokens=(token,),
            )
            for i, token in enumerate(self.tokens)
        ]

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
        """``draft_queue``: of the device of the drafter whose logits proposals name rows of, not its own: rows are sent
        from there while it drafts on.
        """
        self._kernels, self._rule, self._vocab_size = kernels, rule, vocab_size
        self._eos_ids, self._queue, self._draft_queue = eos_ids, queue, draft_queue
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
            requests = self._align(plan, proposal.windows if late is None else proposal.windows | late.outlines())
            top = self._top_logprobs(rows, requests)  # of raw rows, before processing changes them in place
            logits = self._process(rows, requests)
            read_verdict = self._judge(self._blocks(requests), logits, proposal, top)
            self._queue.mark().wait()
        if late is not None:
            proposal = _read(proposal)
            requests = self._align(plan, proposal.windows)
        accepted, next_tokens = _joined(requests, *read_verdict())
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

    @staticmethod
    def _align(plan: SchedulerOutput, windows: Windows) -> list[_Rows]:
        """Put beside each of the verdicts' logits rows the token that it judges."""
        forwards = {work.state.request_id: work for work in plan.target.work}
        aligned, begin = [], 0
        for work in plan.verify:
            forward, tokens = forwards[work.request_id], work.pending
            count = forward.end + 1 - work.position
            if count > len(tokens):
                window = windows.get(work.request_id)
                tokens = (*tokens, window[0] if window else _BONUS)
            aligned.append(_Rows(work, forward, begin, tokens))
            begin += count
        return aligned

    def _blocks(self, requests: Sequence[_Rows]) -> list[_Rows]:
        """What is judged as a whole: requests, under the block rule of pinned ones each token."""
        if self._rule != "block" or not any(rows.work.pinned for rows in requests):
            return list(requests)
        return [block for rows in requests for block in (rows.each() if rows.work.pinned else (rows,))]

    def _judge(
        self, requests: Sequence[_Rows], logits: Tensor, proposal: DraftProposal, top: TopLogprobs | None
    ) -> Callable[[], tuple[list[int], list[int]]]:
        """Ask for the verdict, and for the log-probabilities of what it commits.

        What is returned gives accepted counts and next tokens, once the target is at rest.
        """
        states = [rows.forward.state for rows in requests]
        numbers, draft_logits = self._numbers(requests, states, proposal)
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
            tensors = self._tensors(requests, numbers, proposal)
            verdict = self._kernels.verify(logits, **tensors, params=params, **common)
            if top is not None:
                top.choose(self._committed(requests, tensors["draft_tokens"], *verdict))
            accepted, next_token = start_download(verdict)
        return lambda: (accepted.tolist(), next_token.tolist())

    def _committed(
        self, requests: Sequence[_Rows], draft_tokens: Tensor, accepted: Tensor, next_token: Tensor
    ) -> Tensor:
        """The token that each row of logits commits, int64 ``[N]``; of rows behind the last one that does, any."""
        owners = [index for index, rows in enumerate(requests) for _ in rows.tokens]
        places = [place for rows in requests for place in range(len(rows.tokens))]
        owner, place = upload([array(v, torch.int64) for v in (owners, places)], self._queue.device)
        return torch.where(place < accepted[owner], draft_tokens, next_token[owner])

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
        if self._rule == "coupled" or all(state.params.temperature <= 0 for state in states):
            return numbers, None
        draft_logits, draft_rows = self._draft_logits(drafted, proposal)
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
        """The first drafted tokens, from where the drafter's device writes them; it drafts on meanwhile."""
        self._queue.follow(late.first_ready)
        first = DrawnTokens(late.first.packed.to(self._queue.device, non_blocking=True))
        for name, values in (("draft_tokens", first.tokens), ("draft_logprobs", first.logprobs)):
            if name in tensors:
                tensors[name][rows] = values[columns]

    def _draft_logits(self, drafted: Sequence[Drafted], proposal: DraftProposal) -> tuple[Tensor | None, list[int]]:
        """The drafter's logits where the target is, and each token's row of them; other devices send what is named."""
        logits, rows = proposal.logits, [token.row for token in drafted]
        if proposal.stored is not None:
            self._queue.follow(proposal.stored)
        if logits is None or logits.device == self._queue.device or self._draft_queue is None:
            return logits, rows
        named = sorted({row for row in rows if row >= 0})
        if not named:
            return None, rows
        with self._draft_queue.enter("send q"):
            # Rows of pending tokens were there before this round.
            written = (proposal.stored, proposal.on_device.first_ready if proposal.on_device else None)
            for mark in filter(None, written):
                self._draft_queue.follow(mark)
            near = send_rows(logits, named, self._queue.device)
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
        self._grammars.apply(logits, [row for rows in changed for row in _masked(rows)])
        return logits

    def _top_logprobs(self, logits: Tensor, requests: Sequence[_Rows]) -> TopLogprobs | None:
        counts = [rows.forward.state.params.logprobs for rows in requests]
        spans = [
            Span(rows.begin, rows.end, count) for rows, count in zip(requests, counts, strict=True) if count is not None
        ]
        return TopLogprobs(logits, spans, self._vocab_size) if spans else None

    def _decision(
        self,
        logits: Tensor,
        logprobs: FoundLogprobs | None,
        rows: _Rows,
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
    def _nothing_to_draw(self, logits: Tensor, rows: _Rows, committed: Sequence[int]) -> str | None:
        """What is wrong with a row that the committed tokens are from, if it is no distribution."""
        for index, token in enumerate(committed):
            if token == _OF_NO_DISTRIBUTION:
                peak = logits[rows.begin + index, : self._vocab_size].max().item()
                if peak == -math.inf:
                    if masked := _masked(rows):
                        return self._grammars.failure(masked[index])
                    return "no token is left to draw: logit_bias, or min_tokens, bans all of them; ban fewer"
                if not math.isfinite(peak):
                    return (
                        "the target's logits are NaN or infinite; its weights, or a dtype that is too narrow for them, "
                        "are at fault: try dtype='float32'"
                    )
        return None


def _masked(rows: _Rows) -> list[MaskedRow]:
    """A request's rows, if it has a grammar, each with the output before it."""
    state = rows.forward.state
    if state.grammar is None:
        return []
    assert state.history is not None
    output = (*state.history[state.prompt_length : rows.work.position], *rows.tested)
    committed = rows.work.position - state.prompt_length
    return [MaskedRow(rows.begin + i, state, output[: committed + i]) for i in range(len(rows.tokens))]


def _joined(requests: Sequence[_Rows], accepted: list[int], next_tokens: list[int]) -> tuple[list[int], list[int]]:
    """The verdicts on requests, from those on their blocks: what is behind a token that fails is not looked at."""
    if len(accepted) == len(requests):
        return accepted, next_tokens
    verdicts = zip(accepted, next_tokens, strict=True)
    counts, following = [], []
    for rows in requests:
        held, token = 0, -1
        for count, after in itertools.islice(verdicts, len(rows.tokens) if rows.work.pinned else 1):
            if token < 0:
                held, token = held + count, after
        counts.append(held)
        following.append(token)
    return counts, following


def _reads_tokens(plan: SchedulerOutput) -> bool:
    """Whether the host must know the drafted tokens before they are judged: penalties count them."""
    return any(work.state.params.changes_logits for work in plan.target.work)


def _read(proposal: DraftProposal) -> DraftProposal:
    """With the windows on the host."""
    late = proposal.on_device
    return proposal if late is None else replace(proposal, windows=proposal.windows | late.read(), on_device=None)
