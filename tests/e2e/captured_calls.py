"""Calls that were captured, as a device knows them: what was done at which addresses. It keeps nobody's memory alive.

Memory that was there before the capture belongs to whoever holds it. When nobody does it is gone, and a replay that
would read or write it raises ``Freed``. Memory that the capture itself took is the graph's for as long as the graph
lives, but other graphs of the pool use it in between: each replay finds poison there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_POISON = 0xFF  # in every byte: NaN of all floating dtypes, -1 of all integers


class Freed(AssertionError):
    """A replay would use memory that nobody owns any more."""


class _Place(NamedTuple):
    """Where a tensor lies."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _At:
    """In the place of a tensor among a call's arguments."""

    place: _Place


@dataclass(frozen=True)
class _Region:
    owner: StorageWeakRef
    size: int  # bytes
    of_the_graph: bool

    def look_up(self, name: str) -> torch.UntypedStorage:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.owner.cdata)
        if storage is None and not self.of_the_graph:
            raise Freed(f"{name} works on memory that was freed after it was captured")
        storage = torch.UntypedStorage(self.size) if storage is None else storage
        if self.of_the_graph:
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(_POISON)
        return storage


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    result: Any


class CapturedCalls:
    """``add`` while capturing, then ``seal``; ``replay`` as often as wanted."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._regions: list[_Region] = []
        self._numbers: dict[int, int] = {}  # of storages, by their identity
        self._held: list[torch.UntypedStorage] = []  # so that identities are unique while capturing

    def add(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        args, kwargs = self._addresses(args, False), self._addresses(kwargs, False)
        self._calls.append(_Call(function, args, kwargs, self._addresses(result, True)))

    def take(self, result: Any) -> None:
        """Memory was taken, and nothing done with it."""
        self._addresses(result, True)

    def seal(self) -> None:
        self._held.clear()
        self._numbers.clear()

    def replay(self) -> None:
        storages: dict[int, torch.UntypedStorage] = {}
        tensors: dict[_Place, Tensor] = {}
        for function, args, kwargs, result in self._calls:

            def at(place: _Place, name: str = getattr(function, "__name__", "a kernel")) -> Tensor:
                if place.storage not in storages:
                    storages[place.storage] = self._regions[place.storage].look_up(name)
                if place not in tensors:
                    empty = torch.empty(0, dtype=place.dtype)
                    tensors[place] = empty.set_(storages[place.storage], place.offset, place.size, place.stride)
                return tensors[place]

            found = function(*_tensors(args, at), **_tensors(kwargs, at))
            _put(found, _tensors(result, at))

    def _addresses(self, value: Any, made_now: bool) -> Any:
        return _with_leaves(value, Tensor, lambda tensor: _At(self._place(tensor, made_now)))

    def _place(self, tensor: Tensor, made_now: bool) -> _Place:
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._regions)
            self._regions.append(_Region(StorageWeakRef(storage), storage.nbytes(), made_now))
            self._held.append(storage)
        return _Place(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def _tensors(value: Any, at: Callable[[_Place], Tensor]) -> Any:
    return _with_leaves(value, _At, lambda leaf: at(leaf.place))


def _with_leaves(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same tuples, lists, dicts and dataclasses around changed leaves."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_with_leaves(one, kind, change) for one in value))
    if isinstance(value, tuple | list):
        return type(value)(_with_leaves(one, kind, change) for one in value)
    if isinstance(value, dict):
        return {key: _with_leaves(one, kind, change) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type | _At):
        leaves = {name: _with_leaves(getattr(value, name), kind, change) for name in value.__dataclass_fields__}
        return replace(value, **leaves)
    return value


def _put(new: Any, old: Any) -> None:
    """Into the memory of the captured result, unless it lies there already (views, and what was done in place)."""
    if isinstance(new, Tensor):
        if new.data_ptr() != old.data_ptr():
            old.copy_(new)
    elif isinstance(new, tuple | list):
        for one, other in zip(new, old, strict=True):
            _put(one, other)
