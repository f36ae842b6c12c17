"""An agent's loop against a live server, with models that really write the call of a tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_support import ADD, CHAT, QUESTION
from reciting import END, FIRST, LAST, PLAIN, THOUGHT, learn_pair
from serving_support import NAME, OPTIONS, LiveServer, live_server

from pearl import LLM

Folders = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return learn_pair(tmp_path_factory.mktemp("reciting"))


@pytest.fixture(scope="module")
def server(pair: Folders) -> Iterator[LiveServer]:
    target, draft = pair
    with live_server(target=target, draft=draft) as running:
        yield running


def answer_to(client: openai.OpenAI, messages: list[Any], stream: bool) -> Any:
    asked: dict[str, Any] = {"model": NAME, "messages": messages, "temperature": 0, "tools": [ADD]}
    if not stream:
        return client.chat.completions.create(**asked)
    with client.chat.completions.stream(stream_options={"include_usage": True}, **asked) as events:
        for _ in events:
            pass
        return events.get_final_completion()


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_calls_the_tool_and_goes_on(server: LiveServer, client: openai.OpenAI, stream: bool) -> None:
    first = answer_to(client, [QUESTION], stream)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert (message.content, message.reasoning_content) == ("Let me see.", THOUGHT)
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2})
    assert first.usage.completion_tokens_details.reasoning_tokens == len(f"\n{THOUGHT}\n") + 2
    result = {"role": "tool", "tool_call_id": call.id, "content": str(2 + 3)}
    second = answer_to(client, [QUESTION, message.to_dict(), result], stream)
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == (LAST, "stop")
    assert second.choices[0].message.tool_calls is None
    # The template writes the first answer as the model did, so all its whole pages are found.
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    page = server.engine.llm.config.page_size
    assert second.usage.prompt_tokens_details.cached_tokens >= known // page * page


def test_the_tokens_are_the_targets_own(server: LiveServer, pair: Folders) -> None:
    asked = {"temperature": 0, "return_token_ids": True, "return_token_sources": True, "metrics": True}
    answer = server.post(CHAT, messages=[QUESTION], tools=[ADD], **asked).json()
    choice = answer["choices"][0]
    assert "".join(part["text"] for part in choice["text_sources"]) == FIRST
    assert set(choice["token_sources"]) == {"draft", "target"}
    with LLM(target=pair[0], **OPTIONS | {"method": "autoregressive", "window": "auto"}) as alone:
        (plain,) = alone.chat([QUESTION], chat_template_kwargs={"tools": [ADD]})
        assert plain.outputs[0].token_ids == choice["token_ids"]
        # The tags are special tokens: the library leaves them out of texts, as other special tokens.
        assert plain.outputs[0].text == FIRST.replace("<tool_call>", "").replace("</tool_call>", "")
        assert alone.tokenizer.encode(FIRST + END) == choice["token_ids"]


def test_tools_that_must_not_be_called(server: LiveServer) -> None:
    answer = server.post(CHAT, messages=[QUESTION], tools=[ADD], tool_choice="none", temperature=0).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": PLAIN, "reasoning_content": None}


def test_a_stop_string_may_be_a_tag(server: LiveServer) -> None:
    for stop, content in (("<tool_call>", "Let me see.\n"), (["</tool_call>"], "Let me see.")):
        answer = server.post(CHAT, messages=[QUESTION], tools=[ADD], temperature=0, stop=stop).json()
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == content
        assert choice["finish_reason"] == ("stop" if stop == "<tool_call>" else "tool_calls")


def pick(n: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"n": n}, "required": ["n"], "additionalProperties": False}
    return {"type": "function", "function": {"name": "pick", "parameters": parameters}}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 3}])
def test_calls_that_must_be_made(server: LiveServer, sampling: dict[str, Any]) -> None:
    """Whatever the model would rather write."""
    named = {"type": "function", "function": {"name": "pick"}}
    tools = [ADD, pick({"enum": [1, 2]})]
    for choice, names in ((named, {"pick"}), ("required", {"pick", "add"})):
        asked = {"messages": [QUESTION], "tools": tools, "tool_choice": choice, "max_tokens": 200, **sampling}
        (found,) = server.post(CHAT, **asked).json()["choices"]
        (call,) = found["message"]["tool_calls"]
        assert found["message"] == {"role": "assistant", "content": None, "tool_calls": [call]}
        assert found["finish_reason"] == "tool_calls"
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        assert name in names
        assert isinstance(arguments["a"], int) if name == "add" else arguments in ({"n": 1}, {"n": 2})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [pick({"type": "x"})]}, "tools"),
        ({"tools": [ADD], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [ADD], "structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ],
)
def test_calls_that_cannot_be_forced(server: LiveServer, body: dict[str, Any], param: str) -> None:
    refused = server.post(CHAT, messages=[QUESTION], tool_choice="required", **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
