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


_checks = Checks("cuda", DTYPES)
_layers = NativeLayers(_cuda, _checks, where, workspace)
_sampling = NativeSampling(_cuda, _checks, where, workspace)

rms_norm = _layers.rms_norm
add_rms_norm = _layers.add_rms_norm
silu_and_mul = _layers.silu_and_mul
rope_and_cache = _layers.rope_and_cache
verify_attention = _layers.verify_attention
copy_blocks = _layers.copy_blocks
verify = _sampling.verify
