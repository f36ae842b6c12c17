"""What a caller receives. Only committed tokens ever appear here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pearl.messages import PromptLogprobs, TokenLogprobs

FinishReason = Literal["stop", "length", "abort"]
# How a token came. Drafted and accepted: tested while the rest of its window was drafted ("pre-verify"), in a verdict
# on a window that was pending ("post-verify"), in a window that was prepared for the verdict before ("prepared"). The
# target's own: in place of a drafted token that was rejected ("corrected"), or where none was drafted ("plain").
TokenSource = Literal["pre-verify", "post-verify", "prepared", "corrected", "plain"]


@dataclass
class RequestMetrics:
    """Counters of one output. A *run* is a stretch of accepted drafted tokens: in PEARL it ends with a rejection,
    in the methods that verify window by window also with its window.

    Rounds, forwards and drafted tokens are what was worked. Tested and accepted tokens and runs are what became the
    output: what a verdict says about tokens behind the output's end is not counted, so that accepted <= output_tokens
    and accepted <= tested <= drafted. What a prepared window drafted counts as drafted if its verdict came.
    """

    rounds: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    drafted: int = 0  # tokens the drafter proposed
    tested: int = 0  # of them, tokens in whose place verification put a returned token
    accepted: int = 0  # of them, returned tokens
    runs: int = 0
    prepared: int = 0  # windows drafted ahead, each for one verdict that might come,
    prepared_hits: int = 0  # of them, those whose verdict came,
    prepared_in_vain: int = 0  # tokens drafted in the others
    prepared_accepted: int = 0  # accepted tokens that such windows drafted
    acceptance_histogram: list[int] = field(default_factory=list)  # [i]: verdicts that made i drafted tokens output
    preemptions: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    output_tokens: int = 0
    arrival: float = 0.0  # time.monotonic(), as are the next two
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.tested if self.tested else 0.0

    @property
    def mean_accepted_tokens(self) -> float:
        """Mean length of the accepted runs (the paper's M)."""
        return self.accepted / self.runs if self.runs else 0.0

    @property
    def target_forwards_per_token(self) -> float:
        return self.target_forwards / self.output_tokens if self.output_tokens else 0.0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrival

    @property
    def latency(self) -> float | None:
        return None if self.finished_at is None else self.finished_at - self.arrival


class OutputDelta(NamedTuple):
    """What one engine step added to one output."""

    request_id: int
    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]  # for each token: proposed by the drafter (True) or drawn from the target (False)
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    metrics: RequestMetrics
    error: str | None = None
    prompt_logprobs: PromptLogprobs | None = None  # where asked for, with the first token of a prompt's first output
    sources: tuple[TokenSource, ...] = ()  # of each token, where asked for

    @classmethod
    def given_up(cls, request_id: int, metrics: RequestMetrics, error: str | None) -> OutputDelta:
        """The end of an output that gets no other token."""
        return cls(request_id, (), (), "", None, "abort", metrics, error)


@dataclass
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None  # why the engine gave up on it ("abort"); what came before is still exact
    prompt_logprobs: PromptLogprobs | None = None  # of a prompt's first output, where asked for: see RequestOutput
    sources: list[TokenSource] = field(default_factory=list)  # of each token, where asked for

    def extend(self, delta: OutputDelta | StreamChunk) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.drafted.extend(delta.drafted)
        if delta.sources:
            self.sources.extend(delta.sources)
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *delta.logprobs]
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason, self.metrics, self.error = delta.finish_reason, delta.metrics, delta.error


@dataclass
class RequestOutput:
    """One prompt with its ``n`` outputs."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def metrics(self) -> RequestMetrics:
        """Of the first output; with n > 1 each output has its own."""
        return self.outputs[0].metrics

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Of each prompt token, where asked for; of the first one None. One for all ``n`` outputs; None where the first
        output ended, with an error, before its first token.
        """
        return self.outputs[0].prompt_logprobs

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(frozen=True)
class StreamChunk:
    """A piece of a streamed output. Concatenating ``text`` gives exactly the text that ``generate`` returns; so do
    ``token_ids`` and ``logprobs``, of which there is one for each token, where asked for. ``prompt_logprobs``, where
    asked for, come with the first piece of output 0."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]
    finish_reason: FinishReason | None
    metrics: RequestMetrics
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    sources: tuple[TokenSource, ...] = ()  # of each token, where asked for

    @classmethod
    def of(cls, index: int, d: OutputDelta) -> StreamChunk:
        tokens, logprobs = (d.token_ids, d.drafted), (d.logprobs, d.prompt_logprobs)
        return cls(index, d.text, *tokens, d.finish_reason, d.metrics, d.error, *logprobs, d.sources)
