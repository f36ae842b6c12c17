"""Log-probabilities that requests ask for, computed where the target is, while the verdict is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.host_tensors import from_numbers, start_download
from pearl.messages import TokenLogprobs


class Span(NamedTuple):
    """The rows [begin, end) of logits of one request, which asks for the ``most`` likely tokens of each."""

    begin: int
    end: int
    most: int


class _Rows(NamedTuple):
    """Of all requests that ask for equally many: a row must not depend on what else is in the batch."""

    spans: tuple[Span, ...]
    rows: Tensor  # int64 [n], of the logits
    logprobs: Tensor  # fp32 [n, V]
    values: Tensor  # fp32 [n, most], on the host after the mark
    ids: Tensor  # int64 [n, most]


class TopLogprobs:
    """Everything is enqueued; ``read`` what the device's next mark has come after."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor, spans: Sequence[Span], vocab_size: int) -> None:
        """``logits``: raw rows ``[N, >= vocab_size]``, which may be changed in place afterwards."""
        groups = {most: tuple(s for s in spans if s.most == most) for most in sorted({s.most for s in spans})}
        self._groups: list[_Rows] = []
        self._own: list[Tensor] = []  # fp32 [n] of each group, on the host after the mark
        for most, members in groups.items():
            rows = from_numbers([row for s in members for row in range(s.begin, s.end)], torch.int64, logits.device)
            logprobs = logits[rows, :vocab_size].float().log_softmax(-1)
            values, ids = start_download(logprobs.topk(most, dim=-1))
            self._groups.append(_Rows(members, rows, logprobs, values, ids))

    @torch.inference_mode()
    def choose(self, tokens: Tensor) -> None:
        """``tokens``: int64 ``[N]``, the one that is committed on each row of logits; others are not looked at."""
        for group in self._groups:
            chosen = tokens[group.rows].clamp(min=0)[:, None]
            self._own += start_download([group.logprobs.gather(1, chosen)[:, 0]])

    def read(self) -> dict[int, list[TokenLogprobs]]:
        """One entry for each row of a span, by the span's first row."""
        found: dict[int, list[TokenLogprobs]] = {}
        for group, own in zip(self._groups, self._own, strict=True):
            pairs = zip(group.ids.tolist(), group.values.tolist(), strict=True)
            entries = [
                TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)))
                for logprob, (ids, values) in zip(own.tolist(), pairs, strict=True)
            ]
            for span in group.spans:
                size = span.end - span.begin
                found[span.begin], entries = entries[:size], entries[size:]
        return found
