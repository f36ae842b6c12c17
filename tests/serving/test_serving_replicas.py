"""The front of several replicas, and the plan that Ray gets, without Ray: replicas that do as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import util
from typing import Any

import httpx
import pytest
from fake_engine import BODY, FakeEngine, ask, chunk
from serving_support import settings

from pearl import LLM
from pearl.cli.app import run as run_pearl
from pearl.errors import ConfigurationError
from pearl.serving.app import create_app
from pearl.serving.event_stream import DONE
from pearl.serving.health import Health
from pearl.serving.replicas import fleet as fleets
from pearl.serving.replicas import plan as plans
from pearl.serving.replicas import replica as replicas
from pearl.serving.replicas.fleet import Fleet, ReplicaLost
from pearl.serving.replicas.front import create_front, merged
from pearl.serving.replicas.plan import ReplicaPlan, parse_autoscaling, router_of, share_of
from pearl.serving.replicas.replica import Forwarded, Part, Replica, State, call
from pearl.serving.sampling import SamplingDefaults

PATH = "/v1/completions"
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"),)
FIRST, SECOND = Part(b"data: 1\n\n", 200, EVENTS), Part(b"data: 2\n\n" + DONE)
LOST = ReplicaLost("gone")
Script = Sequence[Part | Exception]


class FakeParts:
    """Of ``script``, whose end, where ``held``, does not come."""

    def __init__(self, script: Script, held: bool) -> None:
        self._script, self._held = script, held
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Part]:
        for each in self._script:
            await asyncio.sleep(0)
            if isinstance(each, Exception):
                raise each
            yield each
        if self._held:
            await asyncio.sleep(60)

    def cancel(self) -> None:
        self.cancelled = True


class FakeCluster:
    """Each request, and each try of one, gets the next of ``scripts``."""

    def __init__(self, *scripts: Script, held: bool = False) -> None:
        self._scripts, self._held = list(scripts), held
        self.asked: list[Forwarded] = []
        self.given: list[FakeParts] = []
        self.told = [State("a", 1, Health(True), b""), State("b", 2, Health(False, "ill"), b"")]
        self.closed = 0

    def answer(self, request: Forwarded) -> FakeParts:
        self.asked.append(request)
        self.given.append(FakeParts(self._scripts.pop(0), self._held))
        return self.given[-1]

    async def states(self, timeout: float) -> list[State]:
        return self.told

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_PAUSE", 0.0)


def to_front(
    cluster: FakeCluster, *requests: tuple[str, str, dict[str, Any]], server: dict[str, Any] | None = None
) -> list[httpx.Response]:
    """One after the other: (method, path, what httpx sends)."""

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_front(Fleet(cluster), settings(**(server or {}))))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return [await client.request(method, path, **sent) for method, path, sent in requests]

    return asyncio.run(send())


def post(cluster: FakeCluster, **server: Any) -> httpx.Response:
    (response,) = to_front(cluster, ("POST", PATH, {"json": BODY}), server=server)
    return response


def test_a_request_reaches_a_replica_as_it_came() -> None:
    cluster = FakeCluster([FIRST, SECOND])
    (response,) = to_front(cluster, ("POST", f"{PATH}?a=b", {"json": BODY, "headers": {"X-Mine": "yes"}}))
    assert (response.status_code, response.content) == (200, b"data: 1\n\ndata: 2\n\n" + DONE)
    (asked,) = cluster.asked
    assert (asked.method, asked.path, asked.query) == ("POST", PATH, b"a=b")
    assert json.loads(asked.body) == BODY
    assert (b"x-mine", b"yes") in asked.headers


@pytest.mark.parametrize("first", [[LOST], [], [Part(b"{}", 503)]])
def test_what_has_not_begun_goes_to_another_replica(first: Script) -> None:
    """It died, it ended without a word, its engine has ended."""
    cluster = FakeCluster(first, [FIRST, SECOND])
    response, metrics = to_front(cluster, ("POST", PATH, {"json": BODY}), ("GET", "/metrics", {}))
    assert response.content == b"data: 1\n\ndata: 2\n\n" + DONE
    assert cluster.asked[0] is cluster.asked[1]
    assert "pearl:replica_retries_total 1.0" in metrics.text


@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_refusal_is_the_clients_and_no_other_replica_is_asked(status: int) -> None:
    """Of one request: elsewhere it would fail as well, and 429 has its Retry-After."""
    refusal = Part(b'{"error": {}}', status, ((b"content-length", b"13"),))
    cluster = FakeCluster([refusal], [FIRST, SECOND])
    response = post(cluster)
    assert (response.status_code, response.content) == (status, refusal.body)
    assert len(cluster.asked) == 1


@pytest.mark.parametrize(("failure", "code"), [(LOST, "engine_failed"), (ValueError("a bug"), "internal_error")])
def test_what_has_begun_is_told_the_failure_and_not_given_to_another(failure: Exception, code: str) -> None:
    cluster = FakeCluster([FIRST, failure], [FIRST, SECOND])
    response = post(cluster)
    first, error, rest = response.content.split(b"\n\n", 2)
    assert (first, rest) == (b"data: 1", DONE)
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == code
    assert len(cluster.asked) == 1


@pytest.mark.parametrize(
    "whole", [[FIRST, SECOND], [Part(b"{}", 200, ((b"content-type", b"application/json"), (b"content-length", b"2")))]]
)
def test_a_replica_that_dies_behind_a_whole_answer_is_no_failure(whole: list[Part]) -> None:
    response = post(FakeCluster([*whole, LOST]))
    assert response.content == b"".join(part.body for part in whole)


def test_half_an_object_is_not_passed_off_as_one() -> None:
    half = Part(b"{", 200, ((b"content-type", b"application/json"), (b"content-length", b"2")))
    with pytest.raises(RuntimeError, match="already started"):  # the server breaks the connection
        post(FakeCluster([half, LOST]))


def test_a_request_is_given_up_when_no_replica_takes_it() -> None:
    cluster = FakeCluster(*[[LOST]] * 20)
    response = post(cluster)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    assert len(cluster.asked) == 8


def test_health_is_green_as_long_as_one_replica_is() -> None:
    cluster = FakeCluster()
    (some,) = to_front(cluster, ("GET", "/health", {}))
    assert some.status_code == 200
    assert [each["reason"] for each in some.json()["replicas"]] == [None, "ill"]
    for told in (cluster.told[1:], []):
        cluster.told = told
        assert to_front(cluster, ("GET", "/health", {}))[0].status_code == 503


def test_key_and_limit_hold_before_any_replica_is_asked() -> None:
    cluster = FakeCluster()
    assert post(cluster, api_key="k").status_code == 401
    assert post(cluster, max_body=10).status_code == 413
    assert to_front(cluster, ("GET", "/metrics", {}), server={"api_key": "k"})[0].status_code == 401
    assert not cluster.asked


def test_metrics_of_replicas_are_told_apart_under_one_heading(idle_llm: LLM) -> None:
    def exposition(replica: str) -> str:
        return ask(FakeEngine(idle_llm), "GET", "/metrics", {"replica": replica}).text

    families = merged([exposition("one"), exposition("two")])
    assert len({family.name for family in families}) == len(families)
    (running,) = [family for family in families if family.name == "vllm:num_requests_running"]
    assert [sample.labels["engine"] for sample in running.samples] == ["one", "two"]


def directly(fleet: Fleet, sent: list[Any], leaving: asyncio.Event) -> Awaitable[None]:
    """One request by ASGI; the client leaves when ``leaving`` is set."""
    body = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

    async def receive() -> Any:
        if body:
            return body.pop()
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": []}
    return fleet(scope, receive, send)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_client_that_leaves_ends_it_at_the_replica() -> None:
    async def test() -> None:
        cluster, leaving, sent = FakeCluster([FIRST], held=True), asyncio.Event(), list[Any]()
        asking = asyncio.ensure_future(directly(Fleet(cluster), sent, leaving))
        await until(lambda: len(sent) == 2)
        assert not cluster.given[0].cancelled
        leaving.set()
        await asking
        assert cluster.given[0].cancelled
        assert len(sent) == 2

    asyncio.run(asyncio.wait_for(test(), 30))


def test_draining_refuses_what_is_new_and_closing_tells_what_still_runs() -> None:
    async def test() -> None:
        cluster, sent = FakeCluster([FIRST], held=True), list[Any]()
        fleet = Fleet(cluster)
        asking = asyncio.ensure_future(directly(fleet, sent, asyncio.Event()))
        await until(lambda: len(sent) == 2)
        await fleet.drain(0.05)
        assert not asking.done()
        transport = httpx.ASGITransport(create_front(fleet, settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            refused = await client.post(PATH, json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["retry-after"]
            assert (await client.get("/health")).status_code == 503
        await fleet.close()
        await asking
        assert b"the server was closed before this output had ended" in sent[-1]["body"]
        assert sent[-1]["body"].endswith(DONE)
        await fleet.close()
        assert cluster.closed == 1

    asyncio.run(asyncio.wait_for(test(), 30))


def test_an_app_that_is_called_answers_as_over_http(idle_llm: LLM) -> None:
    script = (chunk("a"), chunk("b"), chunk("c", "length"))
    request = Forwarded("POST", PATH, headers=((b"content-type", b"application/json"),), body=json.dumps(BODY).encode())
    whole = ask(FakeEngine(idle_llm, *script), "POST", PATH, json=BODY)
    app = create_app(FakeEngine(idle_llm, *script), settings(), SamplingDefaults.of_openai())  # type: ignore[arg-type]

    async def test() -> list[Part]:
        return [part async for part in call(app, request)]

    first, *rest = asyncio.run(test())
    assert first.status == 200
    assert dict(first.headers)[b"content-type"] == b"application/json"
    got = json.loads(first.body + b"".join(part.body for part in rest))
    assert got["choices"] == whole.json()["choices"]


def test_later_parts_of_a_stream_are_gathered(idle_llm: LLM) -> None:
    """And its end is not waited for longer than it takes to come."""
    engine = FakeEngine(idle_llm, *[chunk("a") for _ in range(30)], chunk("b", "length"))
    app = create_app(engine, settings(), SamplingDefaults.of_openai())  # type: ignore[arg-type]
    body = json.dumps(BODY | {"stream": True}).encode()

    async def test() -> list[Part]:
        request = Forwarded("POST", PATH, headers=((b"content-type", b"application/json"),), body=body)
        return [part async for part in call(app, request)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "_GATHER", 20.0)
        first, *rest = asyncio.run(asyncio.wait_for(test(), 10))
    assert first.body.count(b"data: ") < 5
    assert len(rest) == 1
    assert (first.body + rest[0].body).count(b'"text":"a"') == 30
    assert rest[0].body.endswith(DONE)


def test_who_stops_reading_an_app_is_a_client_that_left(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("a"), endless=True)
    app = create_app(engine, settings(), SamplingDefaults.of_openai())  # type: ignore[arg-type]
    body = json.dumps(BODY | {"stream": True}).encode()

    async def test() -> None:
        parts = call(app, Forwarded("POST", PATH, headers=((b"content-type", b"application/json"),), body=body))
        first = await anext(parts)
        assert b'"text":"a"' in first.body  # with the head: nothing goes out before the first token
        assert not engine.streams[0].cancelled
        await parts.aclose()
        assert engine.streams[0].cancelled

    asyncio.run(asyncio.wait_for(test(), 30))


def test_ray_is_told_of_an_engine_that_cannot_go_on(idle_llm: LLM) -> None:
    replica, engine = Replica.__new__(Replica), FakeEngine(idle_llm)
    replica._engine = engine  # type: ignore[assignment]
    replica.check_health()
    engine.health = Health(False, "ill")
    with pytest.raises(RuntimeError, match="ill"):
        replica.check_health()


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"prompt": "import os"}', "import os"),
        (b'{"prompt": [5, 6]}', "[5, 6]"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', '[{"role": "user", "content": "hi"}]'),
        (b'{"prompt": ""}', PATH),
        (b"[1]", PATH),
        (b"\xff", PATH),
        (b"[" * 100_000, PATH),
        (b"", PATH),
    ],
)
def test_routers_see_how_a_prompt_begins(body: bytes, prompt: str) -> None:
    assert Forwarded("POST", PATH, body=body).prompt == prompt


def test_autoscaling_is_a_range_or_rays_own_settings() -> None:
    assert parse_autoscaling("1,4") == {"min_replicas": 1, "max_replicas": 4}
    assert parse_autoscaling('{"max_replicas": 3, "upscale_delay_s": 2}')["upscale_delay_s"] == 2
    assert ReplicaPlan(autoscaling=parse_autoscaling("1,4")).most == 4
    for wrong in ("4", "3,2", "-1,2", "0,0", "a,b", '{"min_replicas": 1}', "{", '{"max_replicas": "x"}'):
        with pytest.raises(ConfigurationError, match="--autoscale takes"):
            parse_autoscaling(wrong)


def test_cores_are_shared_and_become_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "cpu_cores", lambda: 16)
    cpu = {"device": "cpu", "target_threads": None, "draft_threads": None}
    share = share_of(ReplicaPlan(2), cpu)
    assert (share.bundle, share.options) == ({"CPU": 8}, {"target_threads": 8, "draft_threads": 2})
    assert share_of(ReplicaPlan(2), cpu | {"target_threads": 3}).options == {"draft_threads": 2}
    assert share_of(ReplicaPlan(40), cpu).bundle == {"CPU": 1}
    assert share_of(ReplicaPlan(2, cpus=5), cpu).bundle == {"CPU": 5}


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ({"device": "cuda"}, 1),
        ({"device": "cuda", "target_parallel": 4}, 4),
        ({"device": "cuda", "target_parallel": 4, "draft_device": "cuda:4"}, 5),
        ({"device": "cuda", "draft_device": "cpu"}, 1),
        ({"device": "cpu", "draft_device": "cuda:0"}, 1),
        ({"target_device": "cuda:1", "draft_device": "cuda:0", "target_parallel": 2}, 3),
    ],
)
def test_gpus_are_those_of_the_ranks_and_the_draft(options: dict[str, Any], gpus: int) -> None:
    assert share_of(ReplicaPlan(2), options).bundle == {"CPU": 1, "GPU": gpus}


def test_a_router_that_cannot_be_imported_is_done_without_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans, "_PREFIX_MODULE", "no.such.module")
    assert router_of(ReplicaPlan(2), 64) == router_of(ReplicaPlan(2, router="load"), 64) == {}
    with pytest.raises(ConfigurationError, match="by prefixes cannot be used"):
        router_of(ReplicaPlan(2, router="prefix"), 64)


def test_a_missing_ray_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    assert run_pearl(["serve", "--replicas", "2"]) == 2
    assert "pearl serve needs ray: pip install 'pearl-engine[ray]'" in " ".join(capsys.readouterr().err.split())
