"""The page at /, and the sources of tokens that it shows."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

import pytest
from fake_engine import BODY, FakeEngine, ask, chunk
from serving_support import PROMPT, LiveServer

from pearl import LLM
from pearl.outputs import RequestMetrics, StreamChunk
from pearl.serving.page_routes import PAGE_PATHS

SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 40}
MESSAGES: Any = [{"role": "user", "content": "def add(a, b):"}]
ROUTES = [("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": MESSAGES})]
FOLDER = files("pearl.serving") / "page"


def streamed(server: LiveServer, path: str, **body: Any) -> list[dict[str, Any]]:
    lines = server.post(path, stream=True, **body).text.split("\n\n")
    return [choice for line in lines if line.startswith("data: {") for choice in json.loads(line[6:])["choices"]]


def named(drafted: list[bool]) -> list[str]:
    return ["draft" if each else "target" for each in drafted]


def text_of(choice: dict[str, Any]) -> str:
    whole: str = choice["text"] if "text" in choice else choice.get("delta", choice.get("message")).get("content", "")
    return whole


@pytest.mark.parametrize("path", PAGE_PATHS)
def test_the_page_is_open_and_its_requests_are_not(idle_llm: LLM, path: str) -> None:
    engine, locked = FakeEngine(idle_llm), {"api_key": "s3cret"}
    response = ask(engine, "GET", path, locked)
    assert response.status_code == 200
    kinds = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert response.headers["content-type"].split(";")[0] == kinds[path.rpartition(".")[2].strip("/")]
    policy = response.headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in policy
    assert not any("unsafe" in rule or "*" in rule for rule in policy)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert ask(engine, "GET", "/v1/models", locked).status_code == 401
    assert path not in ask(engine, "GET", "/openapi.json").json()["paths"]


def test_every_file_of_the_page_is_served_and_every_reference_leads_to_one(idle_llm: LLM) -> None:
    names = {item.name for item in FOLDER.iterdir()}
    assert {"index.html"} | {path.rpartition("/")[2] for path in PAGE_PATHS[1:]} == names
    html = (FOLDER / "index.html").read_text("utf-8")
    references = re.findall(r'(?:href|src)="([^"]+)"', html)
    assert {f"/{reference}" for reference in references} <= set(PAGE_PATHS)
    assert len(references) >= 3
    for name in names:
        if name.endswith(".js"):
            imported = re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text("utf-8"))
            assert set(imported) <= names
    assert ask(FakeEngine(idle_llm), "GET", "/page/../app.py").status_code == 404


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_text() -> None:
    for item in FOLDER.iterdir():
        text = item.read_text("utf-8").replace('"http://www.w3.org/2000/svg"', "")  # a name, no address
        assert not re.search(r"(https?:)?//[\w-]+\.\w|@import|url\(|data:\w+/", text), item.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", text)
        assert not re.search(r"localStorage|document\.cookie", text), "the key stays in the tab"
        assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", text), "the policy forbids it"


@pytest.mark.parametrize(("path", "asked"), ROUTES)
def test_sources_are_what_the_engine_says_of_each_token(server: LiveServer, path: str, asked: Any) -> None:
    """Of a live stream, seen beside the chunks that it was made of."""
    seen: list[StreamChunk] = []
    submit = server.engine.submit

    def submit_and_watch(*given: Any, **options: Any) -> Any:
        return Watched(submit(*given, **options), seen)

    server.engine.submit = submit_and_watch  # type: ignore[method-assign]
    try:
        choices = streamed(server, path, **asked, return_token_sources=True, **SAMPLED)
    finally:
        server.engine.submit = submit  # type: ignore[method-assign]
    told = [choice["token_sources"] for choice in choices if "token_sources" in choice]
    assert told == [named(list(part.drafted)) for part in seen]
    assert {source for sources in told for source in sources} == {"draft", "target"}
    for choice in choices:
        assert "".join(piece["text"] for piece in choice.get("text_sources", [])) == text_of(choice)


class Watched:
    """A stream, and what came out of it."""

    def __init__(self, stream: Any, seen: list[StreamChunk]) -> None:
        self._stream, self._seen = stream, seen

    def __aiter__(self) -> Watched:
        return self

    async def __anext__(self) -> StreamChunk:
        part: StreamChunk = await anext(self._stream)
        self._seen.append(part)
        return part

    def cancel(self) -> None:
        self._stream.cancel()


@pytest.mark.parametrize(("path", "asked"), ROUTES)
def test_a_whole_answer_says_the_same(server: LiveServer, path: str, asked: Any) -> None:
    (choice,) = server.post(path, **asked, return_token_sources=True, return_token_ids=True, **SAMPLED).json()[
        "choices"
    ]
    assert len(choice["token_sources"]) == len(choice["token_ids"])
    assert set(choice["token_sources"]) == {"draft", "target"}
    pieces = choice["text_sources"]
    assert "".join(piece["text"] for piece in pieces) == text_of(choice)
    detokenizer = server.engine.llm.tokenizer.detokenizer(choice["prompt_token_ids"])
    fed = [detokenizer.feed((token,)) for token in choice["token_ids"]]
    texts = zip(fed, choice["token_sources"], strict=True)
    assert [(piece["text"], piece["source"]) for piece in pieces] == [(text, source) for text, source in texts if text]


def test_each_output_has_its_own(server: LiveServer) -> None:
    """Also with an echo before it, which no token of the output gave."""
    asked = {"prompt": [PROMPT, "import os\n"], "n": 2, "return_token_sources": True, **SAMPLED}
    choices = streamed(server, "/v1/completions", **asked)
    plain = server.post("/v1/completions", **asked | {"return_token_sources": False}).json()["choices"]
    assert len(plain) == 4
    for output in plain:
        own = [choice for choice in choices if choice["index"] == output["index"]]
        assert "".join(piece["text"] for choice in own for piece in choice["text_sources"]) == output["text"]
    echoed = server.post("/v1/completions", **asked, echo=True).json()["choices"]
    assert ["".join(piece["text"] for piece in choice["text_sources"]) for choice in echoed] == [
        output["text"] for output in plain
    ]


def test_half_a_character_of_one_output_is_no_others(idle_llm: LLM) -> None:
    *begin, end = idle_llm.encode("\N{SNOWMAN}")
    letter = tuple(idle_llm.encode("a"))
    script = [
        StreamChunk(
            0, "", tuple(begin), (True,) * len(begin), None, RequestMetrics(), sources=("prepared",) * len(begin)
        ),
        StreamChunk(1, "a", letter, (False,), "length", RequestMetrics(), sources=("corrected",)),
        StreamChunk(0, "\N{SNOWMAN}", (end,), (True,), "length", RequestMetrics(), sources=("post-verify",)),
    ]
    body = BODY | {"n": 2, "return_token_sources": True}
    told = ask(FakeEngine(idle_llm, *script), "POST", "/v1/completions", json=body | {"stream": True}).text
    assert '"text_sources":[{"text":"\N{SNOWMAN}","source":"draft","verdict":"post-verify"}]' in told
    whole = ask(FakeEngine(idle_llm, *script), "POST", "/v1/completions", json=body).json()["choices"]
    assert [choice["text_sources"] for choice in whole] == [
        [{"text": "\N{SNOWMAN}", "source": "draft", "verdict": "post-verify"}],
        [{"text": "a", "source": "target", "verdict": "corrected"}],
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", [{}, {"return_token_sources": False}, {"return_token_sources": None}])
def test_sources_are_told_on_request_alone(idle_llm: LLM, stream: bool, wish: dict[str, Any]) -> None:
    body = BODY | {"stream": stream}
    response = ask(FakeEngine(idle_llm, chunk("a", "length")), "POST", "/v1/completions", json=body | wish)
    assert response.status_code == 200
    assert "sources" not in response.text
    asking = body | {"return_token_sources": True}
    told = ask(FakeEngine(idle_llm, chunk("a", "length")), "POST", "/v1/completions", json=asking).text
    piece = '{"text":"a","source":"draft","verdict":"pre-verify"}'
    assert f'"token_sources":["draft"],"text_sources":[{piece}],"token_verdicts":["pre-verify"]' in told
    assert "verdict" not in response.text


def test_tokens_without_text_are_told_of_too(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk(""), chunk("a", "length"))
    told = ask(engine, "POST", "/v1/completions", json=BODY | {"stream": True, "return_token_sources": True}).text
    assert told.count('"token_sources":["draft"]') == 2
    assert '"text_sources":[]' in told


@pytest.mark.parametrize("wrong", ["true", 1, [], {}])
def test_what_is_no_flag_is_refused(idle_llm: LLM, wrong: Any) -> None:
    engine = FakeEngine(idle_llm, chunk("a", "length"))
    for path, asked in ROUTES:
        response = ask(engine, "POST", path, json=asked | {"return_token_sources": wrong})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "return_token_sources"
    assert not engine.asked
