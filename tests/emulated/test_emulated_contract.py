"""What every provider promises: the reference's signatures, and for Triton the variants that production launches."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from pearl_kernels import reference, triton
from pearl_kernels.native import NativeLayers, NativeSampling
from pearl_kernels.provider import Provider
from pearl_kernels.registry import PROVIDERS

every_provided = pytest.mark.parametrize(
    ("provider", "op"), [pytest.param(p, op, id=f"{p.name}-{op}") for p in PROVIDERS for op in p.operators]
)
every_module = pytest.mark.parametrize("module", sorted(set(triton.MODULES.values())))


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def function_of(provider: Provider, op: str) -> Callable[..., Any]:
    """The operator; of ``cuda``, whose compiled module may be missing, the method that it would be."""
    if provider.name != "cuda":
        return provider.operators[op]
    return getattr(NativeLayers(ModuleType("_cuda"), triton.CHECKS), op, None) or getattr(
        NativeSampling(ModuleType("_cuda"), triton.CHECKS), op
    )


@every_provided
def test_signatures_are_the_reference_s(provider: Provider, op: str) -> None:
    assert parameters(function_of(provider, op)) == parameters(getattr(reference, op))


@pytest.mark.parametrize("op", triton.MODULES)
def test_an_operator_of_triton_is_the_function_of_its_name(op: str) -> None:
    function = triton.OPERATORS[op]
    assert function.__name__ == op
    assert function.__module__ == triton.MODULES[op]


@every_module
def test_variants_describe_their_kernels(module: str) -> None:
    variants = importlib.import_module(module).VARIANTS
    assert isinstance(variants, tuple)
    assert variants
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        assert list(variant.signature) == list(variant.kernel.arg_names), variant.name
        constants = {name for name, kind in variant.signature.items() if kind == "constexpr"}
        assert set(variant.constexprs) == constants, variant.name
        assert set(variant.aligned) <= set(variant.signature) - constants, variant.name


def test_variant_names_are_unique_among_modules() -> None:
    names = [v.name for module in set(triton.MODULES.values()) for v in importlib.import_module(module).VARIANTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", triton.MODULES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_each_operator_has_variants_of_the_half_precisions(op: str, dtype: str) -> None:
    module = importlib.import_module(triton.MODULES[op])
    assert any(f"*{dtype}" in variant.signature.values() for variant in module.VARIANTS)
