"""The operators' specification in plain torch. Providers are tested against these functions, and only these."""

from pearl_kernels.reference.experts import (
    ExpertWeights,
    GatedUnit,
    Routing,
    expert_weight,
    experts,
    route,
    stack_weights,
)
from pearl_kernels.reference.layers import (
    LinearWeight,
    WeightFormat,
    add_rms_norm,
    copy_blocks,
    gelu_and_mul,
    linear,
    pack_linear,
    pack_quantized,
    rms_norm,
    rope_and_cache,
    scale_and_cap,
    silu_and_mul,
    verify_attention,
    weight_rows,
)
from pearl_kernels.reference.philox import Stream
from pearl_kernels.reference.quantized import QuantizedMatrix, dequantize, stack_outputs, take_outputs
from pearl_kernels.reference.sampling import MOST_ALTERNATIVES, Alternatives, Sampled, SamplingTensors, sample
from pearl_kernels.reference.verification import Rule, Verdict, verify

__all__ = [
    "MOST_ALTERNATIVES",
    "Alternatives",
    "ExpertWeights",
    "GatedUnit",
    "LinearWeight",
    "QuantizedMatrix",
    "Routing",
    "Rule",
    "Sampled",
    "SamplingTensors",
    "Stream",
    "Verdict",
    "WeightFormat",
    "add_rms_norm",
    "copy_blocks",
    "dequantize",
    "expert_weight",
    "experts",
    "gelu_and_mul",
    "linear",
    "pack_linear",
    "pack_quantized",
    "rms_norm",
    "rope_and_cache",
    "route",
    "sample",
    "scale_and_cap",
    "silu_and_mul",
    "stack_outputs",
    "stack_weights",
    "take_outputs",
    "verify",
    "verify_attention",
    "weight_rows",
]
