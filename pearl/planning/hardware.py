"""How long forwards take on a GPU, from bytes over bandwidth and operations over their rate: no measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pearl.errors import ConfigurationError
from pearl.planning.forecast import Costs

# What decoding kernels reach of the bandwidth, and matmuls of the arithmetic, that a data sheet promises: a guess.
SHARE = 0.8
_ARITHMETIC = 0.6


@dataclass(frozen=True)
class Gpu:
    """By its data sheet: bytes per second from memory, dense bf16 operations per second, bytes of memory."""

    bandwidth: float
    operations: float
    memory: float


GPUS: Mapping[str, Gpu] = {
    "a10": Gpu(0.600e12, 125e12, 24e9),
    "a100-40": Gpu(1.555e12, 312e12, 40e9),
    "a100-80": Gpu(2.039e12, 312e12, 80e9),
    "b200": Gpu(8.0e12, 2250e12, 180e9),
    "h100": Gpu(3.35e12, 989e12, 80e9),
    "h200": Gpu(4.8e12, 989e12, 141e9),
    "l4": Gpu(0.300e12, 121e12, 24e9),
    "l40s": Gpu(0.864e12, 362e12, 48e9),
    "mi300x": Gpu(5.3e12, 1307e12, 192e9),
    "rtx3090": Gpu(0.936e12, 71e12, 24e9),
    "rtx4090": Gpu(1.008e12, 165e12, 24e9),
}


def costs_on(
    gpu: Gpu,
    target_bytes: int,
    draft_bytes: int,
    target_gpus: int = 1,
    share: float = SHARE,
    bytes_each: int = 2,
    target_reads: Callable[[float], float] | None = None,
    draft_reads: float | None = None,
) -> Costs:
    """Of a draft on one GPU and a target on ``target_gpus`` further ones, which exchange nothing that takes time.

    A forward reads all weights once, and computes each row with all of them; KV is taken to be small beside weights.
    Of a mixture of experts ``target_reads`` says how many bytes a forward of so many rows reads, a row is computed with
    those that it would read alone, and ``draft_reads`` are those of a draft's step.
    Raises ConfigurationError: weights of ``bytes_each`` that do not fit.
    """
    if not 0 < share <= 1:
        raise ConfigurationError(f"the share of the bandwidth must lie above 0 and at most at 1, not {share:g}")
    each = target_bytes / target_gpus
    for name, needed in (("target", each), ("draft", draft_bytes)):
        if needed > gpu.memory:
            raise ConfigurationError(
                f"the {name}'s weights take {needed / 1e9:.1f} GB of a GPU that has {gpu.memory / 1e9:.0f}; "
                f"share the target among more of them"
            )

    def read(rows: float) -> float:
        return each if target_reads is None else target_reads(rows) / target_gpus

    def target(rows: float) -> float:
        reading = read(rows) / (share * gpu.bandwidth)
        computing = rows * 2 * read(1) / bytes_each / (_ARITHMETIC * gpu.operations)
        return max(reading, computing)

    return Costs(target, (draft_bytes if draft_reads is None else draft_reads) / (share * gpu.bandwidth))
