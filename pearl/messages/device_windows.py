"""Windows of tokens that a device still drafts, and their branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.messages.drafted import Drafted, Ranked, Windows
from pearl.messages.plan import Branch
from pearl.messages.timing import Mark


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens of R sequences and their log q in one tensor, so that one transfer takes both: int64 ``[..., 2 + m, R]``.
    Where m alternatives to each are ranked, these are in it too, and the drawn tokens' own scores.
    """

    packed: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64 ``[..., R]``"""
        return self.packed[..., 0, :]

    @property
    def logprobs(self) -> Tensor:
        """fp32 ``[..., R]``: the first half of its row."""
        return self.packed[..., 1, :].view(torch.float32)[..., : self.packed.shape[-1]]

    @property
    def own_scores(self) -> Tensor:
        """fp32 ``[..., R]``: the second half."""
        return self.packed[..., 1, :].view(torch.float32)[..., self.packed.shape[-1] :]

    @property
    def alternatives(self) -> Tensor:
        """int32 ``[..., m, R]``: the first halves of the other rows."""
        return self.packed[..., 2:, :].view(torch.int32)[..., : self.packed.shape[-1]]

    @property
    def scores(self) -> Tensor:
        """fp32 ``[..., m, R]``, of ``alternatives``: the second halves."""
        return self.packed[..., 2:, :].view(torch.float32)[..., self.packed.shape[-1] :]


class DeviceBranch(NamedTuple):
    """A branch of a captured window. ``parent``: the column of its request; ``rows``: ``Drafted.row`` of what is
    drafted after its own token.
    """

    branch: Branch
    parent: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class DeviceWindows:
    """Windows that a device is still drafting, g tokens for each of R requests, with a copy under way to the host.

    drawn: ``[g, 2 + m, R]`` on the drafter's device: its first tokens, and their rows of the drafter's logits, after
    ``first_ready``, all after ``ready``; on the host after ``ready``.
    """

    rows: dict[int, tuple[int, ...]]  # by request id, in the order of the columns: ``Drafted.row`` of its tokens
    drawn: DrawnTokens
    on_host: DrawnTokens
    first_ready: Mark
    ready: Mark
    branches: tuple[DeviceBranch, ...] = ()  # of the columns behind these
    alternatives: int = 0  # that were asked for; m may be larger

    @property
    def steps(self) -> int:
        return self.drawn.packed.shape[0]

    @property
    def first(self) -> DrawnTokens:
        """Of each column, without alternatives."""
        return DrawnTokens(self.drawn.packed[0, :2])

    def read(self) -> tuple[Windows, Windows]:
        """Those of requests, and those of branches. Waits for them."""
        self.ready.wait()
        tokens, logprobs = self.on_host.tokens.T.tolist(), self.on_host.logprobs.T.tolist()
        ranked = self._ranked(len(self.rows) + len(self.branches))
        windows, prepared = {}, {}
        for column, (request_id, rows) in enumerate(self.rows.items()):
            windows[request_id] = tuple(map(Drafted, tokens[column], logprobs[column], rows, ranked[column]))
        for column, (branch, parent, rows) in enumerate(self.branches, len(self.rows)):
            own, skipped, first = branch.token, 0, ranked[parent][0]
            if own is None and first is not None:  # it is not drawn, but stands where a first token would
                own, skipped = first.of_rank(branch.rank), 1
            drawn = (values[skipped:] for values in (tokens[column], logprobs[column]))
            after = map(Drafted, *drawn, rows, ranked[column][skipped:])
            prepared[branch.id] = () if own is None else (Drafted(own, 0.0, -1), *after)
        return windows, prepared

    def _ranked(self, columns: int) -> Sequence[Sequence[Ranked | None]]:
        """Of each column and step; None where no alternatives were asked for."""
        if not self.alternatives:
            return [[None] * self.steps] * columns
        own = self.on_host.own_scores.T.tolist()
        tokens, scores = (
            values[:, : self.alternatives].permute(2, 0, 1).tolist()
            for values in (self.on_host.alternatives, self.on_host.scores)
        )
        return [list(map(Ranked.of, own[column], tokens[column], scores[column])) for column in range(columns)]

    def outlines(self) -> Windows:
        """Those of requests, without waiting, and so without tokens and probabilities."""
        return {request_id: tuple(Drafted(0, 0.0, row) for row in rows) for request_id, rows in self.rows.items()}
