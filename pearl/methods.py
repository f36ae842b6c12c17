"""Decoding methods: what each model does for each request in a round.

All methods share the rest of a round: pending tokens are tested in order, then the first token drafted in this round
where both models work, and a verdict is applied the same way (``Request.apply``). They differ only in who works:

                       pending empty                     k tokens pending
    pearl              draft a window | verify its 1st   draft a window | verify k + 1
    - pre_verify       draft a window | -                draft a window | verify k + 1
    - post_verify      draft a window | verify its 1st   -              | verify k, then a bonus token
    speculative        draft a window | -                -              | verify k, then a bonus token
    autoregressive     -              | bonus token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pearl.config import EngineConfig


class Progress(NamedTuple):
    """What a method may look at."""

    pending: int
    draft_is_dry: bool  # the drafter proposed nothing last time (an n-gram drafter without a match)


class Intent(NamedTuple):
    draft: bool
    verify: bool


class DecodingMethod(Protocol):
    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        """One intent for each request of the batch; Intent(False, False) lets a request wait for this round."""
        ...


@dataclass(frozen=True)
class Autoregressive:
    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        return [Intent(draft=False, verify=True)] * len(batch)


@dataclass(frozen=True)
class Pearl:
    """Parallel decoding (arXiv 2408.11850); each flag switches one half off and stays lossless."""

    pre_verify: bool = True
    post_verify: bool = True

    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        return [self._intent(progress) for progress in batch]

    def _intent(self, progress: Progress) -> Intent:
        if progress.pending:
            return Intent(draft=self.post_verify, verify=True)
        # A dry drafter may stay dry; the target must move on or the request would wait forever.
        return Intent(draft=True, verify=self.pre_verify or progress.draft_is_dry)


@dataclass(frozen=True)
class Speculative:
    """Vanilla speculative decoding: the models take turns, all requests in step (Leviathan et al. 2023)."""

    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        drafts = [not progress.pending and not progress.draft_is_dry for progress in batch]
        if any(drafts):
            return [Intent(draft=draft, verify=False) for draft in drafts]
        return [Intent(draft=False, verify=True)] * len(batch)


def build_method(config: EngineConfig) -> DecodingMethod:
    if config.method == "autoregressive":
        return Autoregressive()
    if config.method == "speculative":
        return Speculative()
    return Pearl(config.pre_verify, config.post_verify)
