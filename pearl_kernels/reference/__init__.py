"""The operators' specification in plain torch. Providers are tested against these functions, and only these."""

from pearl_kernels.reference.layers import (
    LinearWeight,
    WeightFormat,
    add_rms_norm,
    copy_blocks,
    linear,
    pack_linear,
    pack_quantized,
    rms_norm,
    rope_and_cache,
    silu_and_mul,
    verify_attention,
    weight_rows,
)
from pearl_kernels.reference.philox import Stream
from pearl_kernels.reference.quantized import QuantizedMatrix, alike, dequantize, stack_outputs
from pearl_kernels.reference.sampling import MOST_ALTERNATIVES, Alternatives, Sampled, SamplingTensors, sample
from pearl_kernels.reference.verification import Rule, Verdict, verify

__all__ = [
    "MOST_ALTERNATIVES",
    "Alternatives",
    "LinearWeight",
    "QuantizedMatrix",
    "Rule",
    "Sampled",
    "SamplingTensors",
    "Stream",
    "Verdict",
    "WeightFormat",
    "add_rms_norm",
    "alike",
    "copy_blocks",
    "dequantize",
    "linear",
    "pack_linear",
    "pack_quantized",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_and_mul",
    "stack_outputs",
    "verify",
    "verify_attention",
    "weight_rows",
]
