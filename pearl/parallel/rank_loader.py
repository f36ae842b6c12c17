"""Loads one rank's part of a model, the same way in the engine's process and in the others."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from pearl.models import Decoder, KVCache, ModelConfig, load_model
from pearl.models.collective import Collective, Group
from pearl.models.sharding import shard
from pearl.parallel.messages import RankSpec
from pearl_kernels import Situation, select

_HOST = "127.0.0.1"  # all ranks are processes of one machine
_MEETING = timedelta(minutes=2)  # a rank that has not joined by then is lost
_EXCHANGE = timedelta(minutes=10)


def host_store() -> dist.TCPStore:  # type: ignore[name-defined]
    """The ranks' meeting point, on a port that the system chose."""
    return dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=_MEETING)  # type: ignore[attr-defined]


def open_store(port: int) -> dist.TCPStore:  # type: ignore[name-defined]
    return dist.TCPStore(_HOST, port, is_master=False, timeout=_MEETING)  # type: ignore[attr-defined]


def join(spec: RankSpec, store: dist.TCPStore) -> Group:  # type: ignore[name-defined]
    """Meet the other ranks: gloo between CPUs, NCCL between GPUs. The group is this model's own, no default is set."""
    if torch.device(spec.device).type == "cuda":
        return cast(Group, dist.ProcessGroupNCCL(store, spec.rank, spec.ranks, dist.ProcessGroupNCCL.Options()))
    return cast(Group, dist.ProcessGroupGloo(store, spec.rank, spec.ranks, _EXCHANGE))


def load_rank(spec: RankSpec, group: Group) -> tuple[Decoder, KVCache]:
    """The rank's weights and KV tensors. Raises what ``load_model`` and ``shard`` raise."""
    whole = ModelConfig.from_pretrained(spec.path, spec.dtype)
    sharding = shard(whole, spec.rank, spec.ranks)
    device = torch.device(spec.device)
    kernels = select(
        Situation(device.type, spec.dtype, whole.head_dim, spec.threads, spec.page_size, sinks=whole.sinks)
    )
    with torch.inference_mode():
        model = load_model(
            spec.path,
            device=device,
            dtype=spec.dtype,
            max_model_len=spec.max_model_len,
            kernels=kernels,
            sharding=sharding,
            collective=Collective(group, whole.vocab_size),
        )
        cache = KVCache.allocate(sharding.config, spec.num_pages, spec.page_size, spec.dtype, device)
    return model, cache
