"""The bodies of requests, as OpenAI's API has them and vLLM extends it. Types are checked here, ranges where
``SamplingParams`` is made, so that server, library and command line refuse the same things with the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from pearl.errors import InvalidRequestError
from pearl.user_values import unknown_names

TokenIds = list[int]
_IGNORED = ("user", "safety_identifier", "prompt_cache_key", "request_id")  # they change no answer
# What is not supported may be sent with the values that mean: without it. None, JSON's null, is one of them always.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}
_UNSUPPORTED = (
    *_WITHOUT, "allowed_token_ids", "audio", "bad_words", "documents", "guided_choice", "guided_grammar", "guided_json",
    "guided_regex", "logprob_token_ids", "metadata", "prediction", "prompt_embeds", "reasoning_effort",
    "return_tokens_as_token_ids", "truncate_prompt_tokens", "verbosity", "web_search_options",
)  # fmt: skip


class Body(BaseModel):
    """A field that is null is a field that is not there."""

    # What is unknown is kept, so that ``refuse_unknown`` can say what is wrong with it; to clients it is forbidden.
    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    model: str | None = None

    def refuse_unknown(self) -> None:
        """InvalidRequestError names the first field that this server does not know, or does not support."""
        for name, value in (self.model_extra or {}).items():
            if (value is None and name in _UNSUPPORTED) or name in _IGNORED or value in _WITHOUT.get(name, ()):
                continue
            if name in _UNSUPPORTED:
                raise InvalidRequestError(f"{name} is not supported by this server; leave it out", name)
            raise InvalidRequestError(str(unknown_names("fields", [name], type(self).model_fields)), name)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(BaseModel):
    """What OpenAI wraps a schema in. An answer always follows the schema, ``strict`` or not."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """Exactly one of these, as vLLM has them; ``pearl.StructuredOutput`` says what they mean."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class SamplingFields(Body):
    """What completions and chat completions share; ``pearl.sampling_params`` says what the numbers mean."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    draft_temperature: float | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    draft: Annotated[bool | None, Field(description="False: this request is decoded without drafting.")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metrics: Annotated[bool | None, Field(description="Report how speculative decoding went.")] = None
    return_token_ids: Annotated[bool | None, Field(description="Token ids beside the text.")] = None
    return_token_sources: Annotated[
        bool | None, Field(description="Whose each token is, the draft's, accepted, or the target's; and how it came.")
    ] = None
    return_rounds: Annotated[
        bool | None, Field(description="In a stream: the rounds of both models that each chunk comes from.")
    ] = None


class CompletionRequest(SamplingFields):
    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> Sequence[str | TokenIds]:
        """Each a text, or token ids; an empty list is one without ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given


class FunctionName(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str


class FunctionDefinition(BaseModel):
    """What else it holds is the template's. ``strict`` is what structured output makes it, not an instruction."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(description="JSON schema of an object.")] = None
    strict: bool | None = None


class ToolDefinition(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionDefinition
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, check: ModelWrapValidatorHandler[ToolDefinition]) -> ToolDefinition:
        checked = check(given)
        checked._given = given
        return checked

    def for_template(self) -> dict[str, Any]:
        """As it was written, in the order of its keys, which are a part of the prompt; but for nulls."""
        function = {key: value for key, value in self._given["function"].items() if value is not None}
        return {**self._given, "function": function}


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionName


class TemplateFields(Body):
    """What a chat template gets beside the messages."""

    tools: list[ToolDefinition] | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatCompletionRequest(TemplateFields, SamplingFields):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(TemplateFields):
    """A prompt, or messages."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: TokenIds
