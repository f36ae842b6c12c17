"""The operators of a compiled module on raw pointers: checked tensors in, addresses on. One source for CPU and CUDA."""

from pearl_kernels.native.layers import NativeLayers
from pearl_kernels.native.module import NativeModule
from pearl_kernels.native.sampling import RULE_CODES, NativeSampling

__all__ = ["RULE_CODES", "NativeLayers", "NativeModule", "NativeSampling"]
