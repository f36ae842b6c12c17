"""The operators of the compiled module, on the tensors' device and its current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.checks import Checks
from pearl_kernels.cuda import DTYPES, _cuda
from pearl_kernels.native import NativeLayers, NativeSampling
from pearl_kernels.native.module import workspace


def where(tensor: Tensor) -> tuple[int, int]:
    """The number of the tensor's device, and the stream that is current there."""
    device = tensor.device
    return tensor.get_device(), torch.cuda.current_stream(device).cuda_stream


class StreamCounters:
    """Zeros for each stream, with which the blocks of a call find out who is last.

    Calls on one stream follow each other, and each leaves zeros, so that they can share; a captured call must be
    replayed on the stream that it was captured on. While a stream captures its first call there are none.
    """

    def __init__(self, count: int = 1 << 16) -> None:
        """``count``: a block of rows takes one for eight splits of its keys; larger calls use their workspace."""
        self._count = count
        self._of: dict[tuple[int, int], Tensor] = {}

    def __call__(self, like: Tensor) -> Tensor | None:
        key = where(like)
        found = self._of.get(key)
        if found is None and not torch.cuda.is_current_stream_capturing():
            found = self._of[key] = torch.zeros(self._count, dtype=torch.int32, device=like.device)
        return found


_CHECKS = Checks("cuda", DTYPES)
_LAYERS = NativeLayers(_cuda, _CHECKS, where, workspace, StreamCounters())
_SAMPLING = NativeSampling(_cuda, _CHECKS, where, workspace)

rms_norm = _LAYERS.rms_norm
add_rms_norm = _LAYERS.add_rms_norm
silu_and_mul = _LAYERS.silu_and_mul
gelu_and_mul = _LAYERS.gelu_and_mul
scale_and_cap = _LAYERS.scale_and_cap
rope_and_cache = _LAYERS.rope_and_cache
verify_attention = _LAYERS.verify_attention
copy_blocks = _LAYERS.copy_blocks
verify = _SAMPLING.verify
