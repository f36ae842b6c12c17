"""Log-probabilities in the two forms of OpenAI's API, and in vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pearl.messages import PromptLogprobs, TokenLogprobs
from pearl.models import Tokenizer

_LEAST = -9999.0  # JSON has no infinity


class CompletionLogprobs:
    """One text's, of /v1/completions: tokens by their texts.

    The chosen token is always among the alternatives, as OpenAI has it: so there may be one more than asked for.
    """

    def __init__(self, tokenizer: Tokenizer, most: int, prompt_ids: Sequence[int] = (), offset: int = 0) -> None:
        """``most``: alternatives, where there are more. ``prompt_ids``: what the text continues. ``offset``: where it
        begins in the answer's.
        """
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer(prompt_ids)
        self._most, self._offset = most, offset

    def of(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """Of the text's next tokens; null where nothing is known of one."""
        offsets, names, logprobs, tops = [], [], [], []
        for token, found in zip(tokens, entries, strict=True):
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed((token,)))
            names.append(self._name(token))
            logprobs.append(None if found is None else max(found.logprob, _LEAST))
            tops.append(None if found is None else self._alternatives(token, found))
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": names, "top_logprobs": tops}

    def _alternatives(self, token: int, found: TokenLogprobs) -> dict[str, float]:
        """Two tokens of one text are one entry: the likelier one's."""
        alternatives: dict[str, float] = {}
        for other, logprob in (*found.top[: self._most], (token, found.logprob)):
            alternatives.setdefault(self._name(other), max(logprob, _LEAST))
        return alternatives

    def _name(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}

    content = [
        entry(token, found.logprob) | {"top_logprobs": [entry(*other) for other in found.top]}
        for token, found in zip(tokens, entries, strict=True)
    ]
    return {"content": content}


def ranked_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], entries: PromptLogprobs, most: int
) -> list[dict[str, Any] | None]:
    """The field ``prompt_logprobs``, by token id. What is not among the likeliest that were found has no rank."""

    def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        text = tokenizer.token_bytes(token).decode(errors="replace")
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": text}

    told: list[dict[str, Any] | None] = []
    for token, found in zip(tokens, entries, strict=True):
        if found is None:
            told.append(None)
            continue
        ranks = {other: rank for rank, (other, _) in enumerate(found.top, 1)}
        own = {str(token): entry(token, found.logprob, ranks.get(token))}
        told.append(own | {str(other): entry(other, value, ranks[other]) for other, value in found.top[:most]})
    return told
