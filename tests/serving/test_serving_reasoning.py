"""Reasoning split off answers: the splitter over any pieces, and the whole route."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from chat_support import ADD, CALL, CHAT, QUESTION, THINKING, chat, prompt_of, script, talker
from fake_engine import FakeEngine, ask
from hypothesis import given, settings
from hypothesis import strategies as st

from pearl import LLM
from pearl.serving.message_parser import MessageParser
from pearl.serving.reasoning import ReasoningSplitter, leaves_open, opens_reasoning

OPENED = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def llm(idle_llm: LLM) -> LLM:
    return talker(idle_llm, THINKING, added=["<think>", "</think>"])


def split(pieces: Sequence[str], opened: bool = False) -> tuple[str, str, int | None, bool]:
    """(reasoning, answer, where the reasoning ends, whether it has not ended)"""
    splitter = ReasoningSplitter(opened)
    parts = [*map(splitter.feed, pieces), splitter.finish()]
    reasoning = "".join(part.reasoning for part in parts)
    return reasoning, "".join(part.answer for part in parts), splitter.end, splitter.inside


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "answer"),
    [
        ("plain", False, "", "plain"),
        ("\n plain </think> <think>\n", False, "", "\n plain </think> <think>\n"),
        ("<think>\nso\n it is\n</think>\n\nYes. ", False, "so\n it is", "Yes. "),
        ("\n<think>so</think>Yes", False, "so", "Yes"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("so\n</think>\n\nYes</think>", True, "so", "Yes</think>"),
        ("<think>\nso</think>Yes", True, "so", "Yes"),
        ("</think>Yes", True, "", "Yes"),
        ("Yes", True, "Yes", ""),
        ("<think>so </thi", False, "so </thi", ""),
        ("<think>a </thinker> b</think>", False, "a </thinker> b", ""),
        ("<thi", False, "", "<thi"),
        ("<thin", True, "<thin", ""),
        ("<thinking>", False, "", "<thinking>"),
        ("  ", False, "", "  "),
        ("", True, "", ""),
    ],
)
def test_the_parts_of_a_text(text: str, opened: bool, reasoning: str, answer: str) -> None:
    assert split([text], opened)[:2] == (reasoning, answer)
    assert split(text, opened)[:2] == (reasoning, answer)


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "ink>", "a", "\n", " " * 70]), max_size=9),
    size=st.integers(1, 9), opened=st.booleans(),
)  # fmt: skip
def test_any_cut_gives_the_same_parts(pieces: list[str], size: int, opened: bool) -> None:
    text = "".join(pieces)
    whole = split([text], opened)
    assert split(text, opened) == split(pieces, opened) == whole
    assert split([text[at : at + size] for at in range(0, len(text), size)], opened) == whole
    if (end := whole[2]) is not None:
        assert text[:end].endswith("</think>")
    assert "</think>" not in whole[0]


def test_reasoning_comes_as_it_is_thought() -> None:
    found = MessageParser(ReasoningSplitter(False), None)
    pieces = [found.feed(piece) for piece in ("<think>", "\nso", " and", " so\n</", "think", ">", "\n\n", "Yes", " \n")]
    assert [piece.reasoning for piece in pieces] == ["", "so", " and", " so", "", "", "", "", ""]
    assert [piece.content for piece in pieces] == ["", "", "", "", "", "", "", "Yes", " \n"]


def test_prompts_that_open_reasoning() -> None:
    assert opens_reasoning("<assistant><think>\n")
    assert not opens_reasoning("<assistant><think>\n\n</think>\n\n")
    assert not opens_reasoning("what is <think>?")
    assert leaves_open("<think>so")
    assert not leaves_open("<think>so</think>")
    assert not leaves_open("so")


TEXT = "<think>\nTwo and three.\n</think>\n\nFive."


@pytest.mark.parametrize(
    "pieces", [[TEXT], ["<think>", "\nTwo and", " three.\n", "</think>", "\n\nFi", "ve."], list(TEXT)]
)
def test_an_answer_and_its_stream(llm: LLM, pieces: list[str]) -> None:
    chunks = script(llm, pieces)
    answer = chat(FakeEngine(llm, *chunks))
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Five.", "reasoning_content": "Two and three."}
    assert choice["finish_reason"] == "stop"
    whole = pieces == [TEXT]
    # A tag is one token, if it comes in one piece; the others are bytes.
    tokens = len("\nTwo and three.\n") + (2 if "</think>" in pieces or whole else len("<think></think>"))
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}
    body = {"messages": [QUESTION], "stream": True, "stream_options": {"include_usage": True}}
    response = ask(FakeEngine(llm, *chunks), "POST", CHAT, json=body)
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line[6:7] == "{"]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Two and three."
    assert "".join(delta.get("content", "") for delta in deltas) == "Five."
    assert events[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}


def test_a_prompt_that_has_opened_it(llm: LLM) -> None:
    engine = FakeEngine(llm, *script(llm, ["Two", "</think>", "Five."]))
    answer = chat(engine, **OPENED)
    assert prompt_of(engine).endswith("<assistant><think>\n")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Five.", "reasoning_content": "Two"}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    # The same text behind a prompt that has not.
    answer = chat(engine)
    assert answer["choices"][0]["message"]["content"] == "Two</think>Five."
    assert answer["choices"][0]["message"]["reasoning_content"] is None
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    messages = [QUESTION, {"role": "assistant", "content": "<think>\nOne and"}]
    answer = chat(engine, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert answer["choices"][0]["message"]["reasoning_content"] == "Two"


@pytest.mark.parametrize("tools", [{}, {"tools": [ADD], "tool_choice": "none"}])
def test_what_must_have_a_form_is_all_content(llm: LLM, tools: dict[str, Any]) -> None:
    """Also behind a prompt that has opened reasoning."""
    text = "<think>a</think>b"
    engine = FakeEngine(llm, *script(llm, [text[:9], text[9:]]))
    answer = chat(engine, structured_outputs={"choice": [text]}, stop_token_ids=[0], **OPENED, **tools)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert "completion_tokens_details" not in answer["usage"]


def test_an_output_that_ends_amid_reasoning_has_no_content(llm: LLM) -> None:
    engine = FakeEngine(llm, *script(llm, ["<think>", "Two and"], "length"))
    for stream in (False, True):
        body = {"messages": [QUESTION], "stream": stream, "stream_options": {"include_usage": True} if stream else None}
        response = ask(engine, "POST", CHAT, json=body)
        if not stream:
            (choice,) = response.json()["choices"]
            assert choice["message"] == {"role": "assistant", "content": None, "reasoning_content": "Two and"}
            assert choice["finish_reason"] == "length"
            assert response.json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 8}
        else:
            events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line[6:7] == "{"]
            assert not any(choice["delta"].get("content") for event in events for choice in event["choices"])


def test_outputs_are_told_apart(llm: LLM) -> None:
    first, second = script(llm, ["<think>a", "b</think>c"]), script(llm, ["d", "e"], index=1)
    answer = chat(FakeEngine(llm, first[0], second[0], first[1], second[1]), n=2)
    assert [(c["message"]["reasoning_content"], c["message"]["content"]) for c in answer["choices"]] == [
        ("ab", "c"), (None, "de"),
    ]  # fmt: skip
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
def test_tools_after_reasoning_and_what_is_told_of_tokens(llm: LLM, stream: bool) -> None:
    pieces = ["<think>", "I call ", CALL, "</th", "ink>", "\n\nSo:\n", CALL[:20], CALL[20:]]
    engine = FakeEngine(llm, *script(llm, pieces))
    asked: dict[str, Any] = {"tools": [ADD], "logprobs": True, "return_token_sources": True, "stream": stream}
    response = ask(engine, "POST", CHAT, json={"messages": [QUESTION], **asked})
    if not stream:
        (choice,) = choices = response.json()["choices"]
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("So:", f"I call {CALL}")
        assert len(message["tool_calls"]) == 1
    else:
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line[6:7] == "{"]
        choices = [event["choices"][0] for event in events[1:]]
        assert ["".join(part["text"] for part in choice["text_sources"]) for choice in choices] == pieces
    assert choices[-1]["finish_reason"] == "tool_calls"
    parts = [part["text"] for choice in choices for part in choice["text_sources"]]
    entries = [entry["token"] for choice in choices for entry in choice["logprobs"]["content"]]
    assert "".join(parts) == "".join(entries) == "".join(pieces)


def test_a_chunk_of_several_kinds_is_several_events(llm: LLM) -> None:
    """Many clients look for content only where there is no reasoning. The last one tells of the chunk's tokens."""
    pieces = ["<think>a", f"b</think>c{CALL}"]
    asked = {"tools": [ADD], "logprobs": True, "return_token_sources": True, "stream": True}
    response = ask(FakeEngine(llm, *script(llm, pieces)), "POST", CHAT, json={"messages": [QUESTION], **asked})
    events = [json.loads(line[6:])["choices"][0] for line in response.text.split("\n\n") if line[6:7] == "{"]
    assert [list(event["delta"]) for event in events[1:]] == [
        ["reasoning_content"], ["reasoning_content"], ["content"], ["tool_calls"],
    ]  # fmt: skip
    assert ["text_sources" in event for event in events] == [False, True, False, False, True]
    assert [event["logprobs"] is not None for event in events] == [False, True, False, False, True]
    assert [event["finish_reason"] for event in events] == [None] * 4 + ["tool_calls"]
    assert "".join(part["text"] for part in events[-1]["text_sources"]) == pieces[1]


