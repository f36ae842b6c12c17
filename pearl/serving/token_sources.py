"""How tokens came, in answers: proposed by the drafter and accepted, or the target's own."""

from __future__ import annotations

from typing import Any

from pearl.attribution import Attribution
from pearl.models import Tokenizer
from pearl.outputs import CompletionOutput, StreamChunk
from pearl.serving.generation import Generation


class TokenSources:
    """Of all outputs of an HTTP request."""

    def __init__(self, tokenizer: Tokenizer, generation: Generation) -> None:
        self._tokenizer, self._generation = tokenizer, generation
        self._attributions: dict[int, Attribution] = {}  # by output

    def of(self, part: CompletionOutput | StreamChunk) -> dict[str, Any]:
        """Members of a choice: a source for each token; and the generated text, cut where its tokens end."""
        attribution = self._attributions.get(part.index)
        if attribution is None:
            generation = self._generation
            attribution = Attribution(self._tokenizer.detokenizer(generation.prompt_of(part.index), generation.shown))
            self._attributions[part.index] = attribution
        return {
            "token_sources": [_source(drafted) for drafted in part.drafted],
            "text_sources": [{"text": text, "source": _source(drafted)} for text, drafted in attribution.pieces(part)],
        }


def _source(drafted: bool) -> str:
    return "draft" if drafted else "target"
