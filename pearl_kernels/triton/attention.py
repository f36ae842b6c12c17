"""``verify_attention`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Blocks of packed rows walk over the paged keys (``attention_kernels``), cut as ``attention_plan`` says. Keys and values
are read once for a block of up to 64 rows; a row costs a key 6 D operations and the block 4 D bytes (two-byte types):
memory is the limit in decoding and verification, where the rows beyond those that are needed cost nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from pearl_kernels.operands import check_attention
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.attention_kernels import attend_kernel, merge_kernel
from pearl_kernels.triton.attention_plan import (
    MERGED_SPLITS,
    WINDOW_ROWS,
    Gpu,
    Plan,
    Tile,
    merge_warps,
    padded_head_dim,
    plan,
    plan_tile,
    row_blocks,
    split_keys_of,
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
    sinks: Tensor | None = None,
) -> Tensor:
    """The values of the index tensors are not checked: that would wait for the device. Nothing is made of most_rows."""
    sizes = check_attention(CHECKS, q, k_cache, v_cache, block_tables, query_start, context_lens, most_rows, sinks)
    n, query_heads, kv_heads, head_dim = sizes[:4]
    if n == 0 or sizes.sequences == 0:
        return q.new_empty((n, query_heads, head_dim))
    dtype, capacity = compute_dtype(q, k_cache), sizes.table_width * sizes.page_size
    group, gpu = query_heads // kv_heads, _gpu(q.device)
    cut = plan(n, sizes.sequences, group, kv_heads, head_dim, dtype, capacity, gpu)
    return attend(q, k_cache, v_cache, block_tables, query_start, context_lens, scale, window, softcap, cut, sinks)


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
    sinks: Tensor | None = None,
) -> Tensor:
    """``verify_attention`` of tensors that were checked, with at least one row, cut in this way."""
    n, query_heads, head_dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    sequences, group, capacity = context_lens.shape[0], query_heads // kv_heads, block_tables.shape[1] * page_size
    out = q.new_empty((n, query_heads, head_dim))
    partial = (cut.partial_rows if cut.splits > 1 else 0, query_heads, cut.slots)
    sums = q.new_empty((*partial, head_dim), dtype=torch.float32)
    peaks = q.new_empty((*partial, 2), dtype=torch.float32)
    unit = 2 * _LOG2E * scale / softcap if softcap > 0 else _LOG2E * scale
    sizes = cut.split_keys, kv_heads, group, head_dim, page_size, window > 0, softcap > 0

    def launch_attend(blocks: int, programs: int, tile: Tile, which: tuple[int, int], split: bool) -> None:
        attend_kernel[(blocks, kv_heads, programs)](
            q,
            k_cache,
            v_cache,
            block_tables,
            query_start,
            context_lens,
            sinks,
            out,
            sums,
            peaks,
            q.stride(0),
            block_tables.stride(0),
            sequences,
            capacity,
            *which,
            cut.slots,
            int(cut.by_sequence),
            unit,
            window,
            softcap * _LOG2E,
            **_constants(tile, *sizes, split),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    if cut.prompt_tile is not None:
        blocks = row_blocks(n, sequences, group, cut.prompt_tile.block_m)
        launch_attend(blocks, 1, cut.prompt_tile, (0, 1), split=False)
    for first in range(0, cut.splits, cut.at_once):
        which = first, min(first + cut.at_once, cut.splits)
        launch_attend(cut.blocks, cut.programs, cut.tile, which, split=True)
        if cut.splits > 1:
            merge_kernel[(cut.partial_rows, query_heads)](
                sums,
                peaks,
                query_start,
                context_lens,
                sinks,
                out,
                sequences,
                capacity,
                *which,
                cut.slots,
                int(cut.by_sequence),
                window,
                **_merge_constants(cut.split_keys, query_heads, head_dim, window > 0),
                num_warps=merge_warps(head_dim),
            )
    return out


def _constants(
    tile: Tile,
    split_keys: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    windowed: bool,
    capped: bool,
    split: bool,
) -> dict[str, object]:
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": padded_head_dim(head_dim),
        "SPLIT_KEYS": split_keys,
        "WINDOW_ROWS": WINDOW_ROWS,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "SPLIT": split,
    }


def _merge_constants(split_keys: int, query_heads: int, head_dim: int, windowed: bool) -> dict[str, object]:
    return {
        "QUERY_HEADS": query_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_S": MERGED_SPLITS,
        "SPLIT_KEYS": split_keys,
        "WINDOW_ROWS": WINDOW_ROWS,
        "WINDOWED": windowed,
    }


# ---- what production launches: a KV head's group of 4 (8B models) or 8 (70B), pages of 16 ----------------------------

_PASS = dict.fromkeys(("sequences", "capacity", "first_split", "end_split", "slots", "by_sequence"), "i32")
_INTEGERS = ("block_tables", "query_start", "context_lens")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _in_order(kernel: triton.JITFunction, types: Mapping[str, str]) -> dict[str, str]:
    """As the kernel's arguments are: sinks are a pointer among the others, or a constant."""
    return {name: types[name] for name in kernel.arg_names}


