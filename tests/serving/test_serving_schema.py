"""What schemathesis makes of the app's OpenAPI document, right and wrong: never a server error, always a documented
status, and refusals in OpenAI's shape. PEARL_EXAMPLES: of each kind, for each route, where there is time for more.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from fake_engine import FakeEngine, chunk
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from serving_support import settings as server_settings

from pearl import LLM
from pearl.serving.app import create_app
from pearl.serving.sampling import SamplingDefaults

_EXAMPLES = settings(
    max_examples=int(os.environ.get("PEARL_EXAMPLES", "5")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


def test_no_request_is_a_server_error(idle_llm: LLM) -> None:
    engine: Any = FakeEngine(idle_llm, chunk("a", "length"))
    app = create_app(engine, server_settings(), SamplingDefaults.of_openai())
    statuses: set[int] = set()

    def check(case: schemathesis.Case) -> None:
        response = case.call()
        statuses.add(response.status_code)
        documented = case.operation.definition.raw["responses"]
        assert str(response.status_code) in documented or response.status_code == 405
        if response.status_code >= 400 and case.path != "/health":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.status_code < 500

    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = found.ok()
        wrong = list(operation.body)  # without a body there is nothing to get wrong
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if wrong else (GenerationMode.POSITIVE,):
            _EXAMPLES(given(case=operation.as_strategy(generation_mode=mode))(check))()
    assert {200, 400, 404} <= statuses
