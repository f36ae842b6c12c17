"""Medusa heads (arXiv 2401.10774): each tells another token behind the one whose last hidden state all read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pearl.heads.config import MedusaConfig
from pearl_kernels import KernelSet, LinearWeight

Block = tuple[LinearWeight, Tensor]  # ``x + silu(W x + b)``


@dataclass(frozen=True)
class MedusaWeights:
    """Of H heads, each of as many blocks, then a matrix. The first blocks read the same states: they are one matrix."""

    first: Block  # [H * D, D] and [H * D]
    later: tuple[tuple[Block, ...], ...]  # of each head, [D, D] and [D]
    outputs: tuple[LinearWeight, ...]  # of each head, [V, D]


class MedusaHead:
    """All of them. Stateless; call it in torch.inference_mode."""

    def __init__(self, config: MedusaConfig, weights: MedusaWeights, kernels: KernelSet) -> None:
        self.config, self.weights, self.kernels = config, weights, kernels

    def states(self, last: Tensor) -> Tensor:
        """``[M, H, D]``, of each head behind its blocks, for the target's last hidden states ``[M, D]``."""
        matrix, bias = self.weights.first
        stacked = self.kernels.linear(last, matrix, bias).view(last.shape[0], self.config.heads, last.shape[1])
        states = last[:, None] + F.silu(stacked)
        if self.config.blocks == 1:
            return states
        every = [self._later(states[:, head], blocks) for head, blocks in enumerate(self.weights.later)]
        return torch.stack(every, dim=1)

    def logits(self, states: Tensor, head: int) -> Tensor:
        """``[M, V]`` of the token ``head + 2`` behind each; states: its own, ``[M, D]``."""
        logits: Tensor = self.kernels.linear(states, self.weights.outputs[head])
        return logits

    def _later(self, states: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        for matrix, bias in blocks:
            states = states + F.silu(self.kernels.linear(states, matrix, bias))
        return states
