"""Operators of the engine: one specification each (``reference``), several providers, one ``registry``."""

from pearl_kernels.provider import Situation
from pearl_kernels.reference import (
    Alternatives,
    ExpertWeights,
    GatedUnit,
    LinearWeight,
    QuantizedMatrix,
    Routing,
    Rule,
    Sampled,
    SamplingTensors,
    Stream,
    Verdict,
    WeightFormat,
    stack_weights,
)
from pearl_kernels.registry import KernelSet, explain, select

__all__ = [
    "Alternatives",
    "ExpertWeights",
    "GatedUnit",
    "KernelSet",
    "LinearWeight",
    "QuantizedMatrix",
    "Routing",
    "Rule",
    "Sampled",
    "SamplingTensors",
    "Situation",
    "Stream",
    "Verdict",
    "WeightFormat",
    "explain",
    "select",
    "stack_weights",
]
