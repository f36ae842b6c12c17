"""A simulation with a round in flight between two steps, and requests for it.

Workers are asynchronous in one thread (``LateWorker``): a model works when its result is asked for, and pages may not
move before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine_requests import request_of
from engine_sim import Simulation, simulate
from simulated_models import expected_output

from pearl.engine.request import Request
from pearl.sampling_params import SamplingParams

Log = list[tuple[str, str]]
PROMPT = [3, 1, 4, 1, 5]
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def overlapping(log: Log | None = None, **options: Any) -> Simulation:
    return simulate(overlaps=True, log=log, **{"accuracy": 0.8, "prefix_caching": False, **options})


def request(request_id: int, params: SamplingParams = LONG) -> Request:
    return request_of(request_id, [*PROMPT, request_id], params.max_tokens, params=params, eos_ids=())


def expected(request_id: int, params: SamplingParams = LONG) -> tuple[list[int], str, str | None]:
    return expected_output([*PROMPT, request_id], params.max_tokens, params)


def stopping(request_id: int, token: int) -> SamplingParams:
    """Ends with the stop string that token number ``token`` of the output completes, and no token before."""
    tokens, _, _ = expected(request_id)
    stop = "".join(f"<{t}>" for t in tokens[token - 2 : token + 1])
    params = replace(LONG, stop=stop)
    assert expected(request_id, params)[0] == tokens[: token + 1]
    return params


def in_flight(simulation: Simulation) -> bool:
    return all(worker.is_busy for worker in simulation.scheduler.workers)


def until_ended(simulation: Simulation, request_id: int) -> None:
    while request_id not in simulation.last or simulation.last[request_id].finish_reason is None:
        simulation.step()
