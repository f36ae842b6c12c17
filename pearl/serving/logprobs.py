"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pearl.messages import TokenLogprobs
from pearl.models import Tokenizer

_LEAST = -9999.0  # JSON has no infinity


class CompletionLogprobs:
    """One output's, of /v1/completions: tokens by their texts. ``text_offset`` counts from the output's beginning.

    The chosen token is always among the alternatives, as OpenAI has it: so there may be one more than asked for.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._detokenizer, self._offset = tokenizer, tokenizer.detokenizer(prompt_ids), 0

    def of(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of the output's next tokens."""
        offsets, names, logprobs, tops = [], [], [], []
        for token, found in zip(tokens, entries, strict=True):
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed((token,)))
            names.append(self._name(token))
            logprobs.append(max(found.logprob, _LEAST))
            tops.append(self._alternatives(token, found))
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": names, "top_logprobs": tops}

    def _alternatives(self, token: int, found: TokenLogprobs) -> dict[str, float]:
        """Two tokens of one text are one entry: the likelier one's."""
        alternatives: dict[str, float] = {}
        for other, logprob in (*found.top, (token, found.logprob)):
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
