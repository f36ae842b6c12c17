"""The C++ provider: fp32 and bf16 on CPU, for the instruction set found at run time (csrc/).

The environment variable PEARL_CPU_ISA=amx|avx512bf16|avx512|avx2|scalar overrides that choice; one that the CPU lacks
is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pearl_kernels.cpu.checks import CHECKS
from pearl_kernels.provider import Situation

_NAMES = (
    "rms_norm",
    "add_rms_norm",
    "silu_and_mul",
    "gelu_and_mul",
    "scale_and_cap",
    "pack_linear",
    "pack_quantized",
    "weight_rows",
    "linear",
    "route",
    "experts",
    "rope_and_cache",
    "verify_attention",
    "sample",
    "verify",
    "copy_blocks",
)
_HEAD_DIM_MATTERS = ("rope_and_cache", "verify_attention")


def _load() -> tuple[Mapping[str, Callable[..., Any]], str | None]:
    """Functions by name, and why they cannot run: without the compiled core they exist, so that the reason is told."""
    try:
        from pearl_kernels.cpu import experts, layers, linear, sampling
    except ImportError as error:
        reason = f"the C++ core is not built ({error}); pip install -e . builds it"

        def unavailable(*_args: Any, **_kwargs: Any) -> NoReturn:
            raise RuntimeError(reason)

        return dict.fromkeys((*_NAMES, "verify_numbers"), unavailable), reason
    return vars(layers) | vars(linear) | vars(experts) | vars(sampling), None


_FUNCTIONS, _LOAD_ERROR = _load()
OPERATORS = {name: _FUNCTIONS[name] for name in _NAMES}
VERIFY_NUMBERS = _FUNCTIONS["verify_numbers"]


def refuses(op: str, situation: Situation) -> str | None:
    """None if ``op`` can run in ``situation``, else why not. RuntimeError if PEARL_CPU_ISA asks for the impossible."""
    if _LOAD_ERROR is not None:
        return _LOAD_ERROR
    from pearl_kernels.cpu import _core

    _core.isa()  # a wrong PEARL_CPU_ISA must not become a silent fallback
    if situation.device != "cpu":
        return f"runs on cpu, not on {situation.device}"
    if situation.dtype not in CHECKS.dtypes:
        return f"computes float32 and bfloat16, not {situation.dtype}"
    if op in _HEAD_DIM_MATTERS and (situation.head_dim % 8 or not 8 <= situation.head_dim <= 256):
        return f"needs a head_dim that is a multiple of 8 up to 256, not {situation.head_dim}"
    return None


def bind(op: str, situation: Situation) -> Callable[..., Any]:
    """The operator for one worker: a product on its own threads, weights in its format."""
    if _LOAD_ERROR is None and situation.threads > 1 and op in ("linear", "experts"):
        from pearl_kernels.cpu.experts import ThreadedExperts
        from pearl_kernels.cpu.linear import ThreadedLinear

        return ThreadedLinear(situation.threads) if op == "linear" else ThreadedExperts(situation.threads)
    if op == "pack_linear" and situation.weights != "full":
        return functools.partial(OPERATORS[op], weights=situation.weights)
    return OPERATORS[op]
