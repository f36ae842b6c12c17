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


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
