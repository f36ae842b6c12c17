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


_CHECKS = Checks("cuda", DTYPES)
_LAYERS = NativeLayers(_cuda, _CHECKS, where, workspace)
_SAMPLING = NativeSampling(_cuda, _CHECKS, where, workspace)

rms_norm = _LAYERS.rms_norm
add_rms_norm = _LAYERS.add_rms_norm
silu_and_mul = _LAYERS.silu_and_mul
rope_and_cache = _LAYERS.rope_and_cache
verify_attention = _LAYERS.verify_attention
copy_blocks = _LAYERS.copy_blocks
verify = _SAMPLING.verify
