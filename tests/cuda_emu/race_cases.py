"""Small calls of every CUDA operator that between them pass each barrier, fence and branch, for ``races.py``."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from cuda_emu import build
from ops_support import mixed_sampling, padded_logits, paged, sampling, strided_rows
from verify_support import one_row_each, ragged

from pearl_kernels.reference import Rule

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _norms(width: int, offset: int, dtype: torch.dtype, add: bool) -> None:
    """``offset``: elements from an aligned address, without which a row stays in registers."""
    x = torch.randn(3 * (width + offset)).to(dtype)[offset:].unfold(0, width, width)[:2]
    weight = torch.randn(width).to(dtype)
    if add:
        build.operator("add_rms_norm", races=True)(x, torch.randn(2, width).to(dtype), weight, 1e-5)
    else:
        build.operator("rms_norm", races=True)(x, weight, 1e-5)


def _activation(op: str, width: int) -> None:
    build.operator(op, races=True)(torch.randn(2, 2 * width))


def _scaling(width: int, softcap: float) -> None:
    build.operator("scale_and_cap", races=True)(torch.randn(2, width), 0.5, softcap)


def _rope(head_dim: int, normed: bool) -> None:
    q, k, v = (strided_rows(torch.randn(5, heads, head_dim)) for heads in (4, 2, 2))
    k_cache, v_cache = torch.zeros(2, 2, 4, 2, head_dim)
    norms = (torch.ones(head_dim), torch.ones(head_dim)) if normed else ()
    index = (torch.arange(5), torch.randn(9, head_dim), k_cache, v_cache, torch.tensor([3, -1, 0, 7, 5]))
    build.operator("rope_and_cache", races=True)(q, k, v, *index, *norms)


def _copy_blocks(elements: int) -> None:
    pairs = torch.tensor([[0, 3], [1, 4], [0, 5], [2, 2], [9, 1]])
    build.operator("copy_blocks", races=True)(torch.randn(6, elements).half(), pairs)


def _attention(
    sequences: Sequence[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    q_dtype: torch.dtype | None = None,
    window: int = 0,
    softcap: float = 0.0,
    capacity: int = 0,
    device: int = 0,
) -> None:
    """``sequences``: queries and context of each. ``capacity``: keys that the block tables have room for, at least.
    ``device``: 1 has room for rings of two stages only."""
    queries, contexts = zip(*sequences, strict=True)
    q = strided_rows(torch.randn(sum(queries), heads[0], head_dim).to(q_dtype or dtype))
    if head_dim % 16:
        q = torch.cat((q.flatten(1), torch.zeros(len(q), 3).to(q)), 1)[:, :-3].unflatten(1, q.shape[1:])  # misaligned
    cache = paged(queries, contexts, heads[1], head_dim, 16, dtype)
    missing = max(0, capacity // 16 - cache.block_tables.shape[1])
    tables = torch.nn.functional.pad(cache.block_tables, (0, missing), value=-1)
    index = (tables, cache.query_start, cache.context_lens)
    attention = build.operator("verify_attention", races=True, device=device)
    attention(q, cache.k_cache, cache.v_cache, *index, head_dim**-0.5, window, softcap)


def _verify_ragged(rule: Rule, vocab_size: int, dtype: torch.dtype, requests: int) -> None:
    build.operator("verify", races=True)(**ragged(rule, vocab_size, dtype, FP32, requests))


def _verify_cuts(kind: str, vocab_size: int) -> None:
    """A row of each kind of cut; ``kind``: of the logits."""
    cuts: list[dict[str, Any]] = [{"top_k": 40}, {"top_p": 0.9}, {"top_k": 3000, "top_p": 0.8}, {"min_p": 0.01}]
    logits = padded_logits(len(cuts), vocab_size, vocab_size + 3, FP32, torch.nan)
    if kind == "ties":
        logits = logits.round()
        logits[:, 100:3500] = 2.0  # more than are gathered
    if kind == "flat":
        logits = logits * 1e-3
    if kind == "levels":  # many just above the cutoff of a min-p
        logits = torch.where(logits > 3.0, 9.0, 8.0)
        cuts[-1]["min_p"] = 0.9999 * math.exp(-1 / 0.7)
    params = mixed_sampling(len(cuts))
    for i, cut in enumerate(cuts):
        one = sampling(1, 0.7, **cut)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(params, name)[i] = getattr(one, name)[0]
    tokens = torch.tensor([1, -1, 200, 3])
    build.operator("verify", races=True)(**(one_row_each(logits, params, tokens) | {"vocab_size": vocab_size}))


def _verify_no_residual() -> None:
    """Drafted tokens are rejected though p = q: nothing remains to draw from but p."""
    vocab_size, n = 4200, 3
    logits = padded_logits(n, vocab_size, vocab_size + 3, FP32, torch.nan)
    draft = {"draft_logits": logits, "draft_rows": torch.arange(n).int(), "draft_temperature": torch.ones(n)}
    draft |= {"draft_logprobs": torch.full((n,), 60.0)}
    case = one_row_each(logits, sampling(n), torch.tensor([7, 5, 9]), **draft)
    build.operator("verify", races=True)(**(case | {"vocab_size": vocab_size}))


def _verify_long_request() -> None:
    """More rows than a warp has lanes, all accepted; and no rows at all."""
    n, vocab_size = 40, 20
    logits = torch.full((n, vocab_size), -50.0)
    tokens = torch.arange(n) % vocab_size
    logits[torch.arange(n), tokens] = 50.0
    case = one_row_each(logits, sampling(1, 0.0), tokens) | {"row_start": torch.tensor([0, n]).int()}
    build.operator("verify", races=True)(**case)


def _ordering(kernel: str, *arguments: int) -> None:
    out = torch.zeros(1024, dtype=torch.int32)
    run = getattr(build.library(build.SHIM / "ordering.cu", races=True), f"run_{kernel}")
    assert run(ctypes.c_void_p(out.data_ptr()), *arguments) == 0


#: Kernels of ordering.cu and their arguments, and whether they have a race.
ORDERING: Sequence[tuple[tuple[str | int, ...], bool]] = (
    (("block_barrier",), False),
    (("shuffle",), True),
    (("warp_barrier",), False),
    (("warp_barrier_of_other_warps",), True),
    (("warp_barrier_of_halves", 8), False),
    (("warp_barrier_of_halves", 16), True),
    (("named_barriers", 32), False),
    (("named_barriers", 64), True),
    (("atomics_and_reads",), True),
    (("atomics_and_volatile_reads",), False),
    (("message", 3), False),
    (("message", 2), True),
    (("message", 1), True),
    (("blocks_write_the_same", 1), False),
    (("blocks_write_the_same", 2), True),
    (("two_launches",), False),
    (("own_shared_memory",), False),
    (("async_copy", 1, 0, 0), False),
    (("async_copy", 0, 0, 0), True),
    (("async_copy", 1, 1, 1), False),
    (("async_copy", 1, 0, 1), True),
    (("async_copy", 0, 1, 1), True),
    (("async_copy_over", 1), False),
    (("async_copy_over", 0), True),
)


#: By source, the calls; each takes a second or less.
CASES: Mapping[str, Mapping[str, Callable[[], None]]] = {
    "norm.cu": {
        "registers": partial(_norms, 1024, 0, FP32, False),
        "registers, residual": partial(_norms, 2056, 0, BF16, True),
        "one warp": partial(_norms, 64, 0, FP16, True),
        "elements": partial(_norms, 75, 1, FP32, False),
        "elements, residual": partial(_norms, 131, 1, BF16, True),
    },
    "activation.cu": {
        "vectors": partial(_activation, "silu_and_mul", 1200),
        "elements": partial(_activation, "silu_and_mul", 1201),
        "gelu": partial(_activation, "gelu_and_mul", 1201),
    },
    "scaling.cu": {
        "vectors": partial(_scaling, 1200, 0.0),
        "elements": partial(_scaling, 1201, 0.0),
        "cap": partial(_scaling, 1201, 2.0),
    },
    "rope.cu": {
        "plain": partial(_rope, 64, False),
        "normed": partial(_rope, 128, True),
        "wide": partial(_rope, 256, True),
    },
    "copy_blocks.cu": {"vectors": partial(_copy_blocks, 1024), "bytes": partial(_copy_blocks, 77)},
    "attention.cu": {
        "16 rows, split": partial(_attention, [(1, 300), (0, 9), (2, 70)], (4, 2), 64, BF16),
        "32 rows": partial(_attention, [(9, 300)], (2, 1), 128, FP16, window=90),
        "64 rows": partial(_attention, [(17, 530)], (2, 1), 64, BF16, softcap=9.0),
        "64 rows, wide": partial(_attention, [(9, 70)], (4, 1), 128, BF16),
        "widest": partial(_attention, [(12, 280)], (2, 1), 256, BF16),
        "misaligned": partial(_attention, [(3, 70), (1, 20)], (3, 1), 24, FP16),
        "fp32": partial(_attention, [(3, 300), (1, 40)], (4, 2), 64, FP32),
        "fp32, wide": partial(_attention, [(9, 330)], (2, 1), 136, FP32, window=70),
        "mixed": partial(_attention, [(2, 300)], (4, 2), 72, BF16, FP16),
        "two stages": partial(_attention, [(2, 300)], (4, 2), 64, BF16, device=1),
        "64 rows, two stages": partial(_attention, [(17, 530)], (2, 1), 64, BF16, device=1),
        "fp32, two stages": partial(_attention, [(3, 300)], (4, 2), 64, FP32, device=1),
        "tables for a million keys": partial(_attention, [(32, 600)], (2, 1), 256, BF16, capacity=1 << 20),
    },
    "verify.cu": {
        "rejection": partial(_verify_ragged, "rejection", 300, BF16, 6),
        "coupled": partial(_verify_ragged, "coupled", 300, BF16, 6),
        "long request": _verify_long_request,
        "rejection, split": partial(_verify_ragged, "rejection", 8300, FP16, 5),
        "coupled, split": partial(_verify_ragged, "coupled", 4200, FP32, 5),
        "no residual": _verify_no_residual,
        "cuts": partial(_verify_cuts, "normal", 4200),
        "cuts, flat": partial(_verify_cuts, "flat", 8200),
        "cuts, ties": partial(_verify_cuts, "ties", 4200),
        "cuts, levels": partial(_verify_cuts, "levels", 300),
    },
    "ordering.cu": {" ".join(map(str, call)): partial(_ordering, *call) for call, _ in ORDERING},  # type: ignore[arg-type]
}
