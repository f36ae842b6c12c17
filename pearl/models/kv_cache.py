"""KV tensors of one model: allocated once, owned by its worker."""

from __future__ import annotations

import torch
from torch import Tensor

from pearl.models.model_shape import ModelShape
from pearl_kernels import KernelSet


class KVCache:
    """``layers[i]`` = (keys, values) of layer i, each ``[P, S, Hk, D]``."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    @classmethod
    def allocate(
        cls, config: ModelShape, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        shape = (num_pages, page_size, config.kv_heads, config.head_dim)
        return cls(
            [
                (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
                for _ in range(config.layers)
            ]
        )

    @staticmethod
    def bytes_per_token(config: ModelShape, dtype: torch.dtype) -> int:
        return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize

    def copy_pages(self, pairs: Tensor, kernels: KernelSet) -> None:
        """pairs: int64 ``[M, 2]``, source and destination pages."""
        for keys, values in self.layers:
            kernels.copy_blocks(keys, pairs)
            kernels.copy_blocks(values, pairs)
