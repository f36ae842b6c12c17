"""How ``verify_attention`` is cut into programs: a pure function of shapes, so that a CUDA graph can hold it.

A program has some packed rows of one sequence (the query heads that share a KV head, of consecutive tokens) and one KV
head, and walks over some splits of the keys in tiles. Which keys are added up in which order, and by which
instructions, follows from the model alone (tile, ``split_keys``) and from the row's own sequence (whether it is split):
neither from the batch, nor from the block tables' width, nor from the GPU's size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

WINDOW_ROWS = 32  # of a sequence that is split; prompts fill the GPU as they are
MERGED_SPLITS = 16  # that the merge adds up in one step, those of [16 i, 16 i + 16); a pass begins with such a step
PROGRAMS = 8  # a multiprocessor, at full context: one or two run at a time, the rest evens out unlike contexts
MOST_WORKSPACE = 512 << 20  # bytes of partial results; more splits are done in several passes
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
    """Split i of a sequence that is split has keys ``[i, i + 1) * split_keys``, as far as the block tables go.

    Each pass does ``at_once`` splits, shared among ``programs`` programs of a block, and merges them into what the
    passes before it found. Results depend on the tiles and on ``split_keys`` only.
    """

    tile: Tile  # of sequences that are split
    prompt_tile: Tile | None  # of the others; None: no sequence can have so many rows
    split_keys: int
    splits: int  # that the tables have room for; 1: there is nothing to merge
    at_once: int  # a multiple of MERGED_SPLITS, or all
    programs: int
    blocks: int  # of rows of sequences that are split
    partial_rows: int
    by_sequence: bool  # each sequence has WINDOW_ROWS rows of partial results; else every token has one

    @property
    def slots(self) -> int:
        """Of partial results, of a row and head: a pass's splits, and what the passes before it found."""
        return self.at_once + (self.at_once < self.splits)


def split_keys_of(kv_heads: int) -> int:
    """Keys of a split, a multiple of every block_n: as the C++ kernel's (``attention_plan.cuh``), for its reasons."""
    return 256 if kv_heads < 4 else 512


def plan_tile(prompts: bool, head_dim: int, dtype: torch.dtype, shared: int) -> Tile:
    """``prompts``: of more than WINDOW_ROWS rows; else of windows. ``dtype``: of the operands of the dots. ``shared``:
    as of the GPU, which decides about stages only. RuntimeError if no tile is small enough for it.

    As many rows for a call's longest sequence as for its shortest: with them the compiler changes how a row's keys lie
    in warps and the tensor cores' instructions, and so the order of its sums. 64 hold most windows (16 rows of groups
    of 4, 8 of 8), so that keys are read once; one decoding row costs tensor core time that memory leaves. Of two-byte
    types, tiles of K and V have 16 KiB: in three stages a program takes 112 KiB, and an H100 runs two at a time. fp32
    has no exact tensor cores: its tiles pass through registers, which takes those of eight warps. A GPU with less
    shared memory than three stages take gets two.
    """
    if dtype is torch.float32:
        tile = Tile(16, 32, num_warps=8, num_stages=2)
    elif head_dim > 128:
        tile = Tile(32, 32, num_warps=4, num_stages=3)
    else:
        tile = Tile(128, 64, num_warps=8, num_stages=3) if prompts else Tile(64, 64, num_warps=4, num_stages=3)
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
) -> Plan:
    """``capacity``: keys that a row of the block tables has room for.

    Programs for whose split a sequence has no keys leave at once, but take their turn, about a microsecond each on a
    multiprocessor. So there are no more than PROGRAMS, and each takes every so many-th split.
    """
    split_keys = split_keys_of(kv_heads)
    splits = max(-(-capacity // split_keys), 1)
    by_sequence = tokens > WINDOW_ROWS * sequences
    partial_rows = WINDOW_ROWS * sequences if by_sequence else tokens
    at_once, split_bytes = splits, partial_rows * kv_heads * group * (head_dim + 2) * 4
    if splits * split_bytes > MOST_WORKSPACE:
        fitting = (MOST_WORKSPACE // split_bytes - 1) // MERGED_SPLITS * MERGED_SPLITS
        at_once = min(max(fitting, MERGED_SPLITS), splits)
    tile = plan_tile(False, head_dim, dtype, gpu.shared)
    prompt_tile = plan_tile(True, head_dim, dtype, gpu.shared) if tokens > WINDOW_ROWS else None
    if by_sequence:
        blocks = sequences * -(-WINDOW_ROWS * group // tile.block_m)
    else:
        blocks = row_blocks(tokens, sequences, group, tile.block_m)
    programs = min(-(-PROGRAMS * gpu.cores // (blocks * kv_heads)), at_once)
    return Plan(tile, prompt_tile, split_keys, splits, at_once, programs, blocks, partial_rows, by_sequence)


def row_blocks(tokens: int, sequences: int, group: int, block_m: int) -> int:
    """Blocks of packed rows that any division of the tokens among the sequences can need.

    Sequence r owns the blocks from ``query_start[r] * group // block_m + r`` up to the next one's first: always as many
    as its rows fill, at most one more.
    """
    return tokens * group // block_m + sequences


def padded_head_dim(head_dim: int) -> int:
    """A power of two that the tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def merge_warps(head_dim: int) -> int:
    """Of a program of the merge: 16 to 32 values a thread, most often."""
    return min(max(MERGED_SPLITS * padded_head_dim(head_dim) // 1024, 1), 4)
