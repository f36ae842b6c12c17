"""Tools in /v1/chat/completions: what the template gets, what the client gets, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from chat_support import ADD, CALL, CHAT, NOW, QUESTION, chat, prompt_of, script, talker
from fake_engine import FakeEngine, ask
from serving_support import NAME, listening, settings

from pearl import LLM
from pearl.serving.app import create_app
from pearl.serving.sampling import SamplingDefaults
from pearl.serving.tool_formats import HERMES, LLAMA3_JSON
from pearl.serving.tool_use import forced_call_schema

PIECES = [
    "Let me",
    " see.\n\n<tool",
    "_call>\n",
    '{"name": "add", "argum',
    'ents": {"a"',
    ": 2",
    "}}\n</tool_",
    "call>",
]


@pytest.fixture(scope="module")
def llm(idle_llm: LLM) -> LLM:
    return talker(idle_llm)


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[openai.OpenAI]:
    """Of a server whose two outputs are PIECES and text without a call, in turn."""
    first, second = script(llm, PIECES), script(llm, ["No tools,", " just text"], index=1)
    engine: Any = FakeEngine(llm, *first[:4], second[0], *first[4:], second[1])
    app = create_app(engine, settings(), SamplingDefaults.of_openai())
    with listening(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_template_gets_tools_calls_and_results(llm: LLM) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
    ]
    engine = FakeEngine(llm, *script(llm, ["5"]))
    nulls = {"type": "function", "function": {**NOW["function"], "description": None, "parameters": None}}
    chat(engine, messages=messages, tools=[ADD, nulls])
    assert prompt_of(engine) == (
        "Answer, or write <tool_call>{name, arguments}</tool_call>, with one of\n"
        f"{json.dumps(ADD)}\n{json.dumps(NOW)}\n<user>2 + 3?\n<assistant>\n{CALL}\n<tool>5\n<assistant>"
    )
    tokenized = ask(engine, "POST", "/tokenize", json={"messages": messages, "tools": [ADD, NOW]}).json()
    assert tokenized["tokens"] == engine.asked[-1][0]
    chat(engine, tools=[ADD], tool_choice="none")
    assert prompt_of(engine) == "<user>2 + 3?\n<assistant>"


def test_a_whole_answer(llm: LLM) -> None:
    engine = FakeEngine(llm, *script(llm, PIECES))
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": None}):
        (found,) = chat(engine, tools=[ADD], **choice)["choices"]
        (call,) = found["message"].pop("tool_calls")
        assert found["message"] == {"role": "assistant", "content": "Let me see."}
        assert call.pop("id").startswith("call_")
        assert call == {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
        assert found["finish_reason"] == "tool_calls"
    (found,) = chat(FakeEngine(llm, *script(llm, [CALL, f"\n{CALL}"])), tools=[ADD])["choices"]
    assert found["message"]["content"] is None
    assert len({call["id"] for call in found["message"]["tool_calls"]}) == 2


def test_without_tools_tags_are_text(llm: LLM) -> None:
    engine = FakeEngine(llm, *script(llm, PIECES))
    for body in ({}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}, {"tool_choice": "auto"}):
        (found,) = chat(engine, **body)["choices"]
        assert found["message"] == {"role": "assistant", "content": "".join(PIECES)}
        assert found["finish_reason"] == "stop"


def test_the_client_puts_the_stream_together(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": [QUESTION], "n": 2}
    with client.chat.completions.stream(tools=[ADD], **asked) as stream:  # type: ignore[list-item]
        names = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in names
    assert "tool_calls.function.arguments.done" in names
    called, plain = completion.choices
    assert (called.message.content, called.finish_reason) == ("Let me see.", "tool_calls")
    assert called.message.tool_calls is not None
    assert [call.function.parsed_arguments for call in called.message.tool_calls] == [{"a": 2}]
    assert (plain.message.content, plain.finish_reason) == ("No tools, just text", "stop")
    assert not plain.message.tool_calls
    whole = client.chat.completions.create(tools=[ADD], **asked)  # type: ignore[list-item]
    for streamed, choice in zip(completion.choices, whole.choices, strict=True):
        assert (choice.message.content, choice.finish_reason) == (streamed.message.content, streamed.finish_reason)


def test_deltas_have_openais_form(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=[QUESTION], tools=[ADD], stream=True, n=2))  # type: ignore[list-item,misc]
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == 0]
    entries = [entry for choice in choices for entry in choice.delta.tool_calls or []]
    assert entries[0].id is not None
    assert (entries[0].index, entries[0].type) == (0, "function")
    assert entries[0].function is not None
    assert entries[0].function.name == "add"
    assert len(entries) > 1
    for entry in entries[1:]:
        assert (entry.index, entry.id, entry.type) == (0, None, None)
        assert entry.function is not None
        assert entry.function.name is None
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    # A chunk all of whose text is held back has no event of its own.
    assert all(choice.delta.content or choice.delta.tool_calls for choice in choices[1:-1])


@pytest.mark.parametrize("end", ["stop", "length"])
def test_a_call_that_breaks_off(llm: LLM, end: Any) -> None:
    begun = '<tool_call>{"name": "add", "arguments": {"a": '
    (found,) = chat(FakeEngine(llm, *script(llm, [begun], end)), tools=[ADD])["choices"]
    (call,) = found["message"]["tool_calls"]
    assert (call["function"]["arguments"], found["finish_reason"]) == ('{"a": ', end)
    (found,) = chat(FakeEngine(llm, *script(llm, [begun[:-9]], end)), tools=[ADD])["choices"]
    assert found["message"] == {"role": "assistant", "content": begun[:-9]}
    (found,) = chat(FakeEngine(llm, *script(llm, [CALL], "length")), tools=[ADD])["choices"]
    assert found["finish_reason"] == "length"


@pytest.mark.parametrize("text", ["a <tool_ca", "a \n", '<tool_call>{"name": "a'])
def test_what_is_held_back_comes_with_the_end(llm: LLM, text: str) -> None:
    body = {"messages": [QUESTION], "tools": [ADD], "stream": True}
    response = ask(FakeEngine(llm, *script(llm, list(text))), "POST", CHAT, json=body)
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in response.text.split("\n\n")[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_one_call_where_calls_are_not_parallel(llm: LLM) -> None:
    engine = FakeEngine(llm, *script(llm, [CALL, CALL]))
    for parallel, count in ((None, 2), (True, 2), (False, 1)):
        (found,) = chat(engine, tools=[ADD], parallel_tool_calls=parallel)["choices"]
        assert len(found["message"]["tool_calls"]) == count


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_told_of_tokens_is_of_the_raw_text(llm: LLM, stream: bool) -> None:
    chunks = script(llm, PIECES)
    asked: dict[str, Any] = {"tools": [ADD], "logprobs": True, "return_token_ids": True, "return_token_sources": True}
    response = ask(FakeEngine(llm, *chunks), "POST", CHAT, json={"messages": [QUESTION], "stream": stream, **asked})
    if stream:
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line[6:7] == "{"]
        choices = [event["choices"][0] for event in events[1:]]  # behind the opening
    else:
        choices = response.json()["choices"]
    assert len(choices) == (len(PIECES) if stream else 1)
    for choice, piece in zip(choices, PIECES if stream else ["".join(PIECES)], strict=True):
        assert [part["text"] for part in choice["text_sources"]] == list(piece)
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == piece
        assert len(choice["token_sources"]) == len(choice["token_ids"]) == len(piece)
    expected = ["draft" if drafted else "target" for chunk in chunks for drafted in chunk.drafted]
    assert [source for choice in choices for source in choice["token_sources"]] == expected


def test_tags_that_are_special_tokens_are_read(idle_llm: LLM) -> None:
    llm = talker(idle_llm, special=["<tool_call>", "</tool_call>", "<other>"])
    shown = {llm.tokenizer.encode(tag)[0] for tag in ("<tool_call>", "</tool_call>")}
    engine = FakeEngine(llm, *script(llm, ["Well.", f"{CALL}<other>"], shown=shown))
    (found,) = chat(engine, tools=[ADD], return_token_sources=True)["choices"]
    assert set(engine.shown) == shown
    assert (found["message"]["content"], len(found["message"]["tool_calls"])) == ("Well.", 1)
    inner = CALL.removeprefix("<tool_call>").removesuffix("</tool_call>")
    tokens = [*"Well.", "<tool_call>", *inner, "</tool_call>"]
    assert [part["text"] for part in found["text_sources"]] == tokens
    chat(engine)
    assert not engine.shown


def test_the_parser_is_the_operators_choice(llm: LLM, idle_llm: LLM) -> None:
    text = '{"name": "add", "parameters": {"a": 2}}'
    (found,) = chat(FakeEngine(llm, *script(llm, [text])), {"tool_parser": "llama3_json"}, tools=[ADD])["choices"]
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 2}'
    for other, server in ((llm, {"tool_parser": "none"}), (talker(idle_llm, "{{ tools }}{{ messages }}"), {})):
        response = ask(FakeEngine(other), "POST", CHAT, server, json={"messages": [QUESTION], "tools": [ADD]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert "--tool-call-parser" in response.json()["error"]["message"]


def test_a_template_that_knows_no_tools(idle_llm: LLM) -> None:
    llm = talker(idle_llm, "{# tools #}{% for m in messages %}<tool_call> arguments {{ m.content }}{% endfor %}")
    engine = FakeEngine(llm, *script(llm, ["5"]))
    for path in (CHAT, "/tokenize"):
        response = ask(engine, "POST", path, json={"messages": [QUESTION], "tools": [ADD]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert "template knows no tools" in response.json()["error"]["message"]
    assert chat(engine, tools=[ADD], tool_choice="none")["choices"][0]["message"]["content"] == "5"


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**ADD["function"], **changes}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools"),
        ({"tools": [function(name="")]}, "tools"),
        ({"tools": [function(name="a b")]}, "tools"),
        ({"tools": [function(name=5)]}, "tools"),
        ({"tools": [function(name="a" * 129)]}, "tools"),
        ({"tools": [function(parameters=[])]}, "tools"),
        ({"tools": [function(parameters={"type": "array"})]}, "tools"),
        ({"tools": [function(description=5)]}, "tools"),
        ({"tools": [function(strict="yes")]}, "tools"),
        ({"tools": [ADD, NOW, ADD]}, "tools"),
        ({"tools": [function(description="\ud800")]}, "tools"),
        ({"tools": [function(parameters={"maximum": float("nan")})]}, "tools"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": 5}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "messages"),
        ({"messages": [{"role": "tool", "tool_call_id": 5, "content": "a"}]}, "messages"),
        ({"messages": [{"role": "tool", "tool_call_id": "a"}]}, "messages"),
        ({"chat_template_kwargs": {"tools": [ADD]}}, "chat_template_kwargs"),
    ],
)
def test_refusals_name_the_field(llm: LLM, body: dict[str, Any], param: str) -> None:
    engine = FakeEngine(llm, *script(llm, ["a"]))
    content = json.dumps({"messages": [QUESTION], **body})
    response = ask(engine, "POST", CHAT, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not engine.asked


def test_refusals_say_which_tool(llm: LLM) -> None:
    body = {"messages": [QUESTION], "tools": [ADD, {"type": "function", "function": {"description": "x"}}]}
    response = ask(FakeEngine(llm), "POST", CHAT, json=body)
    assert response.json()["error"]["message"] == "tools[1].function.name: Field required"


@pytest.mark.parametrize("depth", [200, 900, 20_000])
def test_deep_schemas_are_no_server_error(llm: LLM, depth: int) -> None:
    deep = '{"not":' * depth + "{}" + "}" * depth
    tool = json.dumps(function(parameters=0)).replace('"parameters": 0', f'"parameters": {deep}')
    for choice in ("auto", "required"):
        body = f'{{"messages": [{json.dumps(QUESTION)}], "tools": [{tool}], "tool_choice": "{choice}"}}'
        response = ask(
            FakeEngine(llm, *script(llm, ["a"])),
            "POST",
            CHAT,
            content=body,
            headers={"content-type": "application/json"},
        )
        assert response.status_code in (200, 400)


TREE = function(
    name="grow",
    parameters={
        "properties": {"tree": {"$ref": "#/$defs/tree"}, "$ref": {"const": {"$ref": "#/x"}}},
        "required": ["tree"],
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"child": {"$ref": "#/$defs/tree"}, "id": {"type": "integer"}},
                "required": ["id"],
            }
        },
    },
)


@pytest.mark.parametrize("form", [HERMES, LLAMA3_JSON])
def test_the_schema_of_a_forced_call(form: Any) -> None:
    def holds(schema: dict[str, Any], name: str, arguments: Any) -> bool:
        jsonschema.Draft202012Validator.check_schema(schema)
        return jsonschema.Draft202012Validator(schema).is_valid({"name": name, form.key: arguments})

    tools = [ADD, TREE, NOW]
    named, any_of = forced_call_schema(tools, "grow", form), forced_call_schema(tools, None, form)
    good = [("add", {"a": 1}), ("grow", {"tree": {"id": 1, "child": {"id": 2}}, "$ref": {"$ref": "#/x"}}), ("now", {})]
    bad = [("add", {}), ("add", {"a": "x"}), ("grow", {"tree": {"id": 1, "child": {"id": "x"}}}), ("grow", []),
           ("grow", {"tree": {"id": 1}, "$ref": 5}), ("now", {"a": 1}), ("sub", {})]  # fmt: skip
    for name, arguments in good:
        assert holds(any_of, name, arguments)
        assert holds(named, name, arguments) == (name == "grow")
    assert not any(holds(schema, *call) for schema in (named, any_of) for call in bad)
    assert list(named["properties"]) == ["name", form.key]
