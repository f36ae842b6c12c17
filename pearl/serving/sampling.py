"""From a request's fields to SamplingParams: what it gives, then the model's own defaults, then OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pearl.errors import ConfigurationError, InvalidRequestError
from pearl.models.model_files import find_file, read_json
from pearl.sampling_params import SamplingParams
from pearl.serving.protocol import SamplingFields
from pearl.serving.structured import structured_output

_FILE = "generation_config.json"
_FROM_FILE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_NUMBERS = (
    *_FROM_FILE, "presence_penalty", "frequency_penalty", "min_tokens", "seed", "n", "draft_temperature",
    "prompt_logprobs",
)  # fmt: skip
_OPENAI = {"temperature": 1.0}


@dataclass(frozen=True)
class SamplingDefaults:
    """``values`` of fields that a request leaves out. ``max_tokens`` is a limit on every request, as vLLM has it."""

    values: Mapping[str, Any]
    max_tokens: int | None = None

    @classmethod
    def of_openai(cls) -> SamplingDefaults:
        return cls(_OPENAI)

    @classmethod
    def of_model(cls, path: str) -> SamplingDefaults:
        """With what the generation_config.json of a folder or hub id says, if it has one. ConfigurationError."""
        file = find_file(path, _FILE)
        if file is None:
            return cls.of_openai()
        said = read_json(file)
        values = {name: said[name] for name in _FROM_FILE if said.get(name) is not None}
        limit = said.get("max_new_tokens")
        try:
            SamplingParams(**values, **({} if limit is None else {"max_tokens": limit}))
        except InvalidRequestError as error:
            raise ConfigurationError(f"{file}: {error}; or start with --generation-config none") from error
        return cls(_OPENAI | values, limit)

    def shown(self) -> dict[str, Any]:
        return dict(self.values) | ({} if self.max_tokens is None else {"max_tokens": self.max_tokens})


def sampling_params(
    fields: SamplingFields,
    defaults: SamplingDefaults,
    room: int,
    max_tokens: int | None,
    logprobs: int | None,
    names: Mapping[str, str] | None = None,
) -> SamplingParams:
    """``max_tokens``: what is asked for; None: all that there is ``room`` for. InvalidRequestError names a field.

    ``names``: what an API calls these parameters, where it has another name.
    """
    if fields.stream and fields.prompt_logprobs is not None:
        sentence = "prompt_logprobs are not streamed; leave one out, or use echo with logprobs in /v1/completions"
        raise InvalidRequestError(sentence, "prompt_logprobs")
    values = dict(defaults.values)
    for name in _NUMBERS:
        if (given := getattr(fields, name)) is not None:
            values[name] = given
    if values.get("top_k") == -1:  # as vLLM writes "off"
        values["top_k"] = 0
    limits = [limit for limit in (max_tokens, defaults.max_tokens) if limit is not None]
    try:
        return SamplingParams(
            **values,
            max_tokens=min(limits, default=room),
            stop=fields.stop,
            stop_token_ids=fields.stop_token_ids,
            ignore_eos=bool(fields.ignore_eos),
            logit_bias=_biases(fields.logit_bias),
            logprobs=logprobs,
            structured=structured_output(fields),
            draft=fields.draft is not False,
            token_sources=bool(fields.return_token_sources),
        )
    except InvalidRequestError as error:
        own = error.param or ""
        called = (names or {}).get(own)
        if called is None:
            raise
        raise InvalidRequestError(str(error).replace(own, called, 1), called) from error


def _biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """JSON's names are texts."""
    if given is None:
        return None
    for name in given:
        if not name.isdecimal() or len(name) > 10:
            raise InvalidRequestError(f"logit_bias: {name[:20]!r} is no token id", "logit_bias")
    return {int(name): bias for name, bias in given.items()}
