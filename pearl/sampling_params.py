"""What one request asks for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, cast

from pearl.errors import InvalidRequestError
from pearl.structured_output import StructuredOutput
from pearl.user_values import as_flag, as_integer, as_items, as_number, lone_surrogate, shown, unknown_names


class _Range(NamedTuple):
    lowest: float
    highest: float
    expected: str  # in words


# Within these no intermediate result leaves fp32, whatever the logits.
_NUMBERS = {
    "temperature": _Range(0, 1e6, "a finite number >= 0, at most 1e6; 0 decodes greedily"),
    "top_p": _Range(5e-324, 1, "in (0, 1]; 1 turns it off"),
    "min_p": _Range(0, 1, "in [0, 1]; 0 turns it off"),
    "repetition_penalty": _Range(0.01, 100, "in [0.01, 100]; 1 turns it off"),
    "presence_penalty": _Range(-2, 2, "in [-2, 2]; 0 turns it off"),
    "frequency_penalty": _Range(-2, 2, "in [-2, 2]; 0 turns it off"),
    "draft_temperature": _Range(0, 1e6, "None or a finite number >= 0, at most 1e6; 0 drafts greedily"),
}
_INTEGERS = {
    "top_k": _Range(0, float("inf"), "0 (off) or the number of tokens to keep"),
    "max_tokens": _Range(1, float("inf"), "an integer, at least 1"),
    "min_tokens": _Range(0, float("inf"), "an integer between 0 and max_tokens"),
    "seed": _Range(-(2**63), 2**64 - 1, "None or a 64-bit integer"),
    "logprobs": _Range(0, 20, "None or between 0 and 20, an integer"),
    "prompt_logprobs": _Range(0, 20, "None or between 0 and 20, an integer"),
    "n": _Range(1, 16_384, "an integer, at least 1 and at most 16384"),
}
_MAY_BE_NONE = ("draft_temperature", "seed", "logprobs", "prompt_logprobs")
_FLAGS = ("ignore_eos", "draft", "token_sources")
_SMALLEST_TEMPERATURE = 1e-5
_SMALLEST_TOP_P = 1e-7  # below 1 / vocabulary it keeps the likeliest token alone, however small
_LARGEST_TOP_K = 2**31 - 1
_MOST_STOPS = 1024
_LARGEST_BIAS = 10_000.0  # in fp16 too


class TokenBiases(dict[int, float]):
    """A logit_bias that cannot be changed once it was checked."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[TokenBiases], tuple[dict[int, float]]]:
        return TokenBiases, (dict(self),)

    def _refuse(self, *args: object, **values: object) -> NoReturn:
        raise TypeError("a request's logit_bias cannot be changed; make new SamplingParams")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request.

    Integers and numbers of numpy, and whole floats where an integer is wanted, become Python's; a bool is no number
    and a number no bool. InvalidRequestError names what cannot be used. Lists and mappings are copied.

    temperature: 0 decodes greedily, and so does anything below 1e-5.
    top_k: keep the k most likely tokens; 0 = off. top_p: keep the smallest set with that mass; 1 = off.
    min_p: keep tokens at least min_p times as likely as the likeliest; 0 = off.
    repetition_penalty: divides (multiplies) positive (negative) logits of tokens in prompt or output; 1 = off.
    presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once / per occurrence.
    logit_bias: token id -> added to its logit, at most 10000; -inf bans the token, as does anything below -10000.
    seed: 64-bit; None draws a fresh one. Equal seeds give equal outputs whatever else is in the batch.
    stop: text(s) that end the output, not returned; a special token's text stands for the token too, which has no text
        in the output. stop_token_ids: ids that end it, returned as its last token.
    ignore_eos: do not stop at the model's end-of-text. min_tokens: that many tokens end nothing, what ends the output
        comes after them (unless max_tokens does), as vLLM and transformers count.
    max_tokens: most tokens returned. logprobs: report that many alternatives of each token; None = off.
    prompt_logprobs: likewise of each token of the prompt. All of it is computed then, whatever the prefix cache holds.
    n: outputs for the prompt; output i uses seed + i.
    draft_temperature: the draft's own temperature; None = the same. It changes speed, never the output's distribution.
    structured: the form that the output must have, a StructuredOutput or a mapping of its fields. Until the output may
        end, nothing but max_tokens and stop can end it.
    draft: False decodes without drafting, one token of the target's own at a time, whatever the engine's method is.
    token_sources: report of each token how it came (``pearl.outputs.TokenSource``).
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
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    draft_temperature: float | None = None
    prompt_logprobs: int | None = None
    structured: StructuredOutput | Mapping[str, Any] | None = None
    draft: bool = True
    token_sources: bool = False

    def __post_init__(self) -> None:
        for name, bounds in _NUMBERS.items():
            self._normalise(name, as_number, bounds)
        for name, bounds in _INTEGERS.items():
            self._normalise(name, as_integer, bounds)
        self._require("min_tokens", self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        for name in _FLAGS:
            flag = as_flag(getattr(self, name))
            self._require(name, flag is not None, "True or False")
            self._set(name, flag)
        self._set("stop", self._checked_stop())
        self._set("stop_token_ids", self._checked_stop_token_ids())
        self._set("logit_bias", self._checked_logit_bias())
        self._set("structured", self._checked_structured())
        self._keep_within_fp32()

    def _normalise(self, name: str, read: Callable[[object], float | None], bounds: _Range) -> None:
        given = getattr(self, name)
        if given is None and name in _MAY_BE_NONE:
            return
        value = read(given)
        # NaN fails both comparisons.
        self._require(name, value is not None and bounds.lowest <= value <= bounds.highest, bounds.expected)
        if value is not given:
            self._set(name, value)

    def _keep_within_fp32(self) -> None:
        """What fp32 or int32 cannot hold becomes the nearest value that means the same."""
        for name in ("temperature", "draft_temperature"):
            if 0 < (getattr(self, name) or 0) < _SMALLEST_TEMPERATURE:
                self._set(name, 0.0)
        if self.top_p < _SMALLEST_TOP_P:
            self._set("top_p", _SMALLEST_TOP_P)
        if self.top_k > _LARGEST_TOP_K:
            self._set("top_k", _LARGEST_TOP_K)

    def _checked_stop(self) -> tuple[str, ...] | None:
        if self.stop is None:
            return None
        texts = [self.stop] if isinstance(self.stop, str) else as_items(self.stop)
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise _refusal("stop", "a text or several texts", self.stop if texts is None else texts)
        if "" in texts:
            raise _refusal("stop", "without empty strings, which every text contains", self.stop)
        if any(lone_surrogate(text) is not None for text in texts):
            raise _refusal("stop", "text, without half characters (lone surrogates)", texts)
        if len(texts) > _MOST_STOPS:
            raise _refusal("stop", f"at most {_MOST_STOPS} texts, each of which is looked for after every token", texts)
        return tuple(texts)

    def _checked_stop_token_ids(self) -> tuple[int, ...] | None:
        if self.stop_token_ids is None:
            return None
        given = as_items(self.stop_token_ids)
        if given is None:
            raise _refusal("stop_token_ids", "a list of token ids", self.stop_token_ids)
        ids = [as_integer(token) for token in given]
        if None in ids:
            raise _refusal("stop_token_ids", "a list of token ids, which are integers", given)
        return tuple(cast(list[int], ids))

    def _checked_logit_bias(self) -> TokenBiases | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise _refusal("logit_bias", "a mapping from token ids to numbers", self.logit_bias)
        biases: dict[int, float] = {}
        for given, amount in self.logit_bias.items():
            token, bias = as_integer(given), as_number(amount)
            if token is None or bias is None or not bias <= _LARGEST_BIAS:
                expected = "a mapping from token ids (integers) to numbers, at most 10000 each; -inf bans a token"
                raise _refusal("logit_bias", expected, {given: amount})
            biases[token] = bias if bias >= -_LARGEST_BIAS else -float("inf")
        return TokenBiases(biases)

    def _checked_structured(self) -> StructuredOutput | None:
        if self.structured is None or isinstance(self.structured, StructuredOutput):
            return self.structured
        if not isinstance(self.structured, Mapping):
            raise _refusal("structured", "a StructuredOutput, or a mapping of its fields", self.structured)
        return StructuredOutput.from_mapping(self.structured)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise _refusal(name, expected, getattr(self, name))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from untrusted keys; an unknown one is an error that names the known ones."""
        if not isinstance(values, Mapping):
            raise InvalidRequestError(f"sampling parameters are a mapping from names to values, not {shown(values)}")
        if sentence := unknown_names("sampling parameters", values, [field.name for field in fields(cls)]):
            raise InvalidRequestError(sentence)
        return cls(**values)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.stop or ())

    @cached_property
    def changes_logits(self) -> bool:
        """Whether logits depend on more than temperature and cutoffs (see ``pearl.engine.logits_processing``)."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.structured
        )

    def ending_ids(self, eos_ids: Collection[int]) -> frozenset[int]:
        """Tokens that end the output; ``eos_ids``: the model's."""
        return frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else frozenset(eos_ids))


def _refusal(name: str, expected: str, given: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}; got {shown(given)}", name)
