"""How many replicas, where, and how requests find one: what Ray is asked for. Nothing of Ray is imported."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pearl.devices import cpu_cores
from pearl.errors import ConfigurationError
from pearl.user_values import shown

RouterName = Literal["auto", "prefix", "load"]
# Ray's router by prefixes; the public ray.serve.llm, which has it too, does not import without pyarrow and more.
_PREFIX_MODULE = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
_PREFIX_CLASS = "PrefixCacheAffinityRouter"


@dataclass(frozen=True)
class ReplicaPlan:
    """``cpus``: cores of each replica, 0 for this machine's shared among them. ``address``: of a Ray cluster; None
    starts Ray on this machine. ``autoscaling``: Ray's AutoscalingConfig; None: there are always ``replicas``.
    """

    replicas: int = 1
    autoscaling: Mapping[str, Any] | None = None
    router: RouterName = "auto"
    cpus: int = 0
    address: str | None = None

    @property
    def most(self) -> int:
        return self.replicas if self.autoscaling is None else int(self.autoscaling["max_replicas"])


def parse_autoscaling(text: str) -> dict[str, Any]:
    """Of "1,4", the fewest and the most replicas, or of a JSON object with any fields of Ray's AutoscalingConfig.

    Raises ConfigurationError.
    """
    try:
        if text.lstrip().startswith("{"):
            settings = dict(json.loads(text))
        else:
            fewest, most = map(int, text.split(","))
            settings = {"min_replicas": fewest, "max_replicas": most}
        if not 0 <= settings.get("min_replicas", 1) <= settings["max_replicas"] or settings["max_replicas"] < 1:
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"--autoscale takes FEWEST,MOST replicas, or a JSON object of Ray's AutoscalingConfig with max_replicas, "
            f"not {shown(text)}"
        ) from error
    return settings


@dataclass(frozen=True)
class Share:
    """Of one replica: Ray's resources for it, and the engine's options that keep it to them."""

    bundle: dict[str, float]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cpus(self) -> float:
        return self.bundle["CPU"]


def share_of(plan: ReplicaPlan, options: Mapping[str, Any]) -> Share:
    """GPUs where ``options``, an LLM's, ask for any: as many as the target's ranks and the draft need, numbered from 0
    in each replica, as Ray shows them to it. Else cores, which become the engine's threads unless those are given.
    """
    gpus = _gpus(options)
    if gpus:
        return Share({"CPU": plan.cpus or 1, "GPU": gpus})
    cpus = plan.cpus or max(1, cpu_cores() // plan.most)
    threads = {"target_threads": cpus, "draft_threads": max(1, cpus // 4)}
    return Share({"CPU": cpus}, {name: count for name, count in threads.items() if options.get(name) is None})


def _gpus(options: Mapping[str, Any]) -> int:
    """One more than the highest number of a GPU that a replica uses."""
    default = options.get("device", "auto")
    target, draft = (options.get(f"{role}_device") or default for role in ("target", "draft"))
    last_ranks = {target: options.get("target_parallel", 1) - 1}
    return max(_index(name) + last_ranks.get(name, 0) + 1 if _is_gpu(name) else 0 for name in (target, draft))


def _is_gpu(name: str) -> bool:
    return torch.cuda.is_available() if name == "auto" else str(name).startswith("cuda")


def _index(name: str) -> int:
    return int(str(name).partition(":")[2] or 0)


def router_of(plan: ReplicaPlan, at_once: int) -> dict[str, Any]:
    """Ray's RequestRouterConfig; empty: its default, the less loaded of two. ``at_once``: requests of a full batch.

    By prefixes where it can be imported (``auto``), or ConfigurationError (``prefix``).
    """
    if plan.router == "load":
        return {}
    try:
        importlib.import_module(_PREFIX_MODULE)
    except ImportError as error:
        if plan.router == "auto":
            return {}
        raise ConfigurationError(
            f"Ray's router by prefixes cannot be used here: {error}; leave --router out"
        ) from error
    # Without a bound, Ray's default, all that begin alike go to one replica however many wait there.
    kwargs = {"imbalanced_threshold": max(1, at_once // 4), "do_eviction": True}
    return {"request_router_class": f"{_PREFIX_MODULE}:{_PREFIX_CLASS}", "request_router_kwargs": kwargs}
