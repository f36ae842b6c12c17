"""What one request asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pearl.errors import InvalidRequestError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request.

    temperature: 0 decodes greedily.
    top_k: keep the k most likely tokens; 0 = off. top_p: keep the smallest set with that mass; 1 = off.
    min_p: keep tokens at least min_p times as likely as the likeliest; 0 = off.
    repetition_penalty: divides (multiplies) positive (negative) logits of tokens in prompt or output; 1 = off.
    presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once / per occurrence.
    logit_bias: token id -> added to its logit.
    seed: 64-bit; None draws a fresh one. Equal seeds give equal outputs whatever else is in the batch.
    stop: text(s) that end the output, not returned; a special token's text stands for the token too, which has no text
        in the output. stop_token_ids: ids that end it, returned as its last token.
    ignore_eos: do not stop at the model's end-of-text. min_tokens: that many tokens end nothing, what ends the output
        comes after them (unless max_tokens does), as vLLM and transformers count.
    max_tokens: most tokens returned. logprobs: report that many alternatives of each token; None = off.
    n: outputs for the prompt; output i uses seed + i.
    draft_temperature: the draft's own temperature; None = the same. It changes speed, never the output's distribution.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int = 128
    min_tokens: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    draft_temperature: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("draft_temperature", self.draft_temperature)):
            if value is not None and not 0 <= value < float("inf"):
                raise InvalidRequestError(f"{name} must be a finite number >= 0, not {value}; 0 decodes greedily")
        self._require("top_k", self.top_k >= 0, "0 (off) or the number of tokens to keep")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 turns it off")
        self._require("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 turns it off")
        self._require("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "> 0; 1 turns it off")
        self._require("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]; 0 turns it off")
        self._require("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]; 0 turns it off")
        self._require("max_tokens", self.max_tokens >= 1, "at least 1")
        self._require("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        self._require("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        self._require("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "None or between 0 and 20")
        self._require("n", self.n >= 1, "at least 1")
        self._require("stop", "" not in self.stop_strings, "without empty strings, which every text contains")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:  # also reached by NaN, which fails every comparison
            raise InvalidRequestError(f"{name} must be {expected}; got {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from untrusted keys; an unknown one is an error that names the known ones."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InvalidRequestError(f"unknown sampling parameters {unknown}; known are {sorted(known)}")
        return cls(**values)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def changes_logits(self) -> bool:
        """Whether logits depend on more than temperature and cutoffs (see ``pearl.engine.logits_processing``)."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )
