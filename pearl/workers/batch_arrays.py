"""The index arrays of one ragged forward, from the engine's work items; padded to a shape where it must be fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from pearl.host_tensors import Array, array
from pearl.messages import ForwardWork
from pearl.models import ForwardBatch
from pearl.workers.shapes import BatchShape

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


@dataclass
class BatchLists:
    """As ``ForwardBatch``, in Python numbers. ``columns``: of the block tables; 0: as many as the longest needs."""

    input_ids: list[int]
    positions: list[int]
    slot_mapping: list[int]
    block_tables: list[tuple[int, ...]]
    query_start: list[int]
    context_lens: list[int]
    logits_rows: list[int]
    columns: int = 0

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

    def pad(self, shape: BatchShape) -> None:
        """Fill up to ``shape``: sequences without rows, then one whose rows are written nowhere and read page 0."""
        rows = shape.rows - len(self.input_ids)
        self.input_ids += [0] * rows
        self.positions += [0] * rows
        self.slot_mapping += [-1] * rows
        missing = shape.sequences - len(self.block_tables)
        self.query_start += [self.query_start[-1]] * missing + [shape.rows]
        self.context_lens += [0] * missing + [rows]
        self.block_tables += [(0,)] * missing + [(0,) * min(rows, shape.pages)]  # as many as its positions need
        self.columns = shape.pages

    def arrays(self) -> dict[str, Array]:
        numbers = {name: getattr(self, name) for name in DTYPES if name != "block_tables"}
        arrays = {name: array(values, DTYPES[name]) for name, values in numbers.items()}
        # Short tables are padded with -1, which no kernel reads.
        columns = self.columns or max(map(len, self.block_tables))
        tables = np.full((len(self.block_tables), columns), -1, dtype=np.int32)
        for row, table in zip(tables, self.block_tables, strict=True):
            row[: len(table)] = table
        return {name: tables if name == "block_tables" else arrays[name] for name in DTYPES}
