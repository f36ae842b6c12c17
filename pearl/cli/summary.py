"""The closing line: what an answer cost, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pearl.outputs import RequestMetrics


@dataclass(frozen=True)
class Summary:
    """Totals over outputs. ``seconds``: from arrival to the last token, loading not included."""

    tokens: int = 0
    seconds: float = 0.0
    first_token: float | None = None  # of the first output that has one
    target_forwards: int = 0
    tested: int = 0
    accepted: int = 0
    runs: int = 0

    @classmethod
    def of(cls, outputs: Sequence[RequestMetrics]) -> Summary:
        """Of outputs that were generated together: they share their time."""
        outputs = [m for m in outputs if m.output_tokens]
        begins = [m.arrival for m in outputs]
        ends = [m.finished_at for m in outputs if m.finished_at is not None]
        first_tokens = [m.time_to_first_token for m in outputs if m.time_to_first_token is not None]
        return cls(
            tokens=sum(m.output_tokens for m in outputs),
            seconds=max(ends) - min(begins) if ends else 0.0,
            first_token=min(first_tokens, default=None),
            target_forwards=sum(m.target_forwards for m in outputs),
            tested=sum(m.tested for m in outputs),
            accepted=sum(m.accepted for m in outputs),
            runs=sum(m.runs for m in outputs),
        )

    def __add__(self, other: Summary) -> Summary:
        """Of answers that were generated one after the other: their times add up."""
        return Summary(
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            other.first_token if self.first_token is None else self.first_token,
            self.target_forwards + other.target_forwards,
            self.tested + other.tested,
            self.accepted + other.accepted,
            self.runs + other.runs,
        )

    def line(self, method: str) -> str:
        """For example ``96 tokens · 211 tok/s · first token 12 ms · pearl · ...``; leaves out what was not measured."""
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.seconds:
            parts.append(f"{self.tokens / self.seconds:.1f} tok/s")
        if self.first_token is not None:
            parts.append(f"first token after {1000 * self.first_token:.0f} ms")
        parts.append(method)
        if self.tested:
            parts.append(f"acceptance {self.accepted / self.tested:.0%}")
        if self.runs:
            parts.append(f"mean accepted {self.accepted / self.runs:.1f}")
        if self.target_forwards:
            parts.append(f"{self.tokens / self.target_forwards:.2f} tokens per target forward")
        return " · ".join(parts)
