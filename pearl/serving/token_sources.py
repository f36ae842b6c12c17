"""How tokens came, in answers: proposed by the drafter and accepted, or the target's own; and by what verdict."""

from __future__ import annotations

from typing import Any

from pearl.attribution import Attribution, Origin
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
            "text_sources": [_piece(text, origin) for text, origin in attribution.pieces(part)],
            "token_verdicts": list(part.sources),
        }


def _piece(text: str, origin: Origin) -> dict[str, Any]:
    return {"text": text, "source": _source(origin.drafted), "verdict": origin.source}


def _source(drafted: bool) -> str:
    return "draft" if drafted else "target"
