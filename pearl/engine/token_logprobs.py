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


class _Found(NamedTuple):
    """As ``_Rows``, on the host, once the device has come so far; so much is kept until it is read."""

    spans: tuple[Span, ...]
    own: Tensor  # fp32 [n]
    values: Tensor
    ids: Tensor

    def entries(self) -> dict[int, tuple[TokenLogprobs, ...]]:
        pairs = zip(self.ids.tolist(), self.values.tolist(), strict=True)
        entries = [
            TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)))
            for logprob, (ids, values) in zip(self.own.tolist(), pairs, strict=True)
        ]
        found = {}
        for span in self.spans:
            size = span.end - span.begin
            found[span.begin], entries = tuple(entries[:size]), entries[size:]
        return found


class _Rows(NamedTuple):
    """Of all requests that ask for equally many: a row must not depend on what else is in the batch."""

    spans: tuple[Span, ...]
    rows: Tensor  # int64 [n], of the logits
    logprobs: Tensor  # fp32 [n, V]
    values: Tensor  # fp32 [n, most], on the host after the mark
    ids: Tensor  # int64 [n, most]


class TopLogprobs:
    """Everything is enqueued, and what is ``found`` on the host when the device's next mark has come."""

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

    def found(self) -> FoundLogprobs:
        return FoundLogprobs(
            [_Found(g.spans, own, g.values, g.ids) for g, own in zip(self._groups, self._own, strict=True)]
        )


class FoundLogprobs:
    """Those of a round, on the host: made into messages when the first of them is asked for, which is not urgent."""

    def __init__(self, groups: Sequence[_Found]) -> None:
        self._groups = groups
        self._entries: dict[int, tuple[TokenLogprobs, ...]] | None = None

    def of(self, begin: int, count: int) -> tuple[TokenLogprobs, ...]:
        """Of the first ``count`` rows of the span that begins at row ``begin``."""
        if self._entries is None:
            self._entries = {row: entries for group in self._groups for row, entries in group.entries().items()}
            self._groups = ()
        return self._entries[begin][:count]
