"""The arguments of the ``verify`` operator, gathered where the target is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pearl.engine.judged_rows import JudgedRows
from pearl.host_tensors import array, send_rows, upload
from pearl.messages import DeviceWindows, Drafted, DraftProposal, DrawnTokens, SequenceState
from pearl.sampling_batch import draft_temperature
from pearl.workers.queue import DeviceQueue
from pearl_kernels import Rule

_DTYPES = {
    "draft_tokens": torch.int64,
    "row_start": torch.int32,
    "positions": torch.int64,
    "draft_logprobs": torch.float32,
    "draft_rows": torch.int32,
    "draft_temperature": torch.float32,
}


class VerdictArguments:
    """Of one verifier: for its target's queue, and the queue that rows of the drafter's logits are sent from."""

    def __init__(self, rule: Rule, queue: DeviceQueue, draft_queue: DeviceQueue | None) -> None:
        self._rule, self._queue, self._draft_queue = rule, queue, draft_queue

    def numbers(
        self, requests: Sequence[JudgedRows], states: Sequence[SequenceState], proposal: DraftProposal
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

    def tensors(
        self, requests: Sequence[JudgedRows], numbers: Mapping[str, Sequence[float]], proposal: DraftProposal
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
