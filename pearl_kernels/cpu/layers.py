"""The decoder layer's operators in C++, for fp32 and bf16: ``pearl_kernels.native.layers`` on the CPU module."""

from __future__ import annotations

import torch

from pearl_kernels.checks import Checks
from pearl_kernels.cpu import _core
from pearl_kernels.native import NativeLayers

_native = NativeLayers(_core, Checks("cpu", (torch.float32, torch.bfloat16)))

rms_norm = _native.rms_norm
add_rms_norm = _native.add_rms_norm
silu_and_mul = _native.silu_and_mul
rope_and_cache = _native.rope_and_cache
verify_attention = _native.verify_attention
copy_blocks = _native.copy_blocks
