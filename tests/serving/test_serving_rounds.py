"""What a stream tells of its rounds, and of its tokens' verdicts: seen beside the engine's own records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_engine import BODY, FakeEngine, ask, chunk
from serving_support import PROMPT, LiveServer, live_server, wait_until

from pearl import LLM
from pearl.engine.rounds import RoundRecord
from pearl.outputs import OutputDelta, RequestMetrics, TokenSource
from pearl.serving.async_stream import Mailbox
from pearl.serving.round_log import RoundLog

ASKING: dict[str, Any] = {"return_rounds": True, "return_token_sources": True, "temperature": 0, "max_tokens": 60}
ROUTES = [
    ("/v1/completions", {"prompt": PROMPT}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "def add(a, b):"}]}),
]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(prepared_windows=3) as running:
        yield running


def events(server: LiveServer, path: str, **body: Any) -> list[dict[str, Any]]:
    lines = server.post(path, stream=True, **body).text.split("\n\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def all_rounds(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for event in told for entry in event.get("rounds", [])]


def verdicts(told: list[dict[str, Any]]) -> list[str]:
    return [verdict for event in told for choice in event["choices"] for verdict in choice.get("token_verdicts", [])]


@pytest.mark.parametrize(("path", "asked"), ROUTES)
def test_rounds_are_what_the_engine_records(server: LiveServer, path: str, asked: Any) -> None:
    records: list[RoundRecord] = []
    server.engine.observe(records.append)
    told = events(server, path, **asked, **ASKING)
    server.engine.forget(records.append)
    told_rounds = all_rounds(told)
    assert len(told_rounds) == len(records)
    for entry, record in zip(told_rounds, records, strict=True):
        decisions = list(record.result.decisions.values())
        assert entry["mode"] == record.plan.pace.mode  # type: ignore[union-attr]
        assert entry["drafted"] == sum(map(len, record.result.windows.values()))
        assert entry["tested"] == sum(len(d.tested) for d in decisions)
        assert entry["accepted"] == sum(d.accepted for d in decisions)
        assert entry["committed"] == sum(len(d.committed) for d in decisions)
        for busy, forward in ((record.target, entry["target"]), (record.proposal.busy, entry["draft"])):
            assert (forward is None) == (not busy.seconds)
            assert forward is None or forward["ms"] == pytest.approx(1000 * busy.seconds, abs=0.001)
        branches = [branch for item in record.plan.draft.work for branch in item.branches]
        assert entry.get("prepared", 0) == len(branches)
    begins = [entry["target"]["begin"] for entry in told_rounds if entry["target"]]
    assert begins == sorted(begins)
    assert begins[0] >= 0
    assert begins[-1] < 60_000


def test_a_chunk_has_the_rounds_that_its_tokens_come_from(server: LiveServer) -> None:
    told = events(server, "/v1/completions", prompt=PROMPT, **ASKING)
    for event in told[:-1]:
        tokens = len(event["choices"][0]["token_sources"])
        assert tokens == sum(entry["committed"] for entry in event["rounds"])
    last = told[-1]  # where the output ended
    assert len(last["choices"][0]["token_sources"]) <= sum(entry["committed"] for entry in last["rounds"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pending_tokens_are_those_of_the_rounds_before(server: LiveServer, temperature: float) -> None:
    """So that who draws the rounds can tell what became of each window."""
    wish = ASKING | {"temperature": temperature, "seed": 3, "max_tokens": 200}
    told = all_rounds(events(server, "/v1/completions", prompt=PROMPT, **wish))
    pending, hits = 0, 0
    for entry in told:
        window, tested, accepted = entry["drafted"], entry["tested"], entry["accepted"]
        if not tested and not entry["committed"]:
            pending += window
            continue
        assert entry["pending"] == pending
        if accepted < tested:
            pending = entry.get("hit_tokens", 0)
        else:
            pending = pending + window - accepted if entry["committed"] == accepted else 0
        hits += "hit_tokens" in entry and entry["hit_tokens"] > 0
        assert entry.get("hit_tokens", 0) <= entry.get("prepared_tokens", 0)
    assert hits


def test_verdicts_tell_every_way_that_a_token_came(server: LiveServer) -> None:
    told = events(server, "/v1/completions", prompt=PROMPT, **ASKING | {"max_tokens": 250})
    rounds, found = all_rounds(told), verdicts(told)
    sources = [source for event in told for source in event["choices"][0]["token_sources"]]
    assert [v in ("pre-verify", "post-verify", "prepared") for v in found] == [s == "draft" for s in sources]
    expected: list[str] = []
    ahead = 0
    for entry in rounds:
        if not entry["committed"]:
            continue
        accepted = entry["accepted"]
        prepared = min(accepted, ahead)
        expected += ["prepared"] * prepared + ["post-verify" if entry["pending"] else "pre-verify"] * (
            accepted - prepared
        )
        if entry["committed"] > accepted:
            expected.append("corrected" if accepted < entry["tested"] else "plain")
        ahead = entry.get("hit_tokens", 0)
    assert found == expected[: len(found)]
    assert {"pre-verify", "post-verify", "prepared", "corrected"} <= Counter(found).keys()


def test_without_drafting_every_token_is_plain_and_the_same(server: LiveServer) -> None:
    drafted = events(server, "/v1/completions", prompt=PROMPT, return_token_ids=True, **ASKING)
    plain = events(server, "/v1/completions", prompt=PROMPT, return_token_ids=True, draft=False, **ASKING)
    ids = [[token for event in told for token in event["choices"][0]["token_ids"]] for told in (drafted, plain)]
    assert ids[0] == ids[1]
    assert set(verdicts(plain)) == {"plain"}
    rounds = all_rounds(plain)
    assert all(
        entry["draft"] is None and not entry["drafted"] and entry["mode"] == "autoregressive" for entry in rounds
    )
    assert sum(entry["committed"] for entry in rounds) == len(ids[1])


def test_several_outputs_and_a_whole_answer(server: LiveServer) -> None:
    """Of the request's own outputs only, whatever runs beside them."""
    answer = server.post("/v1/completions", prompt=[PROMPT, "import os\n"], n=2, **ASKING | {"max_tokens": 12}).json()
    assert sum(entry["committed"] for entry in answer["rounds"]) >= 4 * 12
    records: list[RoundRecord] = []
    server.engine.observe(records.append)
    body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "temperature": 1}
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(server.post, "/v1/completions", **body)
        wait_until(lambda: bool(server.engine.load.running))
        answer = server.post("/v1/completions", prompt=PROMPT, **ASKING | {"max_tokens": 12}).json()
        assert beside.result().status_code == 200
    server.engine.forget(records.append)
    assert any(len(record.result.decisions) == 2 for record in records)
    assert 12 <= sum(entry["committed"] for entry in answer["rounds"]) <= 12 + 4


