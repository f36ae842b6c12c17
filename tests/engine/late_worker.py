"""A worker that is asynchronous without a thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pearl.workers import Reply


class _LateReply(Reply[Any]):
    __slots__ = ("_call", "_worker")

    def __init__(self, worker: LateWorker, call: Callable[[], Any]) -> None:
        super().__init__()
        self._worker, self._call = worker, call

    def result(self, timeout: float = -1) -> Any:
        self._worker.log.append((self._worker.name, "asked"))
        self._worker.rest()
        return super().result(timeout)

    def make(self) -> None:
        self.run(self._worker.work, self._call)


class LateWorker:
    """Really asynchronous, in one thread: a call is made when somebody asks for what it returns, as late as can be."""

    blocks = False

    def __init__(self, name: str, log: list[tuple[str, str]] | None) -> None:
        self.name, self.log = name, [] if log is None else log
        self._waiting: _LateReply | None = None

    @property
    def is_busy(self) -> bool:
        return self._waiting is not None

    def submit(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Reply[Any]:
        assert not self.is_busy, "it was not at rest when this round began"
        self.log.append((self.name, "begun"))
        self._waiting = _LateReply(self, partial(call, *args, **kwargs))
        return self._waiting

    def work(self, call: Callable[[], Any]) -> Any:
        return call()

    def rest(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.make()

    def close(self) -> None:
        assert not self.is_busy, "closed while it works"
        self.log.append((self.name, "closed"))
