"""PEARL: parallel speculative decoding. Faster answers from a large language model, with exactly its output."""

from pearl.errors import (
    ConfigurationError,
    EngineClosedError,
    EngineInUseError,
    InvalidRequestError,
    ModelLoadError,
    PearlError,
    QueueFullError,
    UnsupportedModelError,
)
from pearl.llm import LLM
from pearl.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk
from pearl.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigurationError",
    "EngineClosedError",
    "EngineInUseError",
    "InvalidRequestError",
    "ModelLoadError",
    "PearlError",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
    "UnsupportedModelError",
]
