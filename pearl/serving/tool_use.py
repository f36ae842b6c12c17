"""What a request says about tools: which there are, and which of them may, must or shall be called."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.serving.chat_markup import ChatMarkup
from pearl.serving.protocol import ChatCompletionRequest, NamedTool, ToolDefinition
from pearl.serving.tool_formats import ToolFormat
from pearl.user_values import lone_surrogate, shown

Tool = dict[str, Any]
_NO_REFERENCES = ("const", "default", "enum", "examples")  # keys of a schema whose values are data


@dataclass(frozen=True)
class ToolUse:
    """``tools``: for the template. ``schema``: of the call that the text must be; None: the model decides."""

    tools: list[Tool]
    form: ToolFormat
    one_call: bool
    schema: dict[str, Any] | None

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]


def tool_use(body: ChatCompletionRequest, markup: ChatMarkup) -> ToolUse | None:
    """None: nothing is called. InvalidRequestError names ``tools`` or ``tool_choice``."""
    tools, choice = checked_tools(body.tools), body.tool_choice
    if isinstance(choice, NamedTool) and choice.function.name not in (tool["function"]["name"] for tool in tools):
        raise InvalidRequestError(f"tool_choice: there is no tool {shown(choice.function.name)}", "tool_choice")
    if choice == "required" and not tools:
        raise InvalidRequestError("tool_choice is 'required', but there are no tools", "tool_choice")
    if not tools or choice == "none":
        return None
    require_template(tools, markup)
    if markup.tool_format is None:
        raise InvalidRequestError(
            "tools: this server cannot read the calls of this model; start it with --tool-call-parser", "tools"
        )
    wanted = choice.function.name if isinstance(choice, NamedTool) else None
    forced = wanted is not None or choice == "required"
    schema = forced_call_schema(tools, wanted, markup.tool_format) if forced else None
    return ToolUse(tools, markup.tool_format, body.parallel_tool_calls is False, schema)


def checked_tools(given: Sequence[ToolDefinition] | None) -> list[Tool]:
    """As a chat template gets them. InvalidRequestError for what cannot be called."""
    tools = [tool.for_template() for tool in given or ()]
    _require_text(tools)
    for name, count in Counter(tool["function"]["name"] for tool in tools).items():
        if count > 1:
            raise InvalidRequestError(f"tools: there are {count} of the name {name!r}", "tools")
    for tool in tools:
        if (parameters := tool["function"].get("parameters")) and parameters.get("type", "object") != "object":
            name = tool["function"]["name"]
            raise InvalidRequestError(f"tools: the parameters of {name!r} must be of type 'object'", "tools")
    return tools


def require_template(tools: Sequence[Tool], markup: ChatMarkup) -> None:
    """InvalidRequestError if the model would not learn of them."""
    if tools and not markup.writes_tools:
        raise InvalidRequestError("tools: this model's chat template knows no tools; leave them out", "tools")


def _require_text(tools: Sequence[Tool]) -> None:
    """Templates write them as JSON."""
    try:
        text = json.dumps(tools, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"tools: they cannot be written as JSON: {error}", "tools") from error
    if lone_surrogate(text) is not None:
        raise InvalidRequestError("tools: they have half a character (a lone surrogate)", "tools")


def forced_call_schema(tools: Sequence[Tool], name: str | None, form: ToolFormat) -> dict[str, Any]:
    """JSON schema of one call of the tool ``name``, or of any (None): the whole text, without tags, is such an object.

    Its keys come in the order that ``ToolCallParser`` streams; a tool's references to its own schema stay right.
    """
    chosen = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    calls, schemas = [], {}
    for index, function in enumerate(chosen):
        place = f"tool_{index}"
        own = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        schemas[place] = _moved({"type": "object"} | own, f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, form.key: {"$ref": f"#/$defs/{place}"}},
                "required": ["name", form.key],
                "additionalProperties": False,
            }
        )
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": schemas}


def _moved(schema: Any, place: str) -> Any:
    """The same schema as a part of another document, at ``place``."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        else:
            moved[key] = value if key in _NO_REFERENCES else _moved(value, place)
    return moved
