"""Sequences on pages of a model that is not yet in an engine, and what transformers' own class says of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pearl.messages import ForwardWork, SequenceState
from pearl.models import CausalModel, HiddenStates, KVCache
from pearl.sampling_params import SamplingParams
from pearl.workers.model_runner import build_batch

PAGE = 4
# Both sides round differently (merged projections, another order of sums): relative to the logits' scale.
TOLERANCE = 2e-5


class Harness:
    """Sequences on shuffled pages; everything that no sequence holds is NaN."""

    def __init__(self, model: CausalModel, lengths: list[int]) -> None:
        self.model = model
        pages = [-(-length // PAGE) for length in lengths]
        total = sum(pages) + 3
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(7)).tolist()
        self.tables = [tuple(shuffled.pop() for _ in range(count)) for count in pages]
        self.cache = KVCache.allocate(model.config, total, PAGE, torch.float32, torch.device("cpu"))
        for keys, values in self.cache.layers:
            keys.fill_(torch.nan)
            values.fill_(torch.nan)

    def forward(
        self,
        items: list[tuple[int, list[int], int]],
        num_logits: int | None = None,
        hidden: HiddenStates | None = None,
    ) -> list[Tensor]:
        """items: (sequence, tokens, start). Returns each item's logits, of all its tokens unless told otherwise."""
        work = []
        for sequence, tokens, start in items:
            state = SequenceState(sequence, sequence, SamplingParams(), 0, 0, None)
            wanted = len(tokens) if num_logits is None else min(num_logits, len(tokens))
            work.append(ForwardWork(state, tuple(tokens), start, wanted, self.tables[sequence]))
        with torch.inference_mode():
            logits = self.model.forward(build_batch(work, PAGE, torch.device("cpu")), self.cache, hidden)
        return list(logits.split([item.num_logits for item in work]))


def expected(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    assert actual.isfinite().all()
    assert (actual - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def check_prefill_of_ragged_sequences(judge: PreTrainedModel, model: CausalModel) -> None:
    texts = [tokens_of(i, length) for i, length in enumerate((1, 37, 8))]
    harness = Harness(model, [len(text) for text in texts])
    for logits, text in zip(harness.forward([(i, t, 0) for i, t in enumerate(texts)]), texts, strict=True):
        assert_close(logits, expected(judge, text))


def check_chunks_decoding_and_a_rolled_back_window(judge: PreTrainedModel, model: CausalModel) -> None:
    text, other = tokens_of(11, 41), tokens_of(12, 23)
    harness = Harness(model, [len(text), len(other)])
    wanted, wanted_other = expected(judge, text), expected(judge, other)

    assert harness.forward([(0, text[:13], 0)], num_logits=0)[0].shape == (0, model.config.vocab_size)
    first, second = harness.forward([(0, text[13:30], 13), (1, other[:9], 0)])  # a chunk beside a prompt
    assert_close(first, wanted[13:30])
    assert_close(second, wanted_other[:9])

    wrong = [(token + 1) % 131 for token in text[31:36]]
    harness.forward([(0, [text[30], *wrong], 30), (1, [other[9]], 9)])  # a window that will be rejected
    window, single = harness.forward([(0, text[31:38], 31), (1, [other[10]], 10)])  # truncated, then rewritten
    assert_close(window, wanted[31:38])
    assert_close(single, wanted_other[10:11])
    for position in range(38, 41):
        assert_close(harness.forward([(0, [text[position]], position)], 1)[0], wanted[position : position + 1])


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