def test_nobody_looks_on_once_the_answer_has_ended(server: LiveServer) -> None:
    before = server.engine._observers._observers
    events(server, "/v1/completions", prompt=PROMPT, **ASKING)
    assert server.engine._observers._observers == before
    with server.http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "stream": True, **ASKING}) as answer:
        next(answer.iter_lines())
    wait_until(lambda: server.engine._observers._observers == before)
    assert server.post("/v1/completions", prompt=PROMPT, **ASKING | {"top_p": 2}).status_code == 400
    assert server.engine._observers._observers == before


def test_verdicts_of_what_nobody_has_read_yet_are_joined() -> None:
    request: Any = SimpleNamespace(id=5)
    mailbox = Mailbox([request])
    metrics = RequestMetrics()
    for token, source in enumerate(("pre-verify", "corrected", "plain")):
        delta = OutputDelta(5, (token,), (not token,), "x", None, None, metrics, sources=(cast(TokenSource, source),))
        mailbox.receive(delta)
    assert mailbox.take().sources == ("pre-verify", "corrected", "plain")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", [{}, {"return_rounds": False}, {"return_rounds": None}])
def test_rounds_are_told_on_request_alone(idle_llm: LLM, stream: bool, wish: dict[str, Any]) -> None:
    engine = FakeEngine(idle_llm, chunk("a", "length"))
    response = ask(engine, "POST", "/v1/completions", json=BODY | {"stream": stream} | wish)
    assert response.status_code == 200
    assert "rounds" not in response.text
    assert not any(isinstance(each, RoundLog) for each in engine.observers)
    ((_, params),) = engine.asked
    assert not params.token_sources


@pytest.mark.parametrize("name", ["draft", "return_rounds"])
@pytest.mark.parametrize("wrong", ["true", 1, [], {}])
def test_what_is_no_flag_is_refused(idle_llm: LLM, name: str, wrong: Any) -> None:
    response = ask(FakeEngine(idle_llm), "POST", "/v1/completions", json=BODY | {name: wrong})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