def test_the_operator_decides_and_else_template_and_vocabulary(llm: LLM, idle_llm: LLM) -> None:
    plain = talker(idle_llm, "{{ messages[0].content }}")
    for served, parser, found in (
        (llm, "auto", True), (llm, "think", True), (llm, "none", False), (plain, "auto", False), (plain, "think", True),
        (talker(idle_llm, "{{ messages[0].content }}", added=["<think>"]), "auto", True),
        (talker(idle_llm, "{{ messages[0].content }}{# <think> #}"), "auto", True),
    ):  # fmt: skip
        answer = chat(FakeEngine(served, *script(served, ["<think>a</think>b"])), {"reasoning_parser": parser})
        message = answer["choices"][0]["message"]
        assert message.get("reasoning_content") == ("a" if found else None)
        assert message["content"] == ("b" if found else "<think>a</think>b")
        assert ("completion_tokens_details" in answer["usage"]) == found


def test_tags_that_are_special_tokens_are_read(idle_llm: LLM) -> None:
    llm = talker(idle_llm, special=["<think>", "</think>"])
    shown = {llm.tokenizer.encode(tag)[0] for tag in ("<think>", "</think>")}
    engine = FakeEngine(llm, *script(llm, ["<think>é", "</think>ü"], shown=shown))
    answer = chat(engine)
    assert set(engine.shown) == shown
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("é", "ü")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


def test_reasoning_comes_back_to_the_template(llm: LLM) -> None:
    engine = FakeEngine(llm, *script(llm, ["a"]))
    thought = {"role": "assistant", "content": None, "reasoning_content": "so"}
    chat(engine, messages=[QUESTION, thought, QUESTION])
    assert prompt_of(engine) == "<user>2 + 3?\n<assistant><think>\nso\n</think>\n\n\n<user>2 + 3?\n<assistant>"
    response = ask(engine, "POST", CHAT, json={"messages": [QUESTION, thought | {"reasoning_content": 5}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
