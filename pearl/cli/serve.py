"""``pearl serve``: an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import typer

from pearl.cli.grouping import spread
from pearl.cli.options import EngineOptions, OutputOptions, parse_size
from pearl.cli.terminal import Terminal
from pearl.errors import ConfigurationError

_server = partial(typer.Option, rich_help_panel="Server")
_load = partial(typer.Option, rich_help_panel="Load")
_replicas = partial(typer.Option, rich_help_panel="Replicas")
_BUNDLED = "pearl-bundled"
_EXTRA = ("fastapi", "prometheus_client", "pydantic", "uvicorn")


@dataclass(frozen=True)
class ServerOptions:
    """Where it listens, and to whom."""

    host: Annotated[str, _server(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, _server(min=0, max=65535, help="0: any that is free.")] = 8000
    api_key: Annotated[
        str | None, _server(envvar="PEARL_API_KEY", show_default=False, help="Clients must send it, but for /health.")
    ] = None
    served_model_name: Annotated[
        list[str] | None, _server(help="Name in the API; may be repeated. Default: the target as given.")
    ] = None
    allow_origin: Annotated[
        list[str] | None, _server(help="Web page that may ask from a browser (CORS), or '*'; may be repeated.")
    ] = None
    max_body: Annotated[str, _server(metavar="SIZE", help="Largest body of a request.")] = "16M"
    generation_config: Annotated[
        Literal["auto", "none"], _server(help="Sampling defaults: auto, the target's own; none, OpenAI's.")
    ] = "auto"
    tool_call_parser: Annotated[
        Literal["auto", "hermes", "llama3_json", "none"],
        _server(help="How the model writes calls of tools; auto: by its chat template."),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "think", "none"],
        _server(help="think: what is between <think> and </think> is reasoning; auto: if the model has these tags."),
    ] = "auto"
    drain_timeout: Annotated[
        float | None, _server(min=0, help="Seconds that SIGTERM leaves to what runs. Default: all that it takes.")
    ] = None
    round_limit: Annotated[float | None, _server(help="A round of more seconds turns /health red. Default: none.")] = (
        None
    )


@dataclass(frozen=True)
class LoadOptions:
    """How much at a time."""

    max_num_seqs: Annotated[int, _load(help="Outputs that are generated at once.")] = 64
    max_waiting: Annotated[int, _load(help="Outputs that may wait; more are refused with status 429.")] = 1024
    max_num_batched_tokens: Annotated[int, _load(help="Most tokens of a forward; longer prompts go in pieces.")] = 512
    prefix_caching: Annotated[bool, _load(help="Keep the KV of prompts for others that begin alike.")] = True
    capture_seconds: Annotated[int, _load(help="On CUDA: how long the start may take to capture graphs.")] = 10
    seed: Annotated[int | None, _load(help="Of requests without one. Default: a fresh one for each.")] = None


@dataclass(frozen=True)
class ReplicaOptions:
    """Several engines behind one address, under Ray Serve."""

    replicas: Annotated[int, _replicas(min=1, help="Engines, each in its own process, under Ray Serve.")] = 1
    autoscale: Annotated[
        str | None,
        _replicas(metavar="FEWEST,MOST", help="As many as the load needs; or JSON, Ray's AutoscalingConfig."),
    ] = None
    router: Annotated[
        Literal["auto", "prefix", "load"],
        _replicas(help="prefix: to the replica that has seen the prompt's beginning. load: to the less loaded of two."),
    ] = "auto"
    replica_cpus: Annotated[
        int, _replicas(min=0, help="Cores of each; 0: on CPU, this machine's shared among them.")
    ] = 0
    ray_address: Annotated[
        str | None, _replicas(help="A running Ray cluster's, or auto. Default: Ray is started here.")
    ] = None

    @property
    def wanted(self) -> bool:
        return self.replicas > 1 or self.autoscale is not None or self.ray_address is not None


@spread
def serve(
    *,
    engine: EngineOptions,
    server: ServerOptions,
    load: LoadOptions,
    several: ReplicaOptions,
    output: OutputOptions,
) -> None:
    """Serve the models to clients of OpenAI's API.

    SIGTERM and Ctrl-C let it finish what runs and then leave with status 0; a second one ends it at once.
    """
    if server.api_key is not None and not server.api_key.strip():
        raise ConfigurationError("the API key (--api-key, PEARL_API_KEY) is empty; give one, or unset it")
    max_body = parse_size(server.max_body)
    require_extra("serve", _EXTRA)
    from pearl.serving.settings import ServerSettings

    names = tuple(server.served_model_name or [engine.target or _BUNDLED])
    settings = ServerSettings(
        names, server.api_key, tuple(server.allow_origin or ()), max_body,
        tool_parser=server.tool_call_parser, reasoning_parser=server.reasoning_parser,
    )  # fmt: skip
    terminal = Terminal.open(output.no_color)
    run = _runner_of(several)
    run(
        terminal.note,
        (server.host, server.port),
        engine.keywords() | vars(load),
        settings,
        model_defaults=server.generation_config == "auto",
        drain_timeout=server.drain_timeout,
        round_limit=server.round_limit,
    )


def _runner_of(several: ReplicaOptions) -> Callable[..., None]:
    """What serves: one engine, or a front of replicas. ConfigurationError."""
    if not several.wanted:
        from pearl.serving.program import run_server

        return run_server
    require_extra("ray", ("ray",))
    from pearl.serving.replicas.plan import ReplicaPlan, parse_autoscaling
    from pearl.serving.replicas.program import run_replicas

    scaling = None if several.autoscale is None else parse_autoscaling(several.autoscale)
    plan = ReplicaPlan(several.replicas, scaling, several.router, several.replica_cpus, several.ray_address)
    return partial(run_replicas, plan=plan)


def require_extra(name: str, modules: Sequence[str]) -> None:
    """ConfigurationError names what is not installed of ``modules``, which the extra ``name`` has."""
    from importlib.util import find_spec

    if missing := [module for module in modules if find_spec(module) is None]:
        raise ConfigurationError(f"pearl serve needs {', '.join(missing)}: pip install 'pearl-engine[{name}]'")
