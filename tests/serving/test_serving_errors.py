"""What clients are told when something is wrong, in OpenAI's shape; a fake engine behind the app, no sockets."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_engine import BODY, FakeEngine, ask, chunk

from pearl import LLM
from pearl.errors import EngineClosedError, EngineDrainingError, QueueFullError
from pearl.serving.health import Health

END = chunk("b", "length")


def complete(engine: FakeEngine, **changes: Any) -> httpx.Response:
    return ask(engine, "POST", "/v1/completions", json=BODY | changes)


def told(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.content.decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] for line in lines]


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (QueueFullError("9 wait"), 429, "queue_full"),
        (EngineDrainingError("no more"), 503, "draining"),
        (EngineClosedError("it is closed"), 503, "engine_closed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_refuses(idle_llm: LLM, refusal: Exception, status: int, code: str, stream: bool) -> None:
    engine = FakeEngine(idle_llm)
    engine.refusal = refusal
    response = complete(engine, stream=stream)
    assert response.status_code == status
    assert told(response)["code"] == code
    assert (response.headers.get("retry-after") is not None) == (code != "engine_closed")


def test_all_prompts_of_a_request_or_none(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, END)
    engine.refusal, engine.taken = QueueFullError("full"), 1
    assert complete(engine, prompt=["a", "b"]).status_code == 429
    assert [stream.cancelled for stream in engine.streams] == [True]


def test_health_is_red(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm)
    engine.health = Health(False, "the round hangs")
    response = ask(engine, "GET", "/health")
    assert (response.status_code, response.json()["reason"]) == (503, "the round hangs")
    engine.health, engine.draining = Health(True), True
    assert ask(engine, "GET", "/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [chunk("", "abort", "the device is gone"), RuntimeError("a bug at 0x7f")])
def test_a_failure_before_the_first_token_is_a_status(idle_llm: LLM, failure: Any, stream: bool) -> None:
    engine = FakeEngine(idle_llm, failure)
    response = complete(engine, stream=stream)
    assert response.status_code == 500
    assert ("device is gone" in told(response)["message"]) == (not isinstance(failure, RuntimeError))
    assert "0x7f" not in response.text
    assert engine.streams[0].cancelled


@pytest.mark.parametrize("failure", [chunk("", "abort", "the device is gone"), RuntimeError("a bug at 0x7f")])
def test_a_failure_behind_the_first_token_is_an_event(idle_llm: LLM, failure: Any) -> None:
    engine = FakeEngine(idle_llm, chunk("a"), failure)
    response = complete(engine, stream=True)
    assert response.status_code == 200
    first, error, done = events(response)
    assert json.loads(first)["choices"][0]["text"] == "a"
    assert json.loads(error)["error"]["type"] == "server_error"
    assert done == "[DONE]"
    assert "0x7f" not in response.text


def test_an_output_that_just_stops_is_a_failure(idle_llm: LLM) -> None:
    assert complete(FakeEngine(idle_llm, chunk("a"))).status_code == 500
    assert complete(FakeEngine(idle_llm), stream=True).status_code == 500


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe{}", b'{"prompt": ' + b"[" * 100_000,
     b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
     b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a\\ud800"}', b'{"prompt": "a", "stop": ["\\udfff"]}',
     b'{"prompt": []}', b'{"prompt": [[]]}', b'{"prompt": [1, "a"]}', b'{"prompt": [true]}', b'{"prompt": [-1]}',
     b'{"prompt": [99999999]}', b'{"prompt": ""}', b'{"prompt": {}}', b'{"prompt": null}', b'{"n": 1}'],
)  # fmt: skip
def test_malformed_bodies(idle_llm: LLM, content: bytes) -> None:
    engine = FakeEngine(idle_llm, END)
    headers = {"content-type": "application/json"}
    response = ask(engine, "POST", "/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    told(response)
    assert not engine.asked


def test_more_ids_than_any_context_holds_are_said_to_be_too_many(idle_llm: LLM) -> None:
    ids = [5] * ((1 << 20) + 1)
    response = complete(FakeEngine(idle_llm), prompt=ids)
    assert (response.status_code, told(response)["param"]) == (400, "prompt")
    assert f"the prompt has {len(ids)} tokens, the context holds" in told(response)["message"]


def test_json_must_be_declared(idle_llm: LLM) -> None:
    response = ask(FakeEngine(idle_llm), "POST", "/v1/completions", content=json.dumps(BODY))
    assert response.status_code == 400
    assert "Content-Type" in told(response)["message"]


def test_bodies_are_limited(idle_llm: LLM) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b'{"prompt": "'

    engine, limited = FakeEngine(idle_llm, END), {"max_body": 200}
    json_type = {"content-type": "application/json"}
    small = json.dumps(BODY).encode()
    declared = ask(engine, "POST", "/v1/completions", limited, content=small + b" " * 200, headers=json_type)
    counted = ask(engine, "POST", "/tokenize", limited, content=pieces(), headers=json_type)
    for response in (declared, counted):
        assert response.status_code == 413
        assert told(response)["code"] == "body_too_large"
    fits = small + b" " * (200 - len(small))
    assert ask(engine, "POST", "/v1/completions", limited, content=fits, headers=json_type).status_code == 200


def test_unknown_routes_methods_and_models(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, END)
    assert told(ask(engine, "GET", "/v2/completions"))["code"] == 404
    wrong = ask(engine, "GET", "/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    told(wrong)
    response = complete(engine, model="gpt-4")
    assert (response.status_code, told(response)["param"], told(response)["code"]) == (404, "model", "model_not_found")
    assert complete(engine, model="alias").json()["model"] == "pair"


@pytest.mark.parametrize("field", ["best_of", "suffix", "length_penalty", "guided_json", "prompt_embeds", "tools"])
def test_unsupported_fields_are_refused_unless_they_mean_nothing(idle_llm: LLM, field: str) -> None:
    engine = FakeEngine(idle_llm, END)
    response = complete(engine, **{field: 5})
    assert (response.status_code, told(response)["param"]) == (400, field)
    assert "not supported" in told(response)["message"]
    neutral = {"best_of": 1, "suffix": "", "length_penalty": 1.0, "tools": []}
    assert complete(engine, **{field: neutral.get(field)}).status_code == 200


def test_unknown_fields_are_refused_with_a_hint(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, END)
    response = complete(engine, temprature=0.5)
    assert (response.status_code, told(response)["param"]) == (400, "temprature")
    assert "'temperature'" in told(response)["message"]
    assert complete(engine, temprature=None).status_code == 400
    assert complete(engine, user="me").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere", "/v1/models/pair"])
def test_the_key_covers_every_route_but_health(idle_llm: LLM, path: str) -> None:
    engine, locked = FakeEngine(idle_llm), {"api_key": "s3cret"}
    for authorization in ("", "Bearer", "Bearer wrong", "Basic s3cret", "s3cret"):
        response = ask(engine, "GET", path, locked, headers={"authorization": authorization})
        assert response.status_code == 401
        assert told(response)["code"] == "invalid_api_key"
    for key in ("s3cret", "s3cret\n"):  # as a file of settings may have it
        allowed = ask(engine, "GET", path, {"api_key": key}, headers={"authorization": "Bearer s3cret"})
        assert allowed.status_code == (404 if path == "/nowhere" else 200)
    assert ask(engine, "GET", "/health", locked).status_code == 200
    assert ask(engine, "POST", "/v1/completions", locked, json=BODY).status_code == 401
    assert not engine.asked


def test_web_pages_are_let_in_by_name(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm)
    origin = {"origin": "https://page.example"}
    asking = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert "access-control-allow-origin" not in ask(engine, "GET", "/v1/models", headers=origin).headers
    options = {"origins": ("https://page.example",), "api_key": "k"}
    preflight = ask(engine, "OPTIONS", "/v1/completions", options, headers=asking)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    other = ask(engine, "GET", "/v1/models", options, headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_logs_have_a_line_for_each_request_and_no_text(idle_llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        complete(FakeEngine(idle_llm, chunk("answer"), END))
        complete(FakeEngine(idle_llm, chunk("answer"), chunk("", "abort", "the device is gone")))
        complete(FakeEngine(idle_llm), top_p=7)
        complete(FakeEngine(idle_llm), messages="secret words")
    lines = [record.getMessage() for record in caplog.records if record.name == "pearl.serving"]
    assert ["finished" in lines[0], "failed" in lines[1], "refused" in lines[-1]] == [True, True, True]
    assert "output=2" in lines[0]
    assert not any("secret" in line or "answer" in line for line in lines)


def test_characters_that_end_lines_elsewhere_do_not_end_events(idle_llm: LLM) -> None:
    text = 'é\u2028\u2029\x85\n\r\x0b🙂"'
    response = complete(FakeEngine(idle_llm, chunk(text), END), stream=True)
    assert len(response.text.splitlines()) == 6
    assert "é" in response.text
    assert json.loads(events(response)[0])["choices"][0]["text"] == text
