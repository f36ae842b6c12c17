"""How ``verify_attention`` is cut into programs: a pure function of shapes, so that a CUDA graph can hold it.

A block of packed rows (the query heads that share a KV head, of consecutive tokens) walks over the keys in tiles. Where
the blocks alone do not fill the GPU the keys are split, at the same positions for every sequence, and merged after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPLIT_UNIT = 128  # keys; a multiple of every block_n. Shorter splits would be all latency
MAX_SPLITS = 128
WINDOW_ROWS = 128  # packed rows of an average sequence; up to as many wait for memory, more for the tensor cores
WINDOW_PROGRAMS = 8  # a multiprocessor, at full context: two to four run at a time, the rest evens out unlike contexts
PREFILL_PROGRAMS = 2  # a multiprocessor; partial results of more rows would cost more than they gain


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


def plan_tile(packed: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """``packed``: rows of an average sequence. ``dtype``: of the operands of the dots.

    A block that holds all of a sequence's packed rows reads its keys once; rows beyond those that are needed cost only
    tensor core time, which decoding and verification have to spare. Of two-byte types, tiles of K and V have 16 KiB: in
    three stages a program of 16 rows takes 72 KiB, one of 64 takes 112, and an H100 runs three or two at a time. fp32
    has no exact tensor cores: its tiles pass through registers, which takes those of eight warps.
    """
    wide = head_dim > 128
    if dtype is torch.float32:
        return Tile(16, 32, num_warps=8, num_stages=2)
    block_m = min(max(16, 1 << (packed - 1).bit_length()), 32 if wide else 128)
    return Tile(block_m, 32 if wide else 64, num_warps=8 if block_m == 128 else 4, num_stages=3)


def plan(
    tokens: int,
    sequences: int,
    group: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    capacity: int,
    cores: int,
    most_rows: int = 0,
) -> Plan:
    """``capacity``: keys that a row of the block tables has room for. ``cores``: the GPU's multiprocessors.
    ``most_rows``: the operator's hint; a graph's padding counts as a sequence, so that the mean may be half as large.

    Up to WINDOW_ROWS the splits do not depend on the number of tokens.
    """
    packed = -(-tokens // sequences) * group
    programs = sequences * kv_heads * max(packed // WINDOW_ROWS, 1)
    wanted = (WINDOW_PROGRAMS if packed <= WINDOW_ROWS else PREFILL_PROGRAMS) * cores
    splits = min(-(-wanted // programs), MAX_SPLITS)
    split_keys = max(-(-capacity // (splits * SPLIT_UNIT)), 1) * SPLIT_UNIT
    held = min(most_rows, tokens) * group or packed
    return Plan(plan_tile(held, head_dim, dtype), max(-(-capacity // split_keys), 1), split_keys)


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
