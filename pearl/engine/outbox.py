"""Committed tokens in, callers' outputs out: all of a round that the next one need not wait for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from pearl.engine.output_processor import End
from pearl.engine.request import Request, Status
from pearl.messages import Decision
from pearl.outputs import OutputDelta

_Committed = tuple[Request, tuple[int, ...], Decision, End]


class Outbox:
    """Belongs to the engine's thread.

    What a verdict committed is ``put`` here when it is, and an output that ends by a token's id or by its length ends
    there and then: the next plan must know. The rest is left to ``write``: text, stop strings, log-probabilities and
    metrics, while the models compute that next round. A stop string therefore ends an output when another round of its
    request may be under way: of that nothing is applied (``Engine``), so it is never shown and never counted.
    """

    def __init__(self, finish: Callable[[int], Request]) -> None:
        """``finish``: ``Scheduler.finish``."""
        self._finish = finish
        self._committed: deque[_Committed] = deque()
        self._written: list[OutputDelta] = []

    def put(self, request: Request, tokens: tuple[int, ...], decision: Decision) -> None:
        """Newly committed ``tokens``. What was put before must be written: ends are looked for in order."""
        end = request.output.end(tokens)
        if end[1] is not None:
            self._finish(request.id)
        self._committed.append((request, tokens, decision, end))

    @property
    def is_written(self) -> bool:
        return not self._committed

    def write(self) -> None:
        """Make outputs of what was put. What fails in the making of one ends that one, with the error."""
        while self._committed:
            committed = self._committed[0]
            try:
                self._written.append(self._output(*committed))
            except Exception as error:
                self.give_up(committed[0], sentence(error))
            self._committed.popleft()

    def drop(self, error: str) -> None:
        """End, with an error, what was put and cannot be written any more."""
        while self._committed:
            self.give_up(self._committed.popleft()[0], error)

    def give_up(self, request: Request, error: str | None) -> OutputDelta:
        """End an output without another token."""
        self._end(request)
        delta = OutputDelta.given_up(request.id, request.metrics, error)
        self._written.append(delta)
        return delta

    def take(self) -> list[OutputDelta]:
        """What was written since the last call, in order."""
        written, self._written = self._written, []
        return written

    def _output(self, request: Request, tokens: tuple[int, ...], decision: Decision, end: End) -> OutputDelta:
        """Turn committed tokens into the caller's output, cut at its end."""
        kept, text, finish_reason = request.output.text(tokens, end)
        metrics = request.metrics
        request.count(decision, kept)
        if metrics.first_token_at is None:
            metrics.first_token_at = time.monotonic()
        prompt = None if request.prompt_logprobs is None else request.prompt_logprobs.take()
        drafted = ((True,) * decision.accepted + (False,))[:kept]  # one at most, the last, is the target's own
        logprobs = None if decision.logprobs is None else decision.logprobs()[:kept]
        sources = request.sources(decision, kept) if request.params.token_sources else ()
        if finish_reason is not None:
            self._end(request)
        told = (text, logprobs, finish_reason, metrics)
        return OutputDelta(request.id, tokens[:kept], drafted, *told, prompt_logprobs=prompt, sources=sources)

    def _end(self, request: Request) -> None:
        if request.status is not Status.FINISHED:
            self._finish(request.id)
        request.end_run()
        request.metrics.finished_at = time.monotonic()


def sentence(error: BaseException) -> str:
    """What a caller is told of an error."""
    words = str(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
