"""A server with replicas from its beginning to its end: what ``pearl serve --replicas`` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pearl.serving.listening import ServerProcess, bound_socket, url_of
from pearl.serving.program import begin_log, sampling_defaults
from pearl.serving.replicas.fleet import Fleet
from pearl.serving.replicas.front import create_front
from pearl.serving.replicas.plan import ReplicaPlan, share_of
from pearl.serving.settings import ServerSettings


def run_replicas(
    tell: Callable[[str], None],
    address: tuple[str, int],
    llm_options: Mapping[str, Any],
    settings: ServerSettings,
    plan: ReplicaPlan,
    *,
    model_defaults: bool,
    drain_timeout: float | None = None,
    round_limit: float | None = None,
) -> None:
    """As ``pearl.serving.program.run_server``, with a plan for the replicas; its process is their front."""
    begin_log()
    with bound_socket(*address) as opened:
        sampling_defaults(llm_options, model_defaults)  # what is wrong with them is told before anything starts
        tell("starting Ray" if plan.address is None else f"joining Ray at {plan.address}")
        from pearl.serving.replicas.ray_cluster import RayCluster

        tell("loading the models of each replica")
        cluster = RayCluster(
            plan, share_of(plan, llm_options), llm_options, settings, model_defaults=model_defaults,
            round_limit=round_limit,
        )  # fmt: skip

        begin_log(anew=True)  # Ray has made it its own

        def listening() -> None:
            tell(f"listening on {url_of(opened)}, model {settings.name}")

        fleet = Fleet(cluster)
        ServerProcess(create_front(fleet, settings), fleet, listening, drain_timeout).run([opened])
