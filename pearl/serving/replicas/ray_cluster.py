"""Replicas under Ray Serve: a deployment without a way in of its own, and a handle to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from pearl.devices import cpu_cores
from pearl.errors import ConfigurationError
from pearl.serving.replicas.fleet import Parts, ReplicaLost
from pearl.serving.replicas.plan import ReplicaPlan, Share, router_of
from pearl.serving.replicas.replica import Forwarded, Part, Replica, State
from pearl.serving.settings import ServerSettings

_NAME = "pearl"
_HEALTH_PERIOD = 2.0  # seconds between Ray's looks at a replica
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}
_LEAVING = 20.0  # seconds that a replica which is taken away has to finish what it answers


class RayCluster:
    def __init__(
        self,
        plan: ReplicaPlan,
        share: Share,
        llm_options: Mapping[str, Any],
        settings: ServerSettings,
        *,
        model_defaults: bool,
        round_limit: float | None,
    ) -> None:
        """Starts Ray, or joins it, and the replicas; returns when they are loaded. Raises ConfigurationError."""
        at_once, waiting = llm_options["max_num_seqs"], llm_options["max_waiting"]
        placed = {"placement_group_bundles": [share.bundle]} if "GPU" in share.bundle else {}
        try:
            deployment = serve.deployment(Replica).options(
                name="Replica",
                num_replicas=None if plan.autoscaling else plan.replicas,
                autoscaling_config=_autoscaling(plan, at_once),
                request_router_config=router_of(plan, at_once),
                ray_actor_options={f"num_{name.lower()}s": count for name, count in share.bundle.items()},
                max_ongoing_requests=at_once + waiting,  # what is too much the engine refuses, with status 429
                health_check_period_s=_HEALTH_PERIOD,
                graceful_shutdown_timeout_s=_LEAVING,
                logging_config=_LOGGING,
                **placed,
            )
        except ValueError as error:
            raise ConfigurationError(f"Ray cannot do that: {error}") from error
        self._begin(plan, share)
        try:
            serve.start(proxy_location="Disabled", logging_config=_LOGGING)
            bound = deployment.bind(dict(llm_options) | share.options, settings, model_defaults, round_limit)
            self._handle = serve.run(bound, name=_NAME, route_prefix=None)
        except RuntimeError as error:
            self._end()
            raise ConfigurationError(f"the replicas do not start: {error}; their logs have more") from error
        except BaseException:
            self._end()
            raise
        self._answers = self._handle.options(method_name="answer", stream=True)

    def _begin(self, plan: ReplicaPlan, share: Share) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        options: dict[str, Any] = {"address": plan.address}
        if plan.address is None:
            cpus = max(cpu_cores(), int(plan.most * share.cpus))
            options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(**options, namespace="serve", logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigurationError(f"Ray does not start, or is not at {plan.address!r}: {error}") from error

    def answer(self, request: Forwarded) -> Parts:
        return _RayParts(self._answers.remote(request))

    async def states(self, timeout: float) -> list[State]:
        try:
            told = await self._handle.broadcast("state").results_async(timeout_s=timeout, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return []
        return sorted(state for state in told if isinstance(state, State))

    async def close(self) -> None:
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        with contextlib.suppress(RayError, RayServeException):
            serve.delete(_NAME)
        serve.shutdown()
        ray.shutdown()


class _RayParts:
    def __init__(self, generator: Any) -> None:
        self._generator = generator

    async def __aiter__(self) -> AsyncIterator[Part]:
        try:
            async for part in self._generator:
                yield part
        except RayTaskError:  # of our own code: that is no death
            raise
        except (RayError, RayServeException) as error:
            raise ReplicaLost(f"the replica that was working on this ended: {type(error).__name__}") from error

    def cancel(self) -> None:
        self._generator.cancel()


def _autoscaling(plan: ReplicaPlan, at_once: int) -> dict[str, Any] | None:
    """Ray's own target, two requests a replica, would never let a batch grow."""
    if plan.autoscaling is None:
        return None
    return {"target_ongoing_requests": max(1, at_once // 2), **plan.autoscaling}
