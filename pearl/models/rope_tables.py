"""The cosines and sines that each layer of a model rotates with, whatever part of its heads is rotated.

The operator rotates whole heads: lane i with lane i + D / 2. Of a head whose first lanes only are rotated, the lanes
are put in another order when queries' and keys' weights are loaded (``lane_order``), so that rotated ones pair with
each other, and the rest is turned by an angle of 0: cosine 1, sine 0. Attention does not see the order of lanes, and
1 * a - 0 * b is a. Layers without rope are turned by 0 altogether.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pearl.models.model_config import ModelConfig
from pearl.models.rope import cos_sin_table


def rope_tables(config: ModelConfig, max_model_len: int, device: torch.device) -> tuple[Tensor, ...]:
    """A table for each layer, fp32 ``[max_model_len, head_dim]``; layers that are alike share one.

    Raises ConfigurationError as ``ModelConfig.require_length``.
    """
    made: list[tuple[Mapping[str, Any] | None, Tensor]] = []
    tables = []
    for layer in range(config.layers):
        rope = config.rope_of(layer)
        known = next((table for other, table in made if other == rope), None)
        if known is None:
            known = _table(config, rope, max_model_len).to(device)
            made.append((rope, known))
        tables.append(known)
    return tuple(tables)


def lane_order(config: ModelConfig) -> Tensor | None:
    """int64 ``[head_dim]``: which stored lane of a query's or key's head each lane is; None: all as they are stored."""
    if config.unrotated == 0:
        return None
    lanes = torch.arange(config.head_dim)
    rotated, others = lanes[: config.rotary_dim].chunk(2), lanes[config.rotary_dim :].chunk(2)
    return torch.cat((rotated[0], others[0], rotated[1], others[1]))


def _table(config: ModelConfig, rope: Mapping[str, Any] | None, length: int) -> Tensor:
    if rope is None:
        return _at_rest(length, config.head_dim)
    table = cos_sin_table(rope, config.rotary_dim, config.max_position_embeddings, length)
    if config.unrotated == 0:
        return table
    (cos, sin), (one, zero) = table.chunk(2, dim=-1), _at_rest(length, config.unrotated).chunk(2, dim=-1)
    return torch.cat((cos, one, sin, zero), dim=-1)


def _at_rest(length: int, lanes: int) -> Tensor:
    return torch.cat((torch.ones(length, lanes // 2), torch.zeros(length, lanes // 2)), dim=-1)
