"""Drafters over KV of their own, and plans for them: prompts, windows, branches."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from pearl.drafting import ModelDrafter
from pearl.drafting.logits_ring import LogitsRing
from pearl.kv import PageCopy
from pearl.messages import Branch, DraftPlan, DraftProposal, DraftWork, ForwardWork, SequenceState
from pearl.models import Decoder, KVCache
from pearl.sampling_params import SamplingParams
from pearl.workers import GraphRunner, HostQueue, ModelRunner
from pearl_kernels import Rule

PAGE, PAGES, LANES, WINDOW, SLOTS = 4, 24, 4, 8, 5
VOCABULARY = 131 - 3  # what models have beyond is padding
CPU = torch.device("cpu")
TABLES = ((5, 2, 9, 0, 21), (1, 14, 20, 4, 6), (7, 3, 12, 16, 17), (8, 10, 11, 13, 15))
GREEDY, HOT = SamplingParams(), SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01)
HOT_DRAFT = SamplingParams(draft_temperature=0.8)  # of a greedy request: its verdict looks at no q
MIXED = (GREEDY, HOT, SamplingParams(temperature=1.3, draft_temperature=0.0), SamplingParams(temperature=0.5))


def item(
    sequence: int, start: int, count: int, num_draft: int, params: SamplingParams = GREEDY, table: int = 5
) -> DraftWork:
    """``count`` tokens from ``start`` on, then ``num_draft`` drafted ones; ``table``: pages of the block table."""
    tokens = tuple((31 * sequence + 7 * p) % VOCABULARY for p in range(start, start + count))
    history = tuple((31 * sequence + 7 * p) % VOCABULARY for p in range(start + count))
    state = SequenceState(sequence, sequence, params, 1000 + sequence, 1, history)
    return DraftWork(ForwardWork(state, tokens, start, min(1, num_draft), TABLES[sequence][:table]), num_draft)


# Rounds one after another, on the same KV: what a later one computes again was rejected.
ROUNDS = [
    (item(0, 0, 9, 0),),  # a chunk of a prompt
    (item(0, 9, 1, 5, MIXED[0]), item(1, 0, 7, 0), item(2, 0, 1, 3, MIXED[2])),
    (item(1, 7, 2, 8, MIXED[1], table=4), item(2, 2, 2, 1, MIXED[2]), item(3, 0, 6, 4, MIXED[3])),
    (item(3, 8, 1, 2, MIXED[3]), item(0, 12, 1, 8, MIXED[0]), item(1, 9, 1, 5, MIXED[1]), item(2, 4, 1, 1, MIXED[2])),
    (item(2, 5, 12, 4, MIXED[2]),),  # up to the last page's last slot
]


class Drafting:
    """A drafter over KV of its own, unused memory poisoned."""

    def __init__(
        self,
        decoder: Decoder,
        rule: Rule,
        fused: bool,
        threads: int = 1,
        lanes: int = LANES,
        slots: int = SLOTS,
        captured: bool = False,
    ) -> None:
        dtype = decoder.dtype
        self.cache = KVCache.allocate(decoder.config, PAGES, PAGE, dtype, CPU)
        for tensor in chain.from_iterable(self.cache.layers):
            tensor.fill_(torch.nan)
        self.ring = LogitsRing(lanes, WINDOW, slots)
        self.ring.allocate(decoder.config.vocab_size, dtype).fill_(torch.nan)
        if captured:  # as on a GPU, but at once
            runner: ModelRunner = GraphRunner(decoder, self.cache, PAGE, HostQueue(CPU), most_rows=LANES)
        else:
            runner = ModelRunner(decoder, self.cache, PAGE, HostQueue(CPU), threads)
        self.drafter = ModelDrafter(runner, rule, VOCABULARY, (), self.ring)
        assert (self.drafter._fused is None) == captured
        if not fused:
            self.drafter._fused = None

    def propose(self, work: tuple[DraftWork, ...], **plan: Any) -> DraftProposal:
        with torch.inference_mode():
            proposal = self.drafter.propose(DraftPlan(work, **plan))
            if (late := proposal.on_device) is None:
                return proposal
            windows, prepared = late.read()
            return replace(
                proposal, windows=proposal.windows | windows, prepared=proposal.prepared | prepared, on_device=None
            )

    def memory(self) -> list[torch.Tensor]:
        assert self.ring.logits is not None
        return [*chain.from_iterable(self.cache.layers), self.ring.logits]


def assert_same(expected: DraftProposal, found: DraftProposal) -> None:
    assert found.windows == expected.windows
    assert found.prepared == expected.prepared
    assert found.steps == expected.steps


def assert_same_memory(one: Drafting, other: Drafting) -> None:
    for expected, found in zip(one.memory(), other.memory(), strict=True):
        width = torch.int32 if expected.dtype == torch.float32 else torch.int16
        assert torch.equal(found.view(width), expected.view(width))


def branching(params: SamplingParams) -> tuple[DraftWork, ...]:
    """After texts of 8 and 9 tokens: branches at positions in the middle of a page, at its begin, and late."""
    early = Branch(0, 1, 0, 17, 6, 5, (5, 18, 19)), Branch(2, 0, 0, 90, 4, 3, (5, 22), 77)
    late = Branch(1, 3, 1, None, 9, 4, (5, 2, 23, 8)), Branch(4, 3, 0, None, 9, 2, (5, 2, 10))
    other = Branch(3, 1, 2, None, 10, 5, (1, 14, 11, 13), 78)
    return (
        item(0, 8, 1, 5, params)._replace(branches=(late[0], *early, late[1])),
        item(2, 0, 3, 0),
        item(1, 9, 1, 6, params)._replace(branches=(other,)),
    )


COPIES = (PageCopy(2, 18),)
LATE_COPIES = PageCopy(9, 23), PageCopy(9, 10), PageCopy(20, 11)
