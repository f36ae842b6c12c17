"""How many KV pages both models get: the same number, so that neither runs out before the other.

On CPUs, and where ``kv_cache_memory`` says it, both models' pages are paid from one sum. On GPUs each device pays for
the models on it from what they leave:

    free - working sets - MARGIN_BYTES * models - MARGIN_SHARE * total

Free is asked for when the weights are loaded; a working set is what forwards of the largest size allocated, and what a
verdict keeps (``profiling``). A tensor-parallel target's ranks make their caches while they load, each in its own
process: its weights and its working set are estimated from its shape before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pearl.config import EngineConfig
from pearl.engine.memory import MemoryMeter, Share, Shares, by_gpu
from pearl.engine.profiling import Largest, estimated_bytes, measured_bytes, verdict_bytes
from pearl.errors import ConfigurationError
from pearl.models import CausalModel

DEFAULT_BYTES = 1 << 30
# Kept free for each model: its graphs' nodes, cuBLAS's workspaces of its stream and of its graphs (32 MiB each on
# Hopper), kernels that are loaded when first used. A guess: no GPU has been measured;
MARGIN_BYTES = 512 << 20
# and once, of the whole memory, a part for what the allocator cannot use, in rounding and between blocks.
MARGIN_SHARE = 0.04
# A rank that is not there yet: the CUDA context of its process, its kernels and NCCL's buffers.
RANK_BYTES = 1 << 30


@dataclass(frozen=True)
class Purse:
    """Bytes for the KV of some models. ``holder`` and ``remedy`` are for errors: who has them, how to get more."""

    holder: str
    bytes: int
    page_bytes: int  # of one page of all these models
    remedy: str

    @property
    def pages(self) -> int:
        return max(0, self.bytes) // self.page_bytes


def require_one_sequence(config: EngineConfig, shares: Shares, max_model_len: int, meter: MemoryMeter) -> None:
    """Refuse, before any weight is read, what could not hold one sequence of max_model_len tokens afterwards.

    Raises ConfigurationError. What forwards take of a GPU is not known yet and not counted; ``decide_pages`` does.
    """
    purses = _given_purses(config, shares, max_model_len)
    if purses is None:
        working = {share: share.weight_bytes + _kept(config, shares, share) for share in shares.all if share.on_gpu}
        purses = _purses(shares, working, meter, "weights")
    count_pages(config, purses, max_model_len)


def decide_pages(
    config: EngineConfig,
    shares: Shares,
    target: CausalModel | None,
    draft: CausalModel | None,
    max_model_len: int,
    meter: MemoryMeter,
) -> int:
    """Pages of each model, when the weights are where they belong. ``target``: None if its ranks are still to load.

    ConfigurationError if a device cannot hold one sequence of max_model_len tokens.
    """
    purses = _given_purses(config, shares, max_model_len)
    if purses is None:
        working = _working_sets(config, shares, target, draft, max_model_len, meter)
        purses = _purses(shares, working, meter, "weights and forwards")
    return count_pages(config, purses, max_model_len)


def count_pages(config: EngineConfig, purses: Sequence[Purse], max_model_len: int) -> int:
    """What the tightest purse pays, at most room for max_num_seqs full sequences; ConfigurationError if not one."""
    pages_per_sequence = _pages_per_sequence(config, max_model_len)
    tightest = min(purses, key=lambda purse: purse.pages)
    if tightest.pages < pages_per_sequence:
        longest = tightest.pages * config.page_size
        lower = f"lower max_model_len to at most {longest}" if longest else "no max_model_len is short enough"
        needed = pages_per_sequence * tightest.page_bytes
        raise ConfigurationError(
            f"one sequence of {max_model_len} tokens needs {_mib(needed)} of KV cache, "
            f"{tightest.holder} {_mib(max(0, tightest.bytes))}; {tightest.remedy}, or {lower}"
        )
    return min(tightest.pages, pages_per_sequence * config.max_num_seqs)


def _given_purses(config: EngineConfig, shares: Shares, max_model_len: int) -> list[Purse] | None:
    """One sum for both models, where it is known without looking at a device."""
    page_bytes = sum(share.page_bytes for share in shares.all)
    if config.kv_cache_memory:
        return [Purse("kv_cache_memory allows", config.kv_cache_memory, page_bytes, "raise it")]
    if by_gpu(shares.all):
        return None
    remedy = f"give kv_cache_memory={_pages_per_sequence(config, max_model_len) * page_bytes} or more"
    return [Purse("the default on cpu is", DEFAULT_BYTES, page_bytes, remedy)]


def _pages_per_sequence(config: EngineConfig, max_model_len: int) -> int:
    return -(-max_model_len // config.page_size)


def _working_sets(
    config: EngineConfig,
    shares: Shares,
    target: CausalModel | None,
    draft: CausalModel | None,
    max_model_len: int,
    meter: MemoryMeter,
) -> dict[Share, int]:
    """What each share on a GPU needs beside KV and the weights that are there."""
    working = {}
    if shares.draft is not None and shares.draft.on_gpu:
        largest = Largest.of(config, "draft", max_model_len)
        forward = (
            measured_bytes(config, draft, shares.draft, largest, meter)
            if draft is not None
            # A head's, which is loaded after a target's ranks.
            else estimated_bytes(config, shares.draft, largest) + (shares.draft.weight_bytes if target is None else 0)
        )
        working[shares.draft] = forward + _kept(config, shares, shares.draft)
    largest = Largest.of(config, "target", max_model_len)
    for share in shares.target:
        if share.on_gpu:
            forward = (
                measured_bytes(config, target, share, largest, meter)
                if target is not None
                else estimated_bytes(config, share, largest) + share.weight_bytes + RANK_BYTES
            )
            read = 0 if shares.draft is None else 2 * largest.tokens * shares.draft.hidden_bytes  # and those before
            working[share] = forward + _kept(config, shares, share) + read
    return working


def _kept(config: EngineConfig, shares: Shares, share: Share) -> int:
    return verdict_bytes(config, "draft" if share is shares.draft else "target", share, shares.draft)


def _purses(shares: Shares, working: Mapping[Share, int], meter: MemoryMeter, beside: str) -> list[Purse]:
    """``beside``: what is taken off, for errors."""
    purses = []
    for device, group in by_gpu(shares.all).items():
        margin = MARGIN_BYTES * len(group) + int(MARGIN_SHARE * meter.total_bytes(device))
        left = meter.free_bytes(device) - margin - sum(working[share] for share in group)
        remedy = "lower max_num_batched_tokens, max_num_seqs or max_window, place a model on another device"
        page_bytes = sum(share.page_bytes for share in group)
        if not page_bytes:  # heads without KV
            continue
        purses.append(Purse(f"{device} has beside {beside}", left, page_bytes, remedy))
    if on_cpu := sum(share.page_bytes for share in shares.all if not share.on_gpu):
        purses.append(Purse("a model on cpu gets", DEFAULT_BYTES, on_cpu, "say kv_cache_memory"))
    return purses


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
