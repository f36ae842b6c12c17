"""Medusa heads (arXiv 2401.10774): each tells another token behind the one whose last hidden state all read."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pearl.heads.config import MedusaConfig
from pearl_kernels import KernelSet, LinearWeight


@dataclass(frozen=True)
class MedusaWeights:
    """Of one head: ``x + silu(W x + b)`` for each block, then ``output``."""

    blocks: tuple[tuple[LinearWeight, Tensor], ...]  # [D, D] and [D]
    output: LinearWeight  # [V, D]


class MedusaHead:
    """All of them. Stateless; call it in torch.inference_mode."""

    def __init__(self, config: MedusaConfig, weights: tuple[MedusaWeights, ...], kernels: KernelSet) -> None:
        self.config, self.weights, self.kernels = config, weights, kernels

    def logits(self, states: Tensor, head: int) -> Tensor:
        """``[M, V]`` for the target's last hidden states ``[M, D]``: of the token ``head + 2`` behind each."""
        weights = self.weights[head]
        for matrix, bias in weights.blocks:
            states = states + F.silu(self.kernels.linear(states, matrix, bias))
        logits: Tensor = self.kernels.linear(states, weights.output)
        return logits
