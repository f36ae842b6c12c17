"""A tensor of a checkpoint as the decoder's own ones: under its names, what is stored as one taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models.model_config import ModelConfig
from pearl.models.stored_experts import each_expert

if TYPE_CHECKING:
    from pearl.models.model_source import StoredValues

_QKV = re.compile(r"(.*\.self_attn\.)qkv_proj(\.weight|\.bias)")


def own_tensors(name: str, values: StoredValues, config: ModelConfig) -> Iterator[tuple[str, StoredValues]]:
    """Raises ModelLoadError for what has not the shape that it would have to be taken apart."""
    own = name
    for pattern, replacement in config.stored_names.items():
        own = re.sub(pattern, replacement, own)
    if config.grouped_qkv and (match := _QKV.fullmatch(own)):
        yield from _projections(name, match[1], match[2], values, config)
    else:
        interleaved = config.mixture is not None and config.mixture.interleaved
        yield from each_expert(own, values, interleaved)


def _projections(
    name: str, prefix: str, last: str, values: StoredValues, config: ModelConfig
) -> Iterator[tuple[str, StoredValues]]:
    """q, k and v of a matrix that has, for each KV head, its queries' outputs, then the key's, then the value's."""
    queries, size = config.heads // config.kv_heads, config.head_dim
    rows, stored = (config.heads + 2 * config.kv_heads) * size, tuple(values.get_shape())
    if not stored or stored[0] != rows:
        raise ModelLoadError(
            f"{name!r} has shape {stored}, config.json calls for {rows} rows: {config.heads} query and "
            f"{config.kv_heads} KV heads of {size}"
        )
    heads = torch.arange(rows).view(config.kv_heads, queries + 2, size)
    parts = {"q_proj": heads[:, :queries], "k_proj": heads[:, queries], "v_proj": heads[:, queries + 1]}
    for projection, own in parts.items():
        yield f"{prefix}{projection}{last}", _Rows(values, own.flatten())


class _Rows:
    """Some rows of a tensor."""

    def __init__(self, whole: StoredValues, rows: Tensor) -> None:
        self._whole, self._rows = whole, rows

    def get_shape(self) -> Sequence[int]:
        return len(self._rows), *self._whole.get_shape()[1:]

    def get_dtype(self) -> str:
        return self._whole.get_dtype()

    def __getitem__(self, part: slice | tuple[slice, ...] | EllipsisType) -> Tensor:
        spans = () if isinstance(part, EllipsisType) else part if isinstance(part, tuple) else (part,)
        rows = self._rows[spans[0]] if spans else self._rows
        all_rows: tuple[slice, ...] = (slice(None), *spans[1:])
        return self._whole[all_rows][rows]
