"""What a drafter learns at each place of a text, from the target's likeliest tokens there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.drafter_training.data import Text
from bench.drafter_training.precision import fast_dtype
from bench.drafter_training.states import StateFile


def require_plain_ends(target: PreTrainedModel) -> None:
    """typer.BadParameter if it scales or caps embeddings or logits, as Gemma and Granite do: what drafters learn from
    are rows of its matrices, and products with them.
    """
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(embedding, nn.Embedding)
    ids = torch.arange(8, device=target.device)
    with torch.inference_mode():
        given = target(ids[None], output_hidden_states=True, use_cache=False)
        logits = nn.functional.linear(given.hidden_states[-1], head.weight)
        for found, plain in ((given.hidden_states[0], nn.Embedding.forward(embedding, ids)), (given.logits, logits)):
            if (found - plain).abs().max() > 0.05 * plain.abs().max():
                raise typer.BadParameter(
                    f"a {type(target).__name__} scales or caps embeddings or logits, which no drafter learns here"
                )


class Step(NamedTuple):
    """Of each place ``[n]``: the loss; how far what the last matrix reads is from what the target's reads, 0 where that
    is not looked at; whether the likeliest token is the target's; the probability that both give alike, of the target's
    likeliest tokens.
    """

    losses: Tensor
    apart: Tensor
    same: Tensor
    shared: Tensor


class DraftVocabulary:
    """``kept``: the target's ids that are drafted, rising."""

    def __init__(self, kept: Tensor, vocab_size: int) -> None:
        self.kept = kept
        self._own = torch.full((vocab_size,), -1, device=kept.device).index_copy_(
            0, kept, torch.arange(len(kept), device=kept.device)
        )

    def step(self, logits: Tensor, tokens: Tensor, p: Tensor, apart: Tensor | None = None) -> Step:
        """logits ``[n, Vd]``; the target's likeliest ``tokens`` ``[n, K]``, the likeliest first, of probabilities p."""
        own, logits = self._own[tokens], logits.float()
        p = p * (own >= 0)
        log_q = logits.gather(-1, own.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)
        # What it cannot draft it cannot learn; where the target would say that, nothing is learnt.
        losses = -(p * log_q).sum(-1) / p.sum(-1).clamp(min=1e-6) * (own[:, 0] >= 0)
        likeliest = self.kept[logits.argmax(-1)] == tokens[:, 0]
        shared = torch.minimum(p, log_q.exp()).sum(-1)
        return Step(losses, torch.zeros_like(losses) if apart is None else apart, likeliest, shared)


class Learner(ABC):
    """A drafter with what its target says of each text. ``most_steps``: tokens of a window that it is rolled out to."""

    most_steps: ClassVar[int]

    def __init__(self, module: nn.Module, kept: Tensor, embeddings: Tensor, states: StateFile, device: str) -> None:
        """``kept`` as in ``DraftVocabulary``; ``embeddings`` ``[V, D]``: the target's."""
        self.module, self._device, self._states = module.to(device), device, states
        self._embeddings = embeddings.detach().float().to(device)
        self._vocabulary = DraftVocabulary(kept.to(device), len(embeddings))
        self._dtype = fast_dtype(device)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What it is and was begun with; a checkpoint of another one is refused."""
        return {**self._shape(), "kept": self._vocabulary.kept.cpu().tolist()}

    @abstractmethod
    def _shape(self) -> dict[str, Any]: ...

    @abstractmethod
    def steps(self, text: Text, count: int) -> Sequence[Step]:
        """Of each of the first ``count`` tokens of a window, at the places of the text's answer."""

    def _fast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._dtype == torch.bfloat16)
