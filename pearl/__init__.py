"""PEARL: parallel speculative decoding. Faster answers from a large language model, with exactly its output."""

from typing import TYPE_CHECKING, Any

from pearl.errors import (
    ConfigurationError,
    EngineClosedError,
    EngineDrainingError,
    EngineInUseError,
    InvalidRequestError,
    ModelLoadError,
    PearlError,
    QueueFullError,
    UnsupportedModelError,
)
from pearl.sampling_params import SamplingParams
from pearl.structured_output import StructuredOutput

if TYPE_CHECKING:
    from pearl.llm import LLM
    from pearl.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigurationError",
    "EngineClosedError",
    "EngineDrainingError",
    "EngineInUseError",
    "InvalidRequestError",
    "ModelLoadError",
    "PearlError",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
    "StructuredOutput",
    "UnsupportedModelError",
]

# What needs torch is imported when it is first asked for: `pearl --help` does not wait for it.
_MODULES = {"LLM": "llm"} | dict.fromkeys(
    ("CompletionOutput", "RequestMetrics", "RequestOutput", "StreamChunk"), "outputs"
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
