"""Operators of the engine: one specification each (``reference``), several providers, one ``registry``."""

from pearl_kernels.provider import Situation
from pearl_kernels.reference import (
    Alternatives,
    LinearWeight,
    QuantizedMatrix,
    Rule,
    Sampled,
    SamplingTensors,
    Stream,
    Verdict,
    WeightFormat,
)
from pearl_kernels.registry import KernelSet, explain, select

__all__ = [
    "Alternatives",
    "KernelSet",
    "LinearWeight",
    "QuantizedMatrix",
    "Rule",
    "Sampled",
    "SamplingTensors",
    "Situation",
    "Stream",
    "Verdict",
    "WeightFormat",
    "explain",
    "select",
]
