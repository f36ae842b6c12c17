"""How ``verify_attention`` is cut into programs: a pure function of shapes, so that a CUDA graph can hold it.

A block of packed rows (the query heads that share a KV head, of consecutive tokens) walks over the keys in tiles. Where
the blocks alone do not fill the GPU the keys are split, at the same positions for every sequence, and merged after.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SPLIT_UNIT = 128  # keys; a multiple of every block_n. Shorter splits would be all latency
MAX_SPLITS = 128
WINDOW_ROWS = 128  # packed rows of an average sequence; up to as many wait for memory, more for the tensor cores
WINDOW_PROGRAMS = 8  # a multiprocessor, at full context: two to four run at a time, the rest evens out unlike contexts
PREFILL_PROGRAMS = 2  # a multiprocessor; partial results of more rows would cost more than they gain
FEWEST_STAGES = 2


@dataclass(frozen=True)
class Gpu:
    """``cores``: multiprocessors. ``shared``: bytes of shared memory that a block can get, if it asks."""

    cores: int
    shared: int


@dataclass(frozen=True)
class Tile:
    """Shape of a program's work, and how it is compiled."""

    block_m: int  # packed rows
    block_n: int  # keys
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """``splits * split_keys`` covers the block tables' capacity; split i has keys ``[i, i + 1) * split_keys``."""

    tile: Tile
    splits: int
    split_keys: int


def plan_tile(packed: int, head_dim: int, dtype: torch.dtype, shared: int) -> Tile:
    """``packed``: rows of an average sequence. ``dtype``: of the operands of the dots. ``shared``: as of the GPU.
    RuntimeError if no tile is small enough for it.

    A block that holds all of a sequence's packed rows reads its keys once; rows beyond those that are needed cost only
    tensor core time, which decoding and verification have to spare. Of two-byte types, tiles of K and V have 16 KiB: in
    three stages a program of 16 rows takes 72 KiB, one of 64 takes 112, and an H100 runs three or two at a time. fp32
    has no exact tensor cores: its tiles pass through registers, which takes those of eight warps. A GPU with less
    shared memory than three stages take gets two.
    """
    wide = head_dim > 128
    if dtype is torch.float32:
        tile = Tile(16, 32, num_warps=8, num_stages=2)
    else:
        block_m = min(max(16, 1 << (packed - 1).bit_length()), 32 if wide else 128)
        tile = Tile(block_m, 32 if wide else 64, num_warps=8 if block_m == 128 else 4, num_stages=3)
    if shared_bytes(tile, head_dim, dtype) > shared:
        tile = replace(tile, num_stages=FEWEST_STAGES)
    if (needed := shared_bytes(tile, head_dim, dtype)) > shared:
        raise RuntimeError(
            f"verify_attention in Triton needs {needed / 1024:.0f} KiB of shared memory for heads of {head_dim} in "
            f"{str(dtype).removeprefix('torch.')}, this GPU has {shared / 1024:.0f}"
        )
    return tile


def shared_bytes(tile: Tile, head_dim: int, dtype: torch.dtype) -> int:
    """At most as much shared memory does a program take where there is little of it (sm_86, 89 and 120: 99 KiB).

    Keys and values of all stages but the one in registers, and what layouts are changed through. The compiler's own
    figures are below it, by tests, on these architectures; those of sm_90 and sm_100, which have 227 KiB, lie up to 32
    KiB higher, because their tensor cores read the queries from there too.
    """
    width = padded_head_dim(head_dim)
    stage = 2 * tile.block_n * width * dtype.itemsize
    return (tile.num_stages - 1) * stage + min(tile.block_m * (width + tile.block_n) * 4 + 64, stage)


def plan(
    tokens: int,
    sequences: int,
    group: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    capacity: int,
    gpu: Gpu,
    most_rows: int = 0,
) -> Plan:
    """``capacity``: keys that a row of the block tables has room for. ``most_rows``: the operator's hint; a graph's
    padding counts as a sequence, so that the mean may be half as large.

    Up to WINDOW_ROWS the splits do not depend on the number of tokens.
    """
    packed = -(-tokens // sequences) * group
    programs = sequences * kv_heads * max(packed // WINDOW_ROWS, 1)
    wanted = (WINDOW_PROGRAMS if packed <= WINDOW_ROWS else PREFILL_PROGRAMS) * gpu.cores
    splits = min(-(-wanted // programs), MAX_SPLITS)
    split_keys = max(-(-capacity // (splits * SPLIT_UNIT)), 1) * SPLIT_UNIT
    held = min(most_rows, tokens) * group or packed
    tile = plan_tile(held, head_dim, dtype, gpu.shared)
    return Plan(tile, max(-(-capacity // split_keys), 1), split_keys)


def row_blocks(tokens: int, sequences: int, group: int, block_m: int) -> int:
    """Blocks of packed rows that any division of the tokens among the sequences can need.

    Sequence r owns the blocks from ``query_start[r] * group // block_m + r`` up to the next one's first: always as many
    as its rows fill, at most one more.
    """
    return tokens * group // block_m + sequences


def padded_head_dim(head_dim: int) -> int:
    """A power of two that the tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def plan_merge(splits: int, head_dim: int) -> tuple[int, int]:
    """Splits that a program of the merge takes in one step, and its warps: 16 to 32 values a thread, most often."""
    block_s = min(1 << (splits - 1).bit_length(), 32)
    return block_s, min(max(block_s * padded_head_dim(head_dim) // 1024, 1), 4)