def _attend_variant(
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    prompts: bool = False,
    windowed: bool = False,
    spills: str | None = None,
    sinks: bool = False,
) -> Variant:
    tile, pointer = plan_tile(prompts, head_dim, dtype, _REPORTED_SHARED), f"*{_TYPES[dtype]}"
    constants = _constants(tile, split_keys_of(8), 8, group, head_dim, 16, windowed, False, not prompts)
    constants |= {} if sinks else {"sinks": None}
    pointers = dict.fromkeys(("q", "k_cache", "v_cache"), pointer) | dict.fromkeys(_INTEGERS, "*i32")
    pointers |= {"sinks": "*fp32"} if sinks else {}
    pointers |= {"out": pointer, "sums": "*fp32", "peaks": "*fp32"}
    integers = dict.fromkeys(("q_stride", "table_stride"), "i32") | _PASS
    scalars = {"scale": "fp32", "window": "i32", "softcap": "fp32"}
    return Variant(
        name="-".join(
            ["attend", _TYPES[dtype], f"d{head_dim}", f"m{tile.block_m}"]
            + ["prompt" if prompts else "split"]
            + [f"g{group}"] * (group != 4)
            + ["window"] * windowed
            + ["sinks"] * sinks
        ),
        kernel=attend_kernel,
        signature=_in_order(attend_kernel, pointers | integers | scalars | dict.fromkeys(constants, "constexpr")),
        constexprs=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=(*pointers, "q_stride"),
        spills=spills,
    )


def _merge_variant(dtype: torch.dtype, head_dim: int, sinks: bool = False) -> Variant:
    constants = _merge_constants(split_keys_of(8), 32, head_dim, windowed=False)
    constants |= {} if sinks else {"sinks": None}
    pointers = {"sums": "*fp32", "peaks": "*fp32", "query_start": "*i32", "context_lens": "*i32"}
    pointers |= {"sinks": "*fp32"} if sinks else {}
    pointers["out"] = f"*{_TYPES[dtype]}"
    return Variant(
        name=f"merge-{_TYPES[dtype]}-d{head_dim}" + "-sinks" * sinks,
        kernel=merge_kernel,
        signature=_in_order(merge_kernel, pointers | _PASS | {"window": "i32"} | dict.fromkeys(constants, "constexpr")),
        constexprs=constants,
        num_warps=merge_warps(head_dim),
        aligned=tuple(pointers),
    )


_FULL = "sm_80: sums, scores and the query block fill the 255 registers that there are"
_ROOM = "sm_90: two values, once a split, so that two programs fit a multiprocessor"
_BF16, _FP16 = torch.bfloat16, torch.float16

VARIANTS = (
    *(_attend_variant(_BF16, 128, group) for group in (4, 8)),
    _attend_variant(_BF16, 128, prompts=True, spills=_FULL),
    _attend_variant(_BF16, 128, windowed=True, spills=_ROOM),
    _attend_variant(_BF16, 128, prompts=True, windowed=True, spills=_FULL),
    _attend_variant(_BF16, 64),
    _attend_variant(_BF16, 64, prompts=True),
    *(_attend_variant(_BF16, 64, 8, windowed=windowed, sinks=True) for windowed in (False, True)),  # gpt-oss
    _attend_variant(_BF16, 64, 8, prompts=True, windowed=True, sinks=True),
    _attend_variant(_BF16, 256),
    _attend_variant(_BF16, 256, prompts=True),
    _attend_variant(_FP16, 128),
    _attend_variant(torch.float32, 128),
    _attend_variant(torch.float32, 128, prompts=True),
    _merge_variant(_BF16, 128),
    _merge_variant(_BF16, 64),
    _merge_variant(_BF16, 64, sinks=True),
    _merge_variant(_FP16, 128),
)
