"""``response_format`` and ``structured_outputs``, against a live server: valid answers, and those of the library."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import jsonschema
import openai
import pytest
from serving_support import NAME, PROMPT, LiveServer

from pearl import LLM, SamplingParams

MESSAGES: Any = [{"role": "user", "content": "def add(a, b):"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "size": {"type": "integer", "minimum": 0}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
CALL: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "item", "strict": True, "schema": SCHEMA}}


def test_a_schema_in_chat(client: openai.OpenAI, llm: LLM) -> None:
    common: dict[str, Any] = {"temperature": 0.8, "seed": 4}
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, response_format=CALL, max_completion_tokens=80, **common
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    params = SamplingParams(**common, max_tokens=80, structured={"json": SCHEMA})
    assert choice.message.content == llm.chat([MESSAGES], params)[0].outputs[0].text


def test_a_schema_in_a_stream(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {
        "model": NAME, "messages": MESSAGES, "temperature": 0.8, "seed": 4, "response_format": CALL, "max_tokens": 80,
    }  # fmt: skip
    chunks = list(client.chat.completions.create(**common, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == client.chat.completions.create(**common).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"regex": "[a-z]{2,5}[0-9]"}}, {"regex": "[a-z]{2,5}[0-9]"}),
        ({"structured_outputs": {"choice": ["yes", "no", "none"]}}, {"choice": ["yes", "no", "none"]}),
        ({"structured_outputs": {"grammar": 'root ::= [0-9] ("," root)?'}}, {"grammar": 'root ::= [0-9] ("," root)?'}),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None}, None),
    ],
    ids=str,
)
def test_every_form_is_the_librarys(server: LiveServer, llm: LLM, body: Any, form: Any) -> None:
    common: dict[str, Any] = {"temperature": 0.7, "seed": 2, "max_tokens": 48, "n": 2}
    answer = server.post("/v1/completions", prompt=[PROMPT, "x = "], **common, **body)
    assert answer.status_code == 200, answer.text
    texts = [choice["text"] for choice in answer.json()["choices"]]
    outputs = llm.generate([PROMPT, "x = "], SamplingParams(**common, structured=form))
    assert texts == [output.text for both in outputs for output in both.outputs]
    if form and "choice" in form:
        assert set(texts) <= set(form["choice"])
    if form and "regex" in form:
        assert all(re.fullmatch(form["regex"], text) for text in texts)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"response_format": "json"}, "response_format", "valid dictionary"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "goes with"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format", "goes with"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}},
            "response_format",
            "strin",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"grammar": 'start: "a" b'}}, "structured_outputs", "unknown name"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs", "not permitted"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "no JSON schema"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs", "no text matches"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "structured_outputs", "stop_token_ids"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "one of them",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_used_names_its_field(server: LiveServer, body: Any, param: str, says: str) -> None:
    for path, prompt in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        response = server.post(path, **prompt, **body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert says in error["message"]


def test_grammars_are_compiled_beside_the_event_loop_and_the_engine(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that neither other clients' requests nor their rounds wait for it."""
    compile_, threads = server.engine.llm.grammar, []

    def watched(params: SamplingParams) -> Any:
        threads.append(threading.current_thread().name)
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return compile_(params)

    monkeypatch.setattr(server.engine.llm, "grammar", watched)
    admission = server.engine.llm._admission
    monkeypatch.setattr(admission, "grammar", lambda params, inner=admission.grammar: watched_inner(inner, params))

    def watched_inner(inner: Any, params: SamplingParams) -> Any:
        assert threading.current_thread().name.startswith("pearl-texts")
        return inner(params)

    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "structured_outputs": {"choice": ["x"]}}
    assert [c["text"] for c in server.post("/v1/completions", **body).json()["choices"]] == ["x"] * 4
    assert len(threads) == 1
    assert threads[0].startswith("pearl-texts")


def test_a_grammar_that_gets_too_complex_fails_its_request_alone(server: LiveServer) -> None:
    bad = {"regex": "((a{1,1000}){1,1000}){1,1000}"}
    response = server.post("/v1/completions", prompt="a", max_tokens=60, min_tokens=50, structured_outputs=bad)
    assert response.status_code == 500
    assert "no token is left to draw" in response.json()["error"]["message"]
    assert "too many expressions" in response.json()["error"]["message"]
    good = server.post("/v1/completions", prompt="a", max_tokens=4, structured_outputs={"choice": ["x", "y"]})
    assert good.json()["choices"][0]["text"] in ("x", "y")
