"""The routes of a server with replicas: what concerns all of them is answered here, the rest by one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, Response

from pearl.serving import errors
from pearl.serving.app import HEALTH, add_guards
from pearl.serving.replicas.fleet import Fleet
from pearl.serving.replicas.replica import State
from pearl.serving.settings import ServerSettings


def create_front(fleet: Fleet, settings: ServerSettings) -> FastAPI:
    app = FastAPI(title="PEARL", openapi_url=None)  # the replicas have the document
    errors.install(app)
    add_guards(app, settings)

    @app.get(HEALTH)
    async def health() -> Response:
        """Green as long as one replica is: the others are replaced."""
        if fleet.draining:
            return JSONResponse({"status": "draining"}, 503)
        states = await fleet.states()
        replicas = [
            {"id": state.id, "pid": state.pid, "ok": state.health.ok, "reason": state.health.reason} for state in states
        ]
        works = any(state.health.ok for state in states)
        return JSONResponse({"status": "ok" if works else "unavailable", "replicas": replicas}, 200 if works else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        registry = CollectorRegistry()
        registry.register(_Collected(await fleet.states(), fleet.retried))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.mount("/", fleet)
    return app


class _Collected:
    """The replicas' series, told apart by their label ``engine``, under one heading each; and the front's own."""

    def __init__(self, states: Sequence[State], retried: int) -> None:
        self._states, self._retried = states, retried

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("pearl:replicas", "Replicas that work", sum(s.health.ok for s in self._states))
        yield CounterMetricFamily("pearl:replica_retries", "Requests given to another replica", self._retried)
        yield from merged(state.exposition.decode() for state in self._states)


def merged(expositions: Iterable[str]) -> list[Metric]:
    """Of several texts in Prometheus' format, whose labels differ."""
    families: dict[str, Metric] = {}
    for exposition in expositions:
        for found in text_string_to_metric_families(exposition):
            families.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            ).samples += found.samples
    return list(families.values())
