"""``verify_attention`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Blocks of packed rows walk over the paged keys (``attention_kernels``), cut as ``attention_plan`` says. Keys and values
are read once for a block of up to 128 rows; a row costs a key 6 D operations and the block 4 D bytes (two-byte types),
so that up to about 64 rows memory is the limit, and beyond it the tensor cores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.runtime import driver

from pearl_kernels.operands import check_attention
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.attention_kernels import attend_kernel, merge_kernel
from pearl_kernels.triton.attention_plan import (
    Gpu,
    Plan,
    Tile,
    padded_head_dim,
    plan,
    plan_merge,
    plan_tile,
    row_blocks,
)
from pearl_kernels.triton.variants import Variant

_LOG2E = math.log2(math.e)
_INTERPRETED = Gpu(cores=1, shared=1 << 20)
_REPORTED_SHARED = 163 * 1024  # of sm_80, the least of what the report compiles for


def verify_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    most_rows: int = 0,
) -> Tensor:
    """The values of the index tensors are not checked: that would wait for the device."""
    sizes = check_attention(CHECKS, q, k_cache, v_cache, block_tables, query_start, context_lens, most_rows)
    n, query_heads, kv_heads, head_dim = sizes[:4]
    if n == 0 or sizes.sequences == 0:
        return q.new_empty((n, query_heads, head_dim))
    dtype, capacity = compute_dtype(q, k_cache), sizes.table_width * sizes.page_size
    group, gpu = query_heads // kv_heads, _gpu(q.device)
    cut = plan(n, sizes.sequences, group, kv_heads, head_dim, dtype, capacity, gpu, most_rows)
    return attend(q, k_cache, v_cache, block_tables, query_start, context_lens, scale, window, softcap, cut)


def compute_dtype(q: Tensor, cache: Tensor) -> torch.dtype:
    """Of the operands of the dots: unlike types meet in fp32."""
    return q.dtype if q.dtype is cache.dtype else torch.float32


def _gpu(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return _INTERPRETED
    found = driver.active.utils.get_device_properties(device.index)  # by these Triton refuses a launch
    return Gpu(found["multiprocessor_count"], found["max_shared_mem"])


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    softcap: float,
    cut: Plan,
) -> Tensor:
    """``verify_attention`` of tensors that were checked, with at least one row, cut in this way."""
    n, query_heads, head_dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    sequences, group, splits = context_lens.shape[0], query_heads // kv_heads, cut.splits
    out = q.new_empty((n, query_heads, head_dim))
    sums, peaks = out, None
    if splits > 1:
        sums = q.new_empty((n, query_heads, splits, head_dim), dtype=torch.float32)
        peaks = q.new_empty((n, query_heads, splits, 2), dtype=torch.float32)
    unit = 2 * _LOG2E * scale / softcap if softcap > 0 else _LOG2E * scale
    attend_kernel[(row_blocks(n, sequences, group, cut.tile.block_m), kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start,
        context_lens,
        sums,
        peaks,
        q.stride(0),
        block_tables.stride(0),
        sequences,
        cut.split_keys,
        unit,
        window,
        softcap * _LOG2E,
        **_constants(cut.tile, kv_heads, group, head_dim, page_size, window > 0, softcap > 0, splits > 1),
        num_warps=cut.tile.num_warps,
        num_stages=cut.tile.num_stages,
    )
    if splits > 1:
        constants, num_warps = _merge_constants(splits, query_heads, head_dim, window > 0)
        merge_kernel[(n, query_heads)](
            sums,
            peaks,
            query_start,
            context_lens,
            out,
            sequences,
            splits,
            cut.split_keys,
            window,
            **constants,
            num_warps=num_warps,
        )
    return out


def _constants(
    tile: Tile, kv_heads: int, group: int, head_dim: int, page_size: int, windowed: bool, capped: bool, split: bool
) -> dict[str, object]:
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": padded_head_dim(head_dim),
        "WINDOWED": windowed,
        "CAPPED": capped,
        "SPLIT": split,
    }


def _merge_constants(splits: int, query_heads: int, head_dim: int, windowed: bool) -> tuple[dict[str, object], int]:
    block_s, num_warps = plan_merge(splits, head_dim)
    sizes = {"BLOCK_D": padded_head_dim(head_dim), "BLOCK_S": block_s}
    return {"QUERY_HEADS": query_heads, "HEAD_DIM": head_dim, **sizes, "WINDOWED": windowed}, num_warps


# ---- what production launches: a KV head's group of 4 (8B models) or 8 (70B), pages of 16 ----------------------------

_INTEGERS = ("block_tables", "query_start", "context_lens")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _attend_variant(
    dtype: torch.dtype, head_dim: int, packed: int, split: bool, windowed: bool = False, spills: str | None = None
) -> Variant:
    tile, pointer = plan_tile(packed, head_dim, dtype, _REPORTED_SHARED), f"*{_TYPES[dtype]}"
    constants = _constants(tile, 8, 4 if packed < 64 else 8, head_dim, 16, windowed, False, split)
    pointers = dict.fromkeys(("q", "k_cache", "v_cache"), pointer) | dict.fromkeys(_INTEGERS, "*i32")
    results = {"out": "*fp32", "peaks": "*fp32"} if split else {"out": pointer, "peaks": "constexpr"}
    integers = dict.fromkeys(("q_stride", "table_stride", "sequences", "split_keys"), "i32")
    scalars = {"scale": "fp32", "window": "i32", "softcap": "fp32"}
    return Variant(
        name="-".join(
            ["attend", _TYPES[dtype], f"d{head_dim}", f"m{tile.block_m}"] + ["split"] * split + ["window"] * windowed
        ),
        kernel=attend_kernel,
        signature=pointers | results | integers | scalars | dict.fromkeys(constants, "constexpr"),
        constexprs=constants if split else {"peaks": None, **constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=(*pointers, "out", *(("peaks",) if split else ()), "q_stride", "split_keys"),
        spills=spills,
    )


def _merge_variant(dtype: torch.dtype, head_dim: int, splits: int) -> Variant:
    constants, num_warps = _merge_constants(splits, 32, head_dim, windowed=False)
    pointers = {"sums": "*fp32", "peaks": "*fp32", "query_start": "*i32", "context_lens": "*i32"}
    pointers["out"] = f"*{_TYPES[dtype]}"
    integers = dict.fromkeys(("sequences", "splits", "split_keys", "window"), "i32")
    return Variant(
        name=f"merge-{_TYPES[dtype]}-d{head_dim}-s{splits}",
        kernel=merge_kernel,
        signature=pointers | integers | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        num_warps=num_warps,
        aligned=(*pointers, "split_keys"),
    )


_FULL = "sm_80: sums, scores and the query block fill the 255 registers that there are"
_ROOM = "sm_90: ptxas prefers two spilled registers to fewer programs on a multiprocessor"
_BF16, _FP16 = torch.bfloat16, torch.float16

VARIANTS = (
    *(_attend_variant(_BF16, 128, packed, split) for packed in (16, 32, 64) for split in (True, False)),
    _attend_variant(_BF16, 128, 128, split=True),
    _attend_variant(_BF16, 128, 128, split=False, spills=_FULL),
    _attend_variant(_BF16, 128, 32, split=True, windowed=True, spills=_ROOM),
    _attend_variant(_BF16, 64, 16, split=True),
    _attend_variant(_BF16, 64, 64, split=True),
    _attend_variant(_BF16, 64, 128, split=False),
    _attend_variant(_BF16, 256, 32, split=True),
    _attend_variant(_FP16, 128, 16, split=True),
    _attend_variant(_FP16, 128, 64, split=True),
    _attend_variant(torch.float32, 128, 16, split=True),
    _merge_variant(_BF16, 128, 4),
    _merge_variant(_BF16, 128, 128),
    _merge_variant(_BF16, 64, 128),
    _merge_variant(_FP16, 128, 128),
)
