"""``response_format`` and ``structured_outputs``: OpenAI's and vLLM's names for the form that an answer must have."""

from __future__ import annotations

from typing import Any

from pearl.errors import InvalidRequestError
from pearl.grammars import Grammar
from pearl.sampling_params import SamplingParams
from pearl.serving.protocol import SamplingFields
from pearl.serving.texts import Texts
from pearl.structured_output import StructuredOutput


def structured_output(fields: SamplingFields) -> StructuredOutput | None:
    """InvalidRequestError names the field at fault."""
    of_format, own = _of_format(fields), fields.structured_outputs
    if of_format is not None and own is not None:
        raise InvalidRequestError("structured_outputs and response_format: give one of them", "structured_outputs")
    if own is None:
        return of_format
    given: dict[str, Any] = own.model_dump(exclude_none=True, by_alias=True)
    try:
        return StructuredOutput(**given)
    except InvalidRequestError as error:
        raise _named(error, fields) from error


def _of_format(fields: SamplingFields) -> StructuredOutput | None:
    name, given = "response_format", fields.response_format
    if given is None:
        return None
    if (given.json_schema is not None) != (given.type == "json_schema"):
        raise InvalidRequestError(f"{name}: json_schema goes with the type json_schema, and only with it", name)
    if given.type == "text":
        return None
    if given.json_schema is None:
        return StructuredOutput(json_object=True)
    try:
        return StructuredOutput(json=given.json_schema.schema_)
    except InvalidRequestError as error:
        raise _named(error, fields) from error


async def compiled(texts: Texts, fields: SamplingFields, params: SamplingParams) -> Grammar | None:
    """What ``params.structured`` asks for, compiled where neither the event loop nor the engine's rounds wait for it.

    InvalidRequestError names the field at fault.
    """
    try:
        return await texts.grammar(params)
    except InvalidRequestError as error:
        raise _named(error, fields) from error


def _named(error: InvalidRequestError, fields: SamplingFields) -> InvalidRequestError:
    """The same, about the field that the client has written."""
    name = "response_format" if fields.structured_outputs is None else "structured_outputs"
    words = str(error).removeprefix("structured ")
    return InvalidRequestError(f"{name}: {words}", name)
