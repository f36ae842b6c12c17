"""The index arrays of one ragged forward, from the engine's work items; padded to a shape where it must be fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from pearl.host_tensors import Array, array
from pearl.messages import ForwardWork
from pearl.models import ForwardBatch

DTYPES = {
    "input_ids": torch.int64,
    "positions": torch.int64,
    "slot_mapping": torch.int64,
    "block_tables": torch.int32,
    "query_start": torch.int32,
    "context_lens": torch.int32,
    "logits_rows": torch.int64,
}
assert [*DTYPES, "most_rows"] == [field.name for field in fields(ForwardBatch)]


class BatchShape(NamedTuple):
    """What a captured forward is fixed to. Its arrays have one sequence more, which takes the padding rows."""

    rows: int
    sequences: int
    pages: int  # columns of the block tables


def bucket(count: int) -> int:
    """The least of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... that holds ``count``: a fifth at most is padding."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@dataclass
class BatchLists:
    """As ``ForwardBatch``, in Python numbers."""

    input_ids: list[int]
    positions: list[int]
    slot_mapping: list[int]
    block_tables: list[tuple[int, ...]]
    query_start: list[int]
    context_lens: list[int]
    logits_rows: list[int]

    @classmethod
    def of(cls, work: Sequence[ForwardWork], page_size: int) -> BatchLists:
        lists = cls([], [], [], [item.block_table for item in work], [0], [], [])
        tokens = lists.input_ids
        for item in work:
            tokens.extend(item.tokens)
            span = range(item.start, item.end)
            lists.positions.extend(span)
            lists.slot_mapping.extend(item.block_table[p // page_size] * page_size + p % page_size for p in span)
            lists.context_lens.append(item.end)
            lists.logits_rows.extend(range(len(tokens) - item.num_logits, len(tokens)))
            lists.query_start.append(len(tokens))
        return lists

    def shape(self, page_size: int) -> BatchShape:
        """The smallest bucket that holds them."""
        rows = bucket(len(self.input_ids))
        pages = max(*map(len, self.block_tables), 4, -(-rows // page_size))  # the padding's positions need pages too
        return BatchShape(rows, bucket(len(self.block_tables)), next_power_of_two(pages))

    def pad(self, shape: BatchShape) -> None:
        """Fill up to ``shape``: sequences without rows, then one whose rows are written nowhere and read page 0."""
        rows = shape.rows - len(self.input_ids)
        self.input_ids += [0] * rows
        self.positions += [0] * rows
        self.slot_mapping += [-1] * rows
        missing = shape.sequences - len(self.block_tables)
        self.query_start += [self.query_start[-1]] * missing + [shape.rows]
        self.context_lens += [0] * missing + [rows]
        self.block_tables = [table + (-1,) * (shape.pages - len(table)) for table in self.block_tables]
        self.block_tables += [(0,) * shape.pages] * (missing + 1)

    def arrays(self) -> dict[str, Array]:
        longest = max(map(len, self.block_tables))
        # Short tables are padded with -1, which no kernel reads.
        self.block_tables = [table + (-1,) * (longest - len(table)) for table in self.block_tables]
        return {name: array(getattr(self, name), dtype) for name, dtype in DTYPES.items()}
