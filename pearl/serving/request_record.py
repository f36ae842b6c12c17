"""What is known of an HTTP request that generates, for metrics and the log. Belongs to the event loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import Histogram

from pearl.outputs import RequestMetrics, StreamChunk


class Latencies(NamedTuple):
    """In seconds."""

    first_token: Histogram
    inter_token: Histogram
    whole: Histogram


class RequestRecord:
    def __init__(
        self,
        request_id: str,
        prompt_tokens: int,
        outputs: int,
        latencies: Latencies,
        on_end: Callable[[RequestRecord], None],
    ) -> None:
        """``outputs``: how many there will be."""
        self.id, self.prompt_tokens = request_id, prompt_tokens
        self.arrival = time.monotonic()
        self.first_token: float | None = None  # seconds since arrival
        self.generated = 0  # tokens
        self.reasons: dict[int, str] = {}  # finish reason by output
        self.error: str | None = None
        self._expected, self._latencies, self._on_end = outputs, latencies, on_end
        self._seen: dict[int, RequestMetrics] = {}
        self._latest: dict[int, float] = {}  # when the latest chunk of each output came
        self._open = True

    @property
    def outputs(self) -> tuple[RequestMetrics, ...]:
        """Of those that have begun."""
        return tuple(self._seen.values())

    @property
    def outcome(self) -> str:
        if self.error is not None:
            return "failed"
        return "finished" if len(self.reasons) == self._expected else "cancelled"

    def saw(self, chunk: StreamChunk) -> None:
        now, index = time.monotonic(), chunk.index
        latest = self._latest.get(index)
        if latest is not None:
            self._latencies.inter_token.observe(now - latest)
        else:
            self._seen[index] = chunk.metrics
            self._latencies.first_token.observe(now - self.arrival)
            if self.first_token is None:
                self.first_token = now - self.arrival
        self._latest[index] = now
        self.generated += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.reasons[index] = chunk.finish_reason
            self._latencies.whole.observe(now - self.arrival)

    def failed(self, error: str) -> None:
        self.error = error

    def end(self) -> None:
        """Idempotent."""
        if self._open:
            self._open = False
            self._on_end(self)
