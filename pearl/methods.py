"""Modes of decoding: what each model does for each request in a round.

All modes share the rest of a round: pending tokens are tested in order, then the first token drafted in this round
where both models work, and a verdict is applied the same way (``Request.apply``). They differ only in who works:

                       pending empty                     k tokens pending
    pearl              draft a window | verify its 1st   draft a window | verify k + 1
    whole-windows      draft a window | -                draft a window | verify k + 1
    pre-verify-only    draft a window | verify its 1st   -              | verify k, then a bonus token
    speculative        draft a window | -                -              | verify k, then a bonus token
    two-halves         as speculative, one half of the batch drafting while the other is verified
    autoregressive     -              | bonus token

They may change from round to round. A request that is *pinned* decides every token in one way, by a draft and a test:
it gets no bonus token, and where only the target would work it drafts one token beside it (``Intent.pinned``). So what
it says does not depend on when modes and windows changed.

A request that is *plain* is never drafted for, in any mode (``plain_intent``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Mode = Literal["pearl", "whole-windows", "pre-verify-only", "speculative", "two-halves", "autoregressive"]


class Progress(NamedTuple):
    """What a mode may look at."""

    pending: int
    draft_is_dry: bool  # the drafter proposed nothing last time (an n-gram drafter without a match)


class Intent(NamedTuple):
    draft: bool
    verify: bool
    bonus: bool = True  # whether a row behind the pending tokens is judged: for a drafted token, or one of the target's

    def pinned(self, progress: Progress) -> Intent:
        """The same for a request whose tokens must all be drafted. Where its drafter is dry, there is no other way."""
        if self.draft or not self.verify or progress.draft_is_dry:
            return self
        return Intent(draft=False, verify=True, bonus=False) if progress.pending else BOTH


WAIT = Intent(draft=False, verify=False)


PLAIN = Intent(draft=False, verify=True)
DRAFT = Intent(draft=True, verify=False)
BOTH = Intent(draft=True, verify=True)


def plain_intent(mode: Mode, others: Sequence[Intent]) -> Intent:
    """Of requests that are not drafted for, beside ``others``, which are: the target decodes them in every round, but
    where the models take turns in the rounds that are its own.
    """
    return WAIT if mode == "speculative" and any(other.draft for other in others) else PLAIN


class DecodingMethod(Protocol):
    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        """One intent for each request of the batch; WAIT lets a request wait for this round."""
        ...


@dataclass(frozen=True)
class Autoregressive:
    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        return [PLAIN] * len(batch)


@dataclass(frozen=True)
class Pearl:
    """Parallel decoding (arXiv 2408.11850); each flag switches one half off and stays lossless."""

    pre_verify: bool = True
    post_verify: bool = True

    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        first, later = BOTH if self.pre_verify else DRAFT, BOTH if self.post_verify else PLAIN
        # A dry drafter may stay dry; the target must move on or the request would wait forever.
        return [later if pending else BOTH if dry else first for pending, dry in batch]


@dataclass(frozen=True)
class Speculative:
    """Vanilla speculative decoding: the models take turns, all requests in step (Leviathan et al. 2023)."""

    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        drafts = [_needs_window(progress) for progress in batch]
        if any(drafts):
            return [DRAFT if draft else WAIT for draft in drafts]
        return [PLAIN] * len(batch)


@dataclass(frozen=True)
class TwoHalves:
    """Half of the batch is drafted while the other half is verified, in alternation (arXiv 2603.18016)."""

    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        half = -(-len(batch) // 2)
        room = {True: half, False: half}  # in each of the two groups
        intents = []
        for progress in batch:
            drafts = _needs_window(progress)
            room[drafts] -= 1
            intents.append((DRAFT if drafts else PLAIN) if room[drafts] >= 0 else WAIT)
        return intents


def _needs_window(progress: Progress) -> bool:
    return not progress.pending and not progress.draft_is_dry


METHODS: Mapping[Mode, DecodingMethod] = {
    "pearl": Pearl(),
    "whole-windows": Pearl(pre_verify=False),
    "pre-verify-only": Pearl(post_verify=False),
    "speculative": Speculative(),
    "two-halves": TwoHalves(),
    "autoregressive": Autoregressive(),
}
