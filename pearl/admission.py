"""What a request must be before it is queued, so that whatever one brings fails that one alone, before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pearl.errors import InvalidRequestError
from pearl.grammars import Grammar
from pearl.grammars.compiler import GrammarCompiler
from pearl.models import Tokenizer
from pearl.prompts import AnyPrompts, read_prompt
from pearl.sampling_params import SamplingParams
from pearl.structured_output import StructuredOutput
from pearl.user_values import as_items, shown

AnyParams = SamplingParams | Iterable[SamplingParams] | None


class Admission:
    """Checks prompts and parameters against the models' limits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_model_len: int) -> None:
        self._tokenizer, self._vocab_size, self._max_model_len = tokenizer, vocab_size, max_model_len
        self._grammars = GrammarCompiler(tokenizer, vocab_size)

    def encode(self, prompt: AnyPrompts) -> list[int]:
        """Token ids of one prompt in any form. InvalidRequestError: empty, unknown ids, too long for the context."""
        read = read_prompt(prompt)
        ids = self._tokenizer.encode(read.text or "") if read.token_ids is None else list(read.token_ids)
        if not ids:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            position, token = next(item for item in enumerate(ids) if not 0 <= item[1] < self._vocab_size)
            raise InvalidRequestError(f"the prompt has token {self._outside(token)}, at position {position}")
        if len(ids) >= self._max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens, the context holds {self._max_model_len} with at least one token of "
                "output; shorten the prompt or raise max_model_len"
            )
        return ids

    def encode_all(self, prompts: Sequence[AnyPrompts]) -> list[list[int]]:
        """``encode`` of each; where there are several, the error says which."""
        encoded = []
        for index, prompt in enumerate(prompts):
            try:
                encoded.append(self.encode(prompt))
            except InvalidRequestError as error:
                if len(prompts) == 1:
                    raise
                raise InvalidRequestError(f"prompts[{index}]: {error}") from error
        return encoded

    def check(self, params: SamplingParams) -> None:
        """InvalidRequestError: ids outside the vocabulary, nothing left to choose, more alternatives than tokens."""
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids or ())):
            for token in ids:
                if not 0 <= token < self._vocab_size:
                    raise InvalidRequestError(f"{name} names token {self._outside(token)}", name)
        if len(self._banned(params)) >= self._vocab_size:
            sentence = "logit_bias and min_tokens together ban every token; leave at least one"
            raise InvalidRequestError(sentence, "logit_bias")
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if (count or 0) > self._vocab_size:
                raise InvalidRequestError(f"{name}={count}, but the vocabulary has {self._vocab_size} tokens", name)

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """Of the form that outputs must have, compiled. InvalidRequestError: it cannot be, or they could not end."""
        structured = params.structured
        if structured is None:
            return None
        assert isinstance(structured, StructuredOutput)
        if not any(0 <= token < self._vocab_size for token in params.ending_ids(self._tokenizer.eos_ids)):
            sentence = "structured output ends with a token that ends it: give stop_token_ids, or leave ignore_eos out"
            raise InvalidRequestError(sentence, "structured")
        return self._grammars.compile(structured)

    def _outside(self, token: int) -> str:
        return self._tokenizer.vocabulary.outside(token, self._vocab_size)

    def _banned(self, params: SamplingParams) -> set[int]:
        """What may not be chosen, at least for some time."""
        banned = {token for token, bias in (params.logit_bias or {}).items() if bias == -float("inf")}
        if params.min_tokens:
            banned.update(params.ending_ids(self._tokenizer.eos_ids))
        return {token for token in banned if 0 <= token < self._vocab_size}


def params_for(count: int, params: AnyParams) -> list[SamplingParams]:
    """One for each of ``count`` prompts. Raises InvalidRequestError for anything but SamplingParams."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    every = as_items(params)
    if every is None:
        raise InvalidRequestError(
            f"params must be SamplingParams, or one for each prompt, not {shown(params)}; "
            "SamplingParams.from_mapping makes them from a dict"
        )
    for index, one in enumerate(every):
        if not isinstance(one, SamplingParams):
            raise InvalidRequestError(f"params[{index}] must be SamplingParams, not {shown(one)}")
    if len(every) != count:
        prompts = f"{count} prompt{'s' * (count != 1)}"
        raise InvalidRequestError(f"{prompts} but {len(every)} SamplingParams; give one, or one for each")
    return every
