"""A provider's operators by name, imported when the first of a module is taken, not when the registry is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class LazyOperators(Mapping[str, Callable[..., Any]]):
    """``modules`` maps an operator to the module that has a function of its name."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules

    def __getitem__(self, op: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(self._modules[op]), op)
        return function

    def __contains__(self, op: object) -> bool:
        return op in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
