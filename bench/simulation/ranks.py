"""What a draft says of each token of a target's text: all that decides which drafted tokens hold, and which prepared
windows come true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pearl.llm import LLM
from pearl.messages import Drafted, ForwardWork, Ranked, SequenceState
from pearl.sampling_params import SamplingParams
from pearl_kernels.reference import MOST_ALTERNATIVES, SamplingTensors, sample


@dataclass(frozen=True)
class TracedText:
    """A greedy output, and what the draft would put in the place of each of its tokens, behind the text before it."""

    tokens: tuple[int, ...]
    drafted: tuple[Drafted, ...]

    def run(self, begin: int, end: int) -> int:
        """How many drafted tokens of [begin, end) hold, up to the first that does not."""
        return next((i - begin for i in range(begin, end) if self.drafted[i].token != self.tokens[i]), end - begin)

    @property
    def acceptance(self) -> float:
        return sum(d.token == t for d, t in zip(self.drafted, self.tokens, strict=True)) / len(self.tokens)


@torch.inference_mode()
def trace(llm: LLM, prompt: Sequence[int], output: Sequence[int]) -> TracedText:
    """In one forward of the draft model. The engine must be at rest and cache no prefixes: all pages are free."""
    runner = llm.models.draft
    assert runner is not None
    text = (*prompt, *output)
    state = SequenceState(0, 0, SamplingParams(), 0, len(prompt), None)
    pages = tuple(range(-(-len(text) // runner.page_size)))
    logits = runner.forward([ForwardWork(state, text[:-1], 0, len(text) - 1, pages)])[len(prompt) - 1 :]
    count = len(output)
    greedy = SamplingTensors(
        torch.zeros(count), torch.zeros(count, dtype=torch.int32), torch.ones(count), torch.zeros(count),
        torch.zeros(count, dtype=torch.int64),
    )  # fmt: skip
    drawn = sample(logits.cpu(), greedy, torch.arange(count), llm.models.vocab_size, alternatives=MOST_ALTERNATIVES)
    assert drawn.alternatives is not None
    tokens, scores, own = (values.tolist() for values in drawn.alternatives)
    ranked = map(Ranked.of, own, tokens, scores)
    return TracedText(
        tuple(output), tuple(Drafted(t, 0.0, -1, r) for t, r in zip(drawn.tokens.tolist(), ranked, strict=True))
    )
