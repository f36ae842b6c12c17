"""What a model computes in one forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """N tokens of R sequences, ragged: one row (decoding), a window (verification) or a chunk (prefill) for each.

    input_ids, positions: int64 ``[N]``. slot_mapping: int64 ``[N]``, ``page * page_size + slot``, negative = none.
    block_tables: int32 ``[R, B]``. query_start: int32 ``[R + 1]``. context_lens: int32 ``[R]``, these tokens included.
    logits_rows: int64 ``[M]``, the rows of the N whose logits are wanted.
    most_rows: rows of the sequence that has most, as far as the host knows; 0: unknown. A hint to the kernels.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    logits_rows: Tensor
    most_rows: int = field(default=0, kw_only=True)
