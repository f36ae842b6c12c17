"""Memory of devices: how much is free, how much a call takes, and what to say when it is too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from pearl.config import EngineConfig, Role
from pearl.errors import ConfigurationError
from pearl.heads import HeadConfig
from pearl.models import KVCache, ModelConfig, ModelShape
from pearl.models.sharding import shard
from pearl.models.weight_size import weight_bytes

_ADVICE = (
    "choose a smaller model or dtype, place a model elsewhere (draft_device=, target_device=, target_parallel=), or "
    "end what else uses the GPU"
)


class MemoryMeter(Protocol):
    """What is asked about a GPU's memory; tests answer with numbers of their own."""

    def free_bytes(self, device: torch.device) -> int:
        """What new tensors may take: the driver's free memory, and what torch's allocator holds unused."""
        ...

    def total_bytes(self, device: torch.device) -> int: ...

    def peak_bytes(self, device: torch.device, prepare: Callable[[], Callable[[], object]]) -> int:
        """The most that the call which ``prepare`` returns allocates at any time, beyond what it was made of."""
        ...


class CudaMeter:
    """Asks the driver and torch's allocator."""

    def free_bytes(self, device: torch.device) -> int:
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def total_bytes(self, device: torch.device) -> int:
        return int(torch.cuda.mem_get_info(device)[1])

    def peak_bytes(self, device: torch.device, prepare: Callable[[], Callable[[], object]]) -> int:
        with torch.cuda.device(device):
            call = prepare()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            peak: int = torch.cuda.max_memory_allocated() - before
            del call
            # What the allocator keeps of it belongs to this stream; the workers compute in others.
            torch.cuda.empty_cache()
        return peak


@dataclass(frozen=True)
class Share:
    """What one model, or one rank of it, takes of its device. ``name`` is what errors call it."""

    name: str
    device: torch.device
    config: ModelShape  # the rank's own shape
    vocab_size: int  # the whole model's: logits are whole on every rank
    dtype: torch.dtype
    weight_bytes: int
    page_bytes: int  # of one KV page
    hidden_bytes: int = 0  # of a head: what it reads of each of the target's tokens

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Shares:
    """``target``: one for each rank."""

    draft: Share | None
    target: tuple[Share, ...]

    @property
    def all(self) -> tuple[Share, ...]:
        return (self.draft, *self.target) if self.draft else self.target


def shares_of(
    config: EngineConfig, target: ModelShape, draft: ModelShape | None, head: HeadConfig | None = None
) -> Shares:
    """``head``: in the place of a draft model. Raises ConfigurationError if the target cannot be cut for its ranks."""
    devices = config.resolve_target_devices()
    ranks = tuple(
        _share(config, _rank_name(config, rank), device, target, rank, len(devices))
        for rank, device in enumerate(devices)
    )
    if head is not None:
        return Shares(_share_of_head(config, head), ranks)
    if draft is None:
        return Shares(None, ranks)
    return Shares(_share(config, _name("draft", config.draft), config.resolve_device("draft"), draft, 0, 1), ranks)


def _name(role: Role, path: str | None) -> str:
    return f"{role} {path!r}" if path else role


def _rank_name(config: EngineConfig, rank: int) -> str:
    name = _name("target", config.target)
    return name if config.target_parallel == 1 else f"rank {rank} of the {name}"


def _share(
    config: EngineConfig, name: str, device: torch.device, model: ModelShape, rank: int, ranks: int
) -> Share:  # fmt: skip
    dtype = config.torch_dtype or model.dtype
    local = shard(model, rank, ranks).config if isinstance(model, ModelConfig) else model
    page_bytes = KVCache.bytes_per_token(local, dtype) * config.page_size
    return Share(
        name, device, local, model.vocab_size, dtype, weight_bytes(model, dtype, rank, ranks, device.type), page_bytes
    )


def _share_of_head(config: EngineConfig, head: HeadConfig) -> Share:
    shape = head.shape
    page_bytes = KVCache.bytes_per_token(shape, shape.dtype) * config.page_size
    return Share(
        _name("draft", config.draft),
        config.resolve_device("draft"),
        shape,
        shape.vocab_size,
        shape.dtype,
        head.elements * shape.dtype.itemsize,
        page_bytes,
        len(head.hidden_layers) * head.target_hidden * shape.dtype.itemsize,
    )


def by_gpu(shares: Sequence[Share]) -> dict[torch.device, list[Share]]:
    """The shares of each GPU, in the order in which they are loaded."""
    groups: dict[torch.device, list[Share]] = {}
    for share in shares:
        if share.on_gpu:
            groups.setdefault(share.device, []).append(share)
    return groups


def require_room_for_weights(shares: Shares, meter: MemoryMeter) -> None:
    """Refuse, before any weight is read, what the GPUs cannot hold. Memory of CPUs is not counted."""
    for device, group in by_gpu(shares.all).items():
        free, taken = meter.free_bytes(device), 0
        for share in group:
            if taken + share.weight_bytes > free:
                beside = f" beside {gib(taken)} of weights before it" if taken else ""
                raise does_not_fit(share, _weights(share) + beside, free)
            taken += share.weight_bytes


@contextmanager
def explaining_out_of_memory(
    share: Share, meter: MemoryMeter, reason: str | None = None, advice: str = _ADVICE
) -> Iterator[None]:
    """Around what allocates for ``share``: torch's out-of-memory error becomes a ConfigurationError.

    ``reason``: what needs the memory; None: the weights.
    """
    free = meter.free_bytes(share.device) if share.on_gpu else 0
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise does_not_fit(share, reason or _weights(share), free, advice) from error


def does_not_fit(share: Share, reason: str, free: int, advice: str = _ADVICE) -> ConfigurationError:
    return ConfigurationError(
        f"the {share.name} does not fit on {share.device}: {reason}, {gib(free)} are free; {advice}"
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _weights(share: Share) -> str:
    return f"its weights need {gib(share.weight_bytes)}"
