"""A target and a drafter that answer at once: what is left of a round is the host's.

Both write the same text, a function of seed and position, but for positions at which the drafter errs. Their batches
are packed as for the CPU's kernels; only what they answer comes from tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.round_cost.stopwatch import MODELS, Stopwatch
from pearl.messages import Drafted, DraftPlan, DraftProposal, DraftWork, ForwardWork, TargetOutput, TargetPlan
from pearl_kernels.cpu import _core

_WORDS = 64  # ids that the models write
_FIRST_WORD = 256
_CERTAINTY = 30.0  # of a logit over all others: a sampled token is the greedy one
_PERIOD = 8192  # tokens until the text, and the drafter's luck with it, repeats
_LONGEST = 256  # tokens that are asked for at once


class Text:
    """Which words follow, and where the drafter errs: with probability ``1 - acceptance``, independently.

    A word is a number below 64, its token 256 more. Every request's text begins somewhere else in the same one.
    """

    def __init__(self, vocab_size: int, dtype: torch.dtype, acceptance: float) -> None:
        held = (torch.rand(_PERIOD, generator=torch.Generator().manual_seed(0)) < acceptance).tolist()
        words = [7 * i % _WORDS for i in range(_PERIOD)]
        drafted = [word if good else (word + 1) % _WORDS for word, good in zip(words, held, strict=True)]
        self._words, self._drafted = ([*text, *text[:_LONGEST]] for text in (words, drafted))
        self.logits = torch.zeros(_WORDS, vocab_size, dtype=dtype)  # by word
        self.logits[torch.arange(_WORDS), _FIRST_WORD + torch.arange(_WORDS)] = _CERTAINTY

    def words(self, seed: int, start: int, count: int) -> list[int]:
        """Of positions [start, start + count)."""
        at = (start + 1031 * seed) % _PERIOD
        return self._words[at : at + count]

    def drafted(self, seed: int, start: int, count: int) -> list[int]:
        at = (start + 1031 * seed) % _PERIOD
        return self._drafted[at : at + count]


class InstantTarget:
    """In the place of ``TargetRunner``."""

    def __init__(self, text: Text, page_size: int, watch: Stopwatch) -> None:
        self._text, self._batch, self._watch = text, _core.WorkBatch(page_size), watch

    def run(self, plan: TargetPlan) -> TargetOutput:
        if not plan.work:
            return TargetOutput(None)
        with self._watch.part("pack"):
            self._batch.set(plan.work)
        with self._watch.part(MODELS):
            return TargetOutput(self._logits(plan.work))

    def check(self) -> None:
        pass

    def _logits(self, work: Sequence[ForwardWork]) -> Tensor:
        words: list[int] = []
        for item in work:
            words += self._text.words(item.state.seed, item.end + 1 - item.num_logits, item.num_logits)
        return self._text.logits[torch.tensor(words)]


class InstantDrafter:
    """In the place of ``ModelDrafter``, on its thread."""

    reads_history = False
    prepares = False
    hidden_layers: tuple[int, ...] = ()
    most_behind = 2

    def __init__(self, text: Text, page_size: int, keeps_logits: bool) -> None:
        self._text, self._batch, self._keeps_logits = text, _core.WorkBatch(page_size), keeps_logits

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def propose(self, plan: DraftPlan) -> DraftProposal:
        self._batch.set([item.forward for item in plan.work])
        windows = {item.forward.state.request_id: self._window(item) for item in plan.work if item.num_draft}
        return DraftProposal(windows, self._text.logits if self._keeps_logits else None, 1)

    def _window(self, item: DraftWork) -> tuple[Drafted, ...]:
        words = self._text.drafted(item.forward.state.seed, item.forward.end, item.num_draft)
        rows = words if self._keeps_logits else [-1] * len(words)
        return tuple(map(Drafted, [_FIRST_WORD + word for word in words], [0.0] * len(words), rows))
