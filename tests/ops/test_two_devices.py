"""Tensors of one call are on one device: a kernel that gets an address of another GPU fails, or is silently slow."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from attention_packages import FakeFlashAttn
from ops_support import interpreted
from torch import Tensor

from pearl_kernels import QuantizedMatrix, SamplingTensors, cpu, flash_attn, flashinfer, triton
from pearl_kernels.checks import Checks
from pearl_kernels.native import NativeLayers, NativeSampling

OTHER = torch.device("cpu", 1)  # of the right type: only its number is another
N, HEADS, DIM, PAGES, PAGE, VOCAB = 2, 2, 64, 3, 256, 40


class Elsewhere(Tensor):
    """A tensor that says that it lies on the second device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return OTHER


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Elsewhere)  # type: ignore[return-value]


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(op: str, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors that the operator takes, all of them, and what else it must have."""
    x, scale = torch.ones(N, DIM, dtype=dtype), torch.ones(DIM, dtype=dtype)
    heads, cache = torch.ones(N, HEADS, DIM, dtype=dtype), torch.zeros(PAGES, PAGE, HEADS, DIM, dtype=dtype)
    logits, ones = torch.zeros(N, VOCAB, dtype=dtype), torch.ones(N)
    params = SamplingTensors(ones.clone(), ints(0, 0), ones.clone(), torch.zeros(N), longs(1, 2))
    one = SamplingTensors(*(getattr(params, f.name)[:1] for f in dataclasses.fields(params)))
    return {
        "rms_norm": {"x": x, "weight": scale, "eps": 1e-6},
        "add_rms_norm": {"x": x, "residual": x.clone(), "weight": scale, "eps": 1e-6},
        "linear": {"x": x, "weight": cpu.OPERATORS["pack_linear"](torch.ones(8, DIM, dtype=dtype)),
                   "bias": torch.ones(8, dtype=dtype)},
        "rope_and_cache": {"q": heads, "k": heads.clone(), "v": heads.clone(), "positions": longs(0, 1),
                           "cos_sin": torch.ones(4, DIM), "k_cache": cache, "v_cache": cache.clone(),
                           "slot_mapping": longs(0, 1), "q_norm": scale, "k_norm": scale.clone()},
        "verify_attention": {"q": heads, "k_cache": cache, "v_cache": cache.clone(), "block_tables": ints(0)[None],
                             "query_start": ints(0, N), "context_lens": ints(N), "scale": 1.0},
        "copy_blocks": {"cache": cache, "pairs": longs(0, 1)[None]},
        "sample": {"logits": logits, "params": params, "positions": longs(0, 1), "vocab_size": VOCAB},
        "verify": {"logits": logits, "draft_tokens": longs(1, -1), "row_start": ints(0, N), "positions": longs(0, 1),
                   "params": one, "vocab_size": VOCAB, "draft_logprobs": torch.zeros(N),
                   "draft_logits": logits.clone(), "draft_rows": ints(0, -1), "draft_temperature": torch.ones(1)},
    }[op]  # fmt: skip


class AnyModule(ModuleType):
    """Takes whatever a compiled module would be called with."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *args: 0) if name.endswith("_workspace") else (lambda *args: None)


def cuda_operators() -> dict[str, Callable[..., Any]]:
    """What ``pearl_kernels.cuda.operators`` makes of a module, on CPU tensors."""
    made = AnyModule("_cuda"), Checks("cpu", (torch.float32, torch.bfloat16, torch.float16))
    layers, sampling = NativeLayers(*made), NativeSampling(*made)
    names = ("rms_norm", "add_rms_norm", "rope_and_cache", "verify_attention", "copy_blocks")
    return {"verify": sampling.verify} | {name: getattr(layers, name) for name in names}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, *args: Any) -> None: ...

        def plan(self, *args: Any, **kwargs: Any) -> None: ...

        def run(self, q: Tensor, cache: Any) -> Tensor:
            return q

    monkeypatch.setitem(sys.modules, "flash_attn", FakeFlashAttn())
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper))


def cases() -> list[Any]:
    packaged = (("flash_attn", flash_attn.OPERATORS), ("flashinfer", flashinfer.OPERATORS))
    ours = (("cpu", cpu.OPERATORS), ("cuda", cuda_operators()))
    found = [(name, op, ops[op], torch.float32) for name, ops in ours for op in ops if op not in NOT_ASKED]
    found += [(name, "verify_attention", ops["verify_attention"], torch.bfloat16) for name, ops in packaged]
    params = [pytest.param(*case[1:], id=f"{case[0]}-{case[1]}") for case in found]
    for op in triton.MODULES:
        if op not in NOT_ASKED:
            params.append(pytest.param(op, op, torch.float32, id=f"triton-{op}", marks=interpreted))
    return params


# Of one tensor, maybe beside packed ones.
NOT_ASKED = (
    "pack_linear", "pack_quantized", "silu_and_mul", "gelu_and_mul", "scale_and_cap", "weight_rows", "route", "experts",
)  # fmt: skip


@pytest.mark.parametrize(("op", "function", "dtype"), cases())
def test_a_tensor_on_another_device_is_refused_by_its_name(
    op: str, function: Any, dtype: torch.dtype, packages: None
) -> None:
    function = triton.OPERATORS[function] if isinstance(function, str) else function
    given = arguments(op, dtype)
    if op == "linear" and function is triton.OPERATORS["linear"]:  # of plain weights it leaves the checks to torch
        eights = QuantizedMatrix(torch.ones(8, DIM, dtype=torch.int8), torch.ones(8, 1), None, DIM, 8)
        given["weight"] = triton.OPERATORS["pack_quantized"](eights, dtype)
    function(**given)
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    for name in tensors[1:]:
        with pytest.raises(ValueError, match=f"{op}: {name} must be .* on cpu"):
            function(**{**given, name: elsewhere(given[name])})
    # The first one says where the call is, so that the next one is on the wrong device.
    with pytest.raises(ValueError, match=f"{op}: .* must be .* on cpu:1"):
        function(**{**given, tensors[0]: elsewhere(given[tensors[0]])})
    params = given.get("params")
    for field in dataclasses.fields(params) if params else ():
        moved = dataclasses.replace(params, **{field.name: elsewhere(getattr(params, field.name))})
        with pytest.raises(ValueError, match=f"{op}: {field.name} must be .* on cpu"):
            function(**{**given, "params": moved})


def test_sampling_parameters_that_lie_elsewhere_together_are_refused() -> None:
    """Their layout is looked at once, and names the device."""
    given = arguments("sample", torch.float32)
    fields = {f.name: elsewhere(getattr(given["params"], f.name)) for f in dataclasses.fields(given["params"])}
    given["params"] = SamplingTensors(**fields)
    assert given["params"].layout == (OTHER, N)
    with pytest.raises(ValueError, match="sample: temperature must be"):
        cpu.OPERATORS["sample"](**given)


def test_a_provider_that_launches_on_the_current_device_takes_no_tensors_of_another() -> None:
    current = 1
    checks = Checks("cpu", (torch.float32,), current=lambda: current)
    there = elsewhere(torch.ones(2))
    assert checks.beside("op", "x", there).device == OTHER
    current = 0
    with pytest.raises(ValueError, match="op: x is on cpu:1, which is not the current device"):
        checks.beside("op", "x", there)
