"""Calls of tools in the text of a model: what is a call, what stays content, however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pearl.serving.message_parser import MessageParser, Piece
from pearl.serving.reasoning import ReasoningSplitter
from pearl.serving.tool_formats import FORMATS, HERMES, LLAMA3_JSON, ToolFormat, format_of_template
from pearl.serving.tool_parser import ToolCallParser

NAMES = ("add", "get_weather")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}\n</tool_call>'
ARGUMENTS = '{"a": 1, "b": [2, {"c": "}"}]}'
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1}}'


def parser(form: ToolFormat, opened: bool | None = None, one_call: bool = False, forced: bool = False) -> MessageParser:
    reasoning = None if opened is None else ReasoningSplitter(opened)
    return MessageParser(reasoning, ToolCallParser(form, NAMES, forced), one_call)


def read(text: str, form: ToolFormat = HERMES, **options: Any) -> tuple[str | None, list[tuple[str, str]]]:
    message = parser(form, **options).whole(text)
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    return message["content"], calls


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello", "Hello", []),
        ("  Hello <b>\n ", "  Hello <b>\n ", []),
        (CALL, None, [("add", ARGUMENTS)]),
        (f"Let me see.\n\n{CALL}\n", "Let me see.", [("add", ARGUMENTS)]),
        (f"{CALL}\n{CALL}", None, [("add", ARGUMENTS)] * 2),
        (f"a\n{CALL}\nb {CALL} c\n", "a\nb c\n", [("add", ARGUMENTS)] * 2),
        ('<tool_call>{"name":"add","arguments":{}}</tool_call>', None, [("add", "{}")]),
        ('<tool_call>{"name":"add"}</tool_call>', None, [("add", "{}")]),
        ('<tool_call>{"name":"add","arguments":null}</tool_call>', None, [("add", "{}")]),
        ('<tool_call>{"type":"function","name":"add","arguments":{"a":1}}</tool_call>', None, [("add", '{"a":1}')]),
        ('<tool_call>{"name":"add","parameters":{"a":1}}</tool_call>', None, [("add", '{"a":1}')]),
        ('<tool_call>{"arguments": {"a": "\\u00e9 {"}, "name": "add"}</tool_call>', None,
         [("add", '{"a": "\\u00e9 {"}')]),
        ('<tool_call>{"name":"add","arguments":"{\\"a\\": 1}"}</tool_call>', None, [("add", '{"a": 1}')]),
        ('<tool_call>{"name":"add","arguments":{"a":"x\ny\t\\n"},"id":"7}"}</tool_call>!', "!",
         [("add", '{"a":"x\\ny\\t\\n"}')]),
        ('<tool_call>{"name":"add","arguments":{"a":"</tool_call>"}}</tool_call>', None,
         [("add", '{"a":"</tool_call>"}')]),
        ('<tool_call>{"name":"other","arguments":{"a":1}}</tool_call>', None, [("other", '{"a":1}')]),
        # What a model forgets, or writes once too often.
        ('<tool_call>{"name":"add","arguments":{"a":1}}', None, [("add", '{"a":1}')]),
        ('<tool_call>{"name":"add","arguments":{"a":1}}}</tool_call>', None, [("add", '{"a":1}')]),
        ('<tool_call>{"name":"add","arguments":{"a":1}</tool_call>so', "so", [("add", '{"a":1}')]),
        ('<tool_call>{"name":"add","arguments":{"a":1}}\nDone.', "\nDone.", [("add", '{"a":1}')]),
        (f'<tool_call>{{"name":"add","arguments":{{"a":1}}}}{CALL}', None, [("add", '{"a":1}'), ("add", ARGUMENTS)]),
        ('<tool_call>{"name":"add"}' + " " * 65 + "</tool_call>", " " * 65 + "</tool_call>", [("add", "{}")]),
        # What is no call stays as it is written.
        ("<tool_call>add(1)</tool_call>", "<tool_call>add(1)</tool_call>", []),
        ("a <tool_call>\n</tool_call> b", "a <tool_call>\n</tool_call> b", []),
        ('x\n<tool_call>["add"]</tool_call>', 'x\n<tool_call>["add"]</tool_call>', []),
        ('<tool_call>{"name": 5, "arguments": {"a": 1}}</tool_call>',
         '<tool_call>{"name": 5, "arguments": {"a": 1}}</tool_call>', []),
        ('<tool_call>{"name": "", "arguments": {"a": 1}}</tool_call>',
         '<tool_call>{"name": "", "arguments": {"a": 1}}</tool_call>', []),
        ('<tool_call>{"name": "\\ud800", "arguments": {"a": 1}}</tool_call>',
         '<tool_call>{"name": "\\ud800", "arguments": {"a": 1}}</tool_call>', []),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
         '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', []),
        ('<tool_call>{"name": "add", "arguments": "a"}</tool_call>',
         '<tool_call>{"name": "add", "arguments": "a"}</tool_call>', []),
        ("<tool_call>{'name': 'add', 'arguments': {}}</tool_call>",
         "<tool_call>{'name': 'add', 'arguments': {}}</tool_call>", []),
        ('<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call>',
         '<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call>', []),
        ('<tool_call>{"function": "add"}</tool_call>', '<tool_call>{"function": "add"}</tool_call>', []),
        (f"<tool_call>add <tool_call>{CALL}", "<tool_call>add <tool_call>", [("add", ARGUMENTS)]),
        ('<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
        ('<tool_call>{"name": "add", "arguments": {"a', '<tool_call>{"name": "add", "arguments": {"a', []),
        ("almost <tool_ca", "almost <tool_ca", []),
        ('<tool_call>{"arguments": ' + "[" * 10_000, '<tool_call>{"arguments": ' + "[" * 10_000, []),
        ('<tool_call>{"id": ' + "9" * 5000 + "}", '<tool_call>{"id": ' + "9" * 5000 + "}", []),
        (f'<tool_call>{{"id": {"[" * 9999}{"]" * 9999}, "name": "add"}}',
         f'<tool_call>{{"id": {"[" * 9999}{"]" * 9999}, "name": "add"}}', []),
        ('<tool_call>{"name": "add"' + " " * 65 + ', "arguments": {"a": 1',
         '<tool_call>{"name": "add"' + " " * 65 + ', "arguments": {"a": 1', []),
        # What ends amid its arguments has begun.
        ('<tool_call>{"name": "add", "arguments": {"a": "x', None, [("add", '{"a": "x')]),
    ],
)  # fmt: skip
def test_hermes(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    assert read(text) == (content, calls)
    assert joined(parser(HERMES), text) == (content or "", "", calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello { } ", "Hello { } ", []),
        (LLAMA_CALL, None, [("add", '{"a": 1}')]),
        (f"\n\n{LLAMA_CALL}\n", None, [("add", '{"a": 1}')]),
        (f"<|python_tag|>{LLAMA_CALL}", None, [("add", '{"a": 1}')]),
        (f"{LLAMA_CALL}; {LLAMA_CALL}", None, [("add", '{"a": 1}')] * 2),
        (f"{LLAMA_CALL}\n{LLAMA_CALL}{LLAMA_CALL}", None, [("add", '{"a": 1}')] * 3),
        (f"I call:\n  {LLAMA_CALL} now", "I call: now", [("add", '{"a": 1}')]),
        (f"I call {LLAMA_CALL}", f"I call {LLAMA_CALL}", []),
        (f"I call <|python_tag|>{LLAMA_CALL}", "I call", [("add", '{"a": 1}')]),
        ('{"name": "Ada", "parameters": {"a": 1}}', '{"name": "Ada", "parameters": {"a": 1}}', []),
        ('{"parameters": {"a": 1}, "name": "Ada"}', '{"parameters": {"a": 1}, "name": "Ada"}', []),
        ('{"parameters": {"a": 1}, "name": "add"}', None, [("add", '{"a": 1}')]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1}}', None, [("add", '{"a": 1}')]),
        ('<|python_tag|>{"name": "Ada", "parameters": {"a": 1}}', None, [("Ada", '{"a": 1}')]),
        ("<|python_tag|>import os", "<|python_tag|>import os", []),
        ('{"answer": 5}', '{"answer": 5}', []),
        (f'{{"answer": 5}}\n{LLAMA_CALL}', '{"answer": 5}', [("add", '{"a": 1}')]),
        ("{\n  x\n{", "{\n  x\n{", []),
        ("<|python", "<|python", []),
    ],
)
def test_llama3_json(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    assert read(text, LLAMA3_JSON) == (content, calls)
    assert joined(parser(LLAMA3_JSON), text) == (content or "", "", calls)


def joined(found: MessageParser, pieces: Iterable[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """(content, reasoning, calls) as a client puts them together from the deltas."""
    content, reasoning, calls = "", "", list[list[str]]()
    for piece in (*(found.feed(text) for text in pieces), found.finish()):
        check_form(piece, len(calls))
        for delta in piece.deltas():
            assert len(delta) == 1
            content += delta.get("content", "")
            reasoning += delta.get("reasoning_content", "")
            for entry in delta.get("tool_calls", []):
                if "id" in entry:
                    calls.append([entry["function"]["name"], ""])
                calls[entry["index"]][1] += entry["function"]["arguments"]
    return content, reasoning, [(name, arguments) for name, arguments in calls]


def check_form(piece: Piece, begun: int) -> None:
    """One entry for each call; the first one of a call has its id, type and name."""
    indices = [call.number for call in piece.calls]
    assert indices == sorted(set(indices))
    for call in piece.calls:
        first = call.number >= begun
        assert (call.id is not None, call.name is not None) == (first, first)
        assert set(call.as_delta()) == ({"index", "id", "type", "function"} if first else {"index", "function"})


def test_arguments_come_as_they_are_written() -> None:
    found, pieces = parser(HERMES), []
    for character in CALL:
        pieces += found.feed(character).calls
    assert pieces[0].name == "add"
    assert len(pieces) > 10
    assert "".join(piece.arguments for piece in pieces) == ARGUMENTS
    assert len({piece.id for piece in pieces if piece.id}) == 1


def test_content_is_not_held_back_for_nothing() -> None:
    found = parser(HERMES)
    assert [found.feed(text).content for text in ("a", " < b", " <tool", "s>", " x")] == [
        "a",
        " < b",
        "",
        " <tools>",
        " x",
    ]


def test_only_one_call_where_one_is_wanted() -> None:
    text = f"a {CALL} b {CALL} c"
    assert read(text, one_call=True) == ("a b c", [("add", ARGUMENTS)])
    found = parser(HERMES, one_call=True)
    found.feed(f"{CALL}<tool_call>" + '{"name": "add", "arguments": {"a": ')
    found.finish()
    assert found.has_called


@pytest.mark.parametrize("form", FORMATS.values())
def test_a_forced_call_has_no_tag(form: ToolFormat) -> None:
    text = f'{{"name": "add", "{form.key}": {{"a": 1}}}}'
    assert read(text, form, forced=True) == (None, [("add", '{"a": 1}')])
    assert read("no call", form, forced=True) == ("no call", [])


def test_calls_after_reasoning() -> None:
    text = f"<think>\nI could {CALL}, but\n</think>\n\nWell.\n{CALL}"
    message = parser(HERMES, opened=False).whole(text)
    assert (message["reasoning_content"], message["content"]) == (f"I could {CALL}, but", "Well.")
    assert len(message["tool_calls"]) == 1
    assert joined(parser(HERMES, opened=True), text[7:]) == (
        "Well.", f"I could {CALL}, but", [("add", ARGUMENTS)]
    )  # fmt: skip


def test_whether_all_calls_are_complete() -> None:
    for text, complete in ((CALL, True), ("a", False), ('<tool_call>{"name":"add","arguments":{"a":', False)):
        found = parser(HERMES)
        found.feed(text)
        found.finish()
        assert found.has_called == complete


FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>", '{"name": "add"', ', "arguments": ',
    ', "parameters": ', '{"a": ', '"x\\"}"', '"\n', "}", "}}", "{", "[", "]", ",", ";", ":", " ", "\n", " " * 70, "<",
    "a", "Hello", '"', "\\", '"type": "function", ', CALL, LLAMA_CALL, "é", "🙂",
    '{"name":"Ada","parameters":{"b":1}}',
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(
    text=TEXTS, places=st.lists(st.integers(0, 10_000), max_size=12), form=st.sampled_from(list(FORMATS.values())),
    opened=st.sampled_from([None, False, True]),
)  # fmt: skip
@example(text=CALL + " " * 70 + "</tool_call>", places=[len(CALL) + 66], form=HERMES, opened=None)
@example(
    text='<tool_call>{"name": "add"' + " " * 70 + ', "arguments": {"a": 1}}', places=[90], form=HERMES, opened=None
)
def test_any_cut_gives_the_same_message(text: str, places: list[int], form: ToolFormat, opened: bool | None) -> None:
    whole = joined(parser(form, opened), [text])
    assert joined(parser(form, opened), cut(text, places)) == whole
    assert joined(parser(form, opened), text) == whole
    message = parser(form, opened).whole(text)
    assert (message["content"] or "", message.get("reasoning_content") or "") == whole[:2]


@settings(max_examples=150, deadline=None)
@given(
    name=st.text("abc_", min_size=1, max_size=5),
    arguments=st.dictionaries(st.text(max_size=5), st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3) |
        st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6), max_size=4),
    before=st.text("ab {}<\n", max_size=12), places=st.lists(st.integers(0, 10_000), max_size=8),
    ascii_only=st.booleans(),
)  # fmt: skip
def test_any_call_is_read(
    name: str, arguments: dict[str, Any], before: str, places: list[int], ascii_only: bool
) -> None:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
    text = f"{before}<tool_call>\n{call}\n</tool_call>"
    content, _, calls = joined(parser(HERMES), cut(text, places))
    assert content == before.rstrip()
    assert [(found, json.loads(written)) for found, written in calls] == [(name, arguments)]
    text = f"<|python_tag|>{call}".replace('"arguments"', '"parameters"', 1)
    content, _, calls = joined(parser(LLAMA3_JSON), cut(text, places))
    assert (content, [(found, json.loads(written)) for found, written in calls]) == ("", [(name, arguments)])


def test_the_format_is_told_from_the_template() -> None:
    qwen = 'return a json object within <tool_call></tool_call>: {"name": <function-name>, "arguments": <args>}'
    llama = '<|start_header_id|> {"name": function name, "parameters": dictionary of argument name and its value}'
    assert format_of_template(qwen) is HERMES
    assert format_of_template(llama) is LLAMA3_JSON
    for other in ("", "{{ tools }}", "<tool_call>\n<function=f> arguments", "<tool_call>f\n<arg_key> arguments"):
        assert format_of_template(other) is None
