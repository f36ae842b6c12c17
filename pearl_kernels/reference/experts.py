"""Reference of a mixture of experts: which experts a token meets, and what they make of it.

Arithmetic is fp32 whatever the tensors' dtype; each stage's result is rounded once. N tokens, D model width, E experts
of feed-forward width F, of which a token meets k (Shazeer et al. 2017; Fedus et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pearl_kernels.reference.layers import LinearWeight, linear


class Routing(NamedTuple):
    experts: Tensor  # int32 [N, k], each in [0, E), the likeliest first
    weights: Tensor  # fp32 [N, k]


@dataclass(frozen=True)
class GatedUnit:
    """``g * sigmoid(gain * g) * (u + offset)``, g the gate up to ``limit``, u the up part from -limit to limit.

    As it stands SwiGLU; gpt-oss has gain 1.702, limit 7 and offset 1.
    """

    gain: float = 1.0
    limit: float = math.inf
    offset: float = 0.0


@dataclass(frozen=True)
class ExpertWeights:
    """Matrices of one provider's ``pack_linear``, one for each expert, joined by ``stack_weights``."""

    gate_up: LinearWeight  # E of [2F, D]: gates, then ups
    down: LinearWeight  # E of [D, F]
    gate_up_bias: Tensor | None = None  # [E, 2F]
    down_bias: Tensor | None = None  # [E, D]
    unit: GatedUnit = GatedUnit()

    @property
    def count(self) -> int:
        return self.gate_up.data.shape[0]


def stack_weights(weights: Sequence[LinearWeight]) -> LinearWeight:
    """Packed matrices of one shape as one weight, whose tensors have a first dimension more: a matrix each."""
    first = weights[0]
    joined: dict[str, Any] = {
        field.name: torch.stack([getattr(weight, field.name) for weight in weights])
        for field in fields(first)
        if isinstance(getattr(first, field.name), Tensor)
    }
    return replace(first, **joined)


def expert_weight(stacked: LinearWeight, expert: int) -> LinearWeight:
    """One matrix of a stack, as views."""
    whole = {field.name: getattr(stacked, field.name) for field in fields(stacked)}
    parts: dict[str, Any] = {name: value[expert] for name, value in whole.items() if isinstance(value, Tensor)}
    return replace(stacked, **parts)


def route(logits: Tensor, top_k: int, renormalise: bool) -> Routing:
    """Each token's ``top_k`` likeliest experts; of equal logits the lower number comes first.

    A weight is the expert's softmax probability among all, ``renormalise``: among the chosen ones. A row with a NaN
    has weights of NaN, and any experts.

    Args: logits ``[N, E]`` of a floating dtype, 1 <= top_k <= E. Raises ValueError for another top_k.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"route: top_k must be from 1 to {logits.shape[1]}, not {top_k}")
    scores = logits.float()
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    masses = (scores - scores.amax(-1, keepdim=True)).exp()  # of a row with a NaN all are NaN
    chosen = masses.gather(1, order)
    return Routing(order.int(), chosen / (chosen if renormalise else masses).sum(-1, keepdim=True))


def gated_unit(x: Tensor, unit: GatedUnit) -> Tensor:
    """x ``[N, 2F]``: gates, then ups. Returns ``[N, F]`` in x's dtype."""
    gate, up = x.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=unit.limit), up.clamp(-unit.limit, unit.limit)
    return (gate * torch.sigmoid(unit.gain * gate) * (up + unit.offset)).to(x.dtype)


def experts(
    x: Tensor, routing: Routing, weights: ExpertWeights, shared: Tensor | None = None, shared_gate: Tensor | None = None
) -> Tensor:
    """For each token the weighted sum of what its experts make of it: ``down(unit(gate_up(x)))``.

    Products and the unit round to x's dtype, as ``linear`` and ``silu_and_mul`` do; the sum, in the order of
    ``routing``, is fp32 and rounded once. A row depends on nothing but itself and its routing; rows of one expert read
    its matrices once.

    Args: x ``[N, D]``; ``shared`` ``[N, D]`` and ``shared_gate`` ``[N, 1]``, both or neither: the sum begins with
        ``sigmoid(shared_gate) * shared``, the part of an expert that all tokens meet (Qwen2-MoE). All of one dtype.
    Returns ``[N, D]``.
    """
    if weights.gate_up.data.dim() != 3:
        raise ValueError("experts: weights must be stacks of this provider's pack_linear")
    n, width = x.shape
    made = x.new_empty((*routing.experts.shape, width))
    for expert in sorted(set(routing.experts.flatten().tolist())):
        token, place = (routing.experts == expert).nonzero(as_tuple=True)
        up_bias, down_bias = (None if b is None else b[expert] for b in (weights.gate_up_bias, weights.down_bias))
        hidden = gated_unit(linear(x[token], expert_weight(weights.gate_up, expert), up_bias), weights.unit)
        made[token, place] = linear(hidden, expert_weight(weights.down, expert), down_bias)
    total = x.new_zeros((n, width), dtype=torch.float32)
    if shared is not None and shared_gate is not None:
        total = torch.sigmoid(shared_gate.float()) * shared.float()
    for place in range(routing.experts.shape[1]):
        total = total + routing.weights[:, place, None] * made[:, place].float()
    return total.to(x.dtype)
