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

from collections.abc import Callable, Sequence
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
    """Parallel decoding (arXiv 2408.11850); each flag switches one half off and stays lossless.

    ``pays``: whether pre-verify does, for a batch of that size; without it, always.
    """

    pre_verify: bool = True
    post_verify: bool = True
    pays: Callable[[int], bool] | None = None

    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        pre_verify = self.pre_verify and (self.pays is None or self.pays(len(batch)))
        return [self._intent(progress, pre_verify) for progress in batch]

    def _intent(self, progress: Progress, pre_verify: bool) -> Intent:
        if progress.pending:
            return Intent(draft=self.post_verify, verify=True)
        # A dry drafter may stay dry; the target must move on or the request would wait forever.
        return Intent(draft=True, verify=pre_verify or progress.draft_is_dry)


@dataclass(frozen=True)
class Speculative:
    """Vanilla speculative decoding: the models take turns, all requests in step (Leviathan et al. 2023)."""

    def intents(self, batch: Sequence[Progress]) -> list[Intent]:
        drafts = [not progress.pending and not progress.draft_is_dry for progress in batch]
        if any(drafts):
            return [Intent(draft=draft, verify=False) for draft in drafts]
        return [Intent(draft=False, verify=True)] * len(batch)


def build_method(config: EngineConfig, pre_verify_pays: Callable[[int], bool] | None = None) -> DecodingMethod:
    if config.method == "autoregressive":
        return Autoregressive()
    if config.method == "speculative":
        return Speculative()
    return Pearl(config.pre_verify, config.post_verify, pre_verify_pays)
