"""Which drafted token each row of the target's logits tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from pearl.engine.grammar_masks import MaskedRow
from pearl.messages import Drafted, DraftProposal, ForwardWork, SchedulerOutput, VerifyWork, Windows
from pearl_kernels import Rule

BONUS = Drafted(-1, 0.0, -1)


class JudgedRows(NamedTuple):
    """One request's logits rows [begin, end) and what is tested on each; a last BONUS is drawn, not tested."""

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

    def each(self) -> list[JudgedRows]:
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
        return tuple([d.token for d in self.tokens if d is not BONUS])

    def masked(self) -> list[MaskedRow]:
        """The rows, if the request has a grammar, each with the output before it."""
        state = self.forward.state
        if state.grammar is None:
            return []
        assert state.history is not None
        output = (*state.history[state.prompt_length : self.work.position], *self.tested)
        committed = self.work.position - state.prompt_length
        return [MaskedRow(self.begin + i, state, output[: committed + i]) for i in range(len(self.tokens))]


def align(plan: SchedulerOutput, windows: Windows) -> list[JudgedRows]:
    """Put beside each of the verdicts' logits rows the token that it judges."""
    forwards = {work.state.request_id: work for work in plan.target.work}
    aligned, begin = [], 0
    for work in plan.verify:
        forward, tokens = forwards[work.request_id], work.pending
        count = forward.end + 1 - work.position
        if count > len(tokens):
            window = windows.get(work.request_id)
            tokens = (*tokens, window[0] if window else BONUS)
        aligned.append(JudgedRows(work, forward, begin, tokens))
        begin += count
    return aligned


def in_blocks(requests: Sequence[JudgedRows], rule: Rule) -> list[JudgedRows]:
    """What is judged as a whole: requests, under the block rule of pinned ones each token."""
    if rule != "block" or not any(rows.work.pinned for rows in requests):
        return list(requests)
    return [block for rows in requests for block in (rows.each() if rows.work.pinned else (rows,))]


def joined(requests: Sequence[JudgedRows], accepted: list[int], next_tokens: list[int]) -> tuple[list[int], list[int]]:
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
