"""What the verifier tells the scheduler and the outbox."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pearl.messages.drafted import Windows


class TokenLogprobs(NamedTuple):
    """Log-softmax of the target's raw logits: of the token itself, and of the most likely alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...]


# Of each prompt token; of the first one nothing can be told.
PromptLogprobs = tuple[TokenLogprobs | None, ...]


class FoundPrompt(NamedTuple):
    """Log-probabilities of ``size`` prompt tokens, made by a call."""

    size: int
    entries: Callable[[], tuple[TokenLogprobs, ...]]


class Decision(NamedTuple):
    """The verdict for one request: what was tested, how much of it holds, what follows."""

    tested: tuple[int, ...]
    accepted: int
    next_token: int | None  # correction or bonus token
    logprobs: Callable[[], tuple[TokenLogprobs, ...]] | None  # of each committed token, where asked for: made by a call
    error: str | None = None  # why the request cannot go on: nothing of the verdict is an output

    @property
    def committed(self) -> tuple[int, ...]:
        held = self.tested[: self.accepted]
        return held if self.next_token is None else (*held, self.next_token)

    @property
    def rejected(self) -> bool:
        return self.accepted < len(self.tested)


@dataclass(frozen=True)
class VerifyResult:
    decisions: dict[int, Decision] = field(default_factory=dict)  # by request id
    windows: Windows = field(default_factory=dict)  # what was drafted in this round
    prepared: Windows = field(default_factory=dict)
    prompts: dict[int, FoundPrompt] = field(default_factory=dict)  # by request id
