"""Chat messages: which conversations a template gets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pearl.chat_messages import read_conversation, read_conversations
from pearl.errors import InvalidRequestError


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}, **more}


USER = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([SYSTEM, USER], [[SYSTEM, USER]]),
        ((USER,), [[USER]]),
        ([[USER], (SYSTEM, USER)], [[USER], [SYSTEM, USER]]),
        ([{**USER, "name": "Ada"}], [[{**USER, "name": "Ada"}]]),
        ([{"role": "pirate", "content": ""}], [[{"role": "pirate", "content": ""}]]),  # the template's matter
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            [[{"role": "user", "content": "a\nb"}]],
        ),
        (
            [{"role": "assistant", "content": None, "refusal": None, "tool_calls": [call('{"a": [1]}', id="x")]}],
            [[{"role": "assistant", "content": "", "tool_calls": [call({"a": [1]}, id="x", type="function")]}]],
        ),
        (
            [{"role": "assistant", "tool_calls": [call(""), call(None), call({"b": 2}), call('{"a": 1'), call("[1]")]}],
            [
                [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [call(a, type="function") for a in ({}, {}, {"b": 2}, '{"a": 1', "[1]")],
                    }
                ]
            ],
        ),
        (
            [{"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "7"}], "tool_calls": []}],
            [[{"role": "tool", "tool_call_id": "x", "content": "7"}]],
        ),
        (
            [
                {"role": "assistant", "tool_calls": [call("", id="x"), {"id": "y", "function": {"name": "g"}}]},
                {"role": "tool", "tool_call_id": "y", "content": "1"},
                {"role": "tool", "tool_call_id": "x", "content": "2"},
                {"role": "tool", "tool_call_id": "x", "content": "3", "name": "own"},
                {"role": "tool", "content": "4"},
            ],
            [
                [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            call({}, id="x", type="function"),
                            {"id": "y", "type": "function", "function": {"name": "g", "arguments": {}}},
                        ],
                    },
                    {"role": "tool", "tool_call_id": "y", "content": "1", "name": "g"},
                    {"role": "tool", "tool_call_id": "x", "content": "2", "name": "f"},
                    {"role": "tool", "tool_call_id": "x", "content": "3", "name": "own"},
                    {"role": "tool", "content": "4"},
                ]
            ],
        ),
        (
            [{"role": "assistant", "content": None, "reasoning_content": "so"}],
            [[{"role": "assistant", "content": "", "reasoning_content": "so"}]],
        ),
    ],
)
def test_conversations(given: Any, wanted: list[list[dict[str, Any]]]) -> None:
    assert read_conversations(given) == wanted


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("Hello", 'a list of messages such as {"role": "user", "content": "Hello"}, not'),
        (USER, "a list of messages such as"),
        (None, "not None"),
        ([], "messages is empty"),
        ([[USER], []], "messages[1] is empty"),
        ([5], "messages[0] is 5"),
        ([USER, "Hello"], "messages[1] is 'Hello'"),
        ([[USER], USER], "messages[1] is {'role'"),
        ([["Hello"]], "messages[0][0] is 'Hello'"),
        ([{"content": "Hello"}], 'messages[0] has no "role" that is a text'),
        ([{"role": 1, "content": "Hello"}], 'messages[0] has no "role" that is a text'),
        ([USER, {"role": "user"}], 'messages[1] has no "content" that is a text'),
        ([{"role": "user", "content": b"Hello"}], 'messages[0] has no "content" that is a text'),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0] is no text ('image_url')",
        ),
        ([{"role": "user", "content": [{"type": "thinking", "text": "x"}]}], "is no text ('thinking')"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0] is no text"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls is no list, but {}"),
        ([{"role": "assistant", "tool_calls": []}], 'messages[0] has no "content"'),
        ([{"role": "assistant", "tool_calls": "f()"}], "messages[0].tool_calls is no list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls[0] has no function with a name"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "tool_calls[0] has no function with a name"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}], "has no function with a name"),
        ([{"role": "assistant", "tool_calls": [call("{}", type="custom")]}], "tool_calls[0] is of another type"),
        ([{"role": "assistant", "tool_calls": [call("{}"), call("{}", id=5)]}], "tool_calls[1] is of another type"),
        ([{"role": "assistant", "tool_calls": [call([1])]}], "tool_calls[0].function.arguments is [1]"),
        ([{"role": "tool", "tool_call_id": 7, "content": "a"}], "messages[0].tool_call_id is no text, but 7"),
        ([{"role": "assistant", "reasoning_content": [], "content": "a"}], "messages[0].reasoning_content is no text"),
    ],
)
def test_what_is_no_conversation_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        read_conversations(given)
    assert says in str(error.value)


def test_where_one_is_wanted_several_are_refused() -> None:
    assert read_conversation([USER]) == read_conversation([[USER]]) == [USER]
    with pytest.raises(InvalidRequestError, match="one conversation is wanted here, these are 2"):
        read_conversation([[USER], [USER]])
