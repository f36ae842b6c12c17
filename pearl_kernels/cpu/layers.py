"""The decoder layer's operators in C++, for fp32 and bf16: ``pearl_kernels.native.layers`` on the CPU module."""

from __future__ import annotations

from pearl_kernels.cpu import _core
from pearl_kernels.cpu.checks import CHECKS
from pearl_kernels.native import NativeLayers

_NATIVE = NativeLayers(_core, CHECKS)

rms_norm = _NATIVE.rms_norm
add_rms_norm = _NATIVE.add_rms_norm
silu_and_mul = _NATIVE.silu_and_mul
gelu_and_mul = _NATIVE.gelu_and_mul
scale_and_cap = _NATIVE.scale_and_cap
rope_and_cache = _NATIVE.rope_and_cache
verify_attention = _NATIVE.verify_attention
copy_blocks = _NATIVE.copy_blocks
