"""Drafted tokens, on the host and on the device that drafts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.messages.timing import Mark


class Ranked(NamedTuple):
    """What might stand in a drafted token's place, best first, with the scores that ``sample`` gives them."""

    drawn: float  # the drafted token's own score
    tokens: tuple[int, ...]
    scores: tuple[float, ...]


class Drafted(NamedTuple):
    """A drafted token. ``logprob`` is log q(token); ``row`` is its row of the drafter's logits, -1: point mass."""

    token: int
    logprob: float
    row: int
    ranked: Ranked | None = None  # where alternatives were asked for


Windows = dict[int, tuple[Drafted, ...]]  # by request id, or by branch id: then the first token is the branch's own


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens of R requests and their log q in one tensor, so that one transfer takes both: int64 ``[..., 2, R]``."""

    packed: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64 ``[..., R]``"""
        return self.packed[..., 0, :]

    @property
    def logprobs(self) -> Tensor:
        """fp32 ``[..., R]``: the first half of its row."""
        return self.packed[..., 1, :].view(torch.float32)[..., : self.packed.shape[-1]]


@dataclass(frozen=True)
class DeviceWindows:
    """Windows that a device is still drafting, g tokens for each of R requests, with a copy under way to the host.

    drawn: ``[g, 2, R]`` on the drafter's device: its first tokens, and their rows of the drafter's logits, after
    ``first_ready``, all after ``ready``; on the host after ``ready``.
    """

    rows: dict[int, tuple[int, ...]]  # by request id, in the order of the columns: ``Drafted.row`` of its tokens
    drawn: DrawnTokens
    on_host: DrawnTokens
    first_ready: Mark
    ready: Mark

    @property
    def steps(self) -> int:
        return self.drawn.packed.shape[0]

    @property
    def first(self) -> DrawnTokens:
        return DrawnTokens(self.drawn.packed[0])

    def read(self) -> Windows:
        """Waits for them."""
        self.ready.wait()
        tokens, logprobs = self.on_host.tokens.T.tolist(), self.on_host.logprobs.T.tolist()
        return {
            request_id: tuple(map(Drafted, tokens[column], logprobs[column], rows))
            for column, (request_id, rows) in enumerate(self.rows.items())
        }

    def outlines(self) -> Windows:
        """As ``read``, without waiting, and so without tokens and probabilities."""
        return {request_id: tuple(Drafted(0, 0.0, row) for row in rows) for request_id, rows in self.rows.items()}
