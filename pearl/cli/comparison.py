"""A conversation once more, decoded without drafting: how much faster it was, and that it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pearl.cli.summary import Summary
from pearl.llm import LLM
from pearl.sampling_params import SamplingParams


@dataclass(frozen=True)
class Exchange:
    """What the model was given, and what it answered."""

    prompt: Sequence[int]
    answer: Sequence[int]
    summary: Summary


@dataclass(frozen=True)
class Comparison:
    method: str
    drafted: Summary
    plain: Summary
    differing: int  # answers, of all
    answers: int

    def lines(self) -> list[str]:
        drafted, plain = (summary.tokens / summary.seconds for summary in (self.drafted, self.plain))
        equal = "the same tokens" if not self.differing else f"{self.differing} of {self.answers} answers differ"
        return [
            f"{'autoregressive':16}{plain:7.1f} tok/s",
            f"{self.method:16}{drafted:7.1f} tok/s   {drafted / plain:.2f} times as fast · {equal}",
        ]


def again(llm: LLM, exchanges: Sequence[Exchange], params: SamplingParams, method: str) -> Comparison | None:
    """Decode every answer of more than one token with ``llm``, one after the other. None if there are none.

    ``params``: greedy ones, as others draw other tokens.
    """
    kept = [exchange for exchange in exchanges if len(exchange.answer) > 1]
    drafted, plain, differing = Summary(), Summary(), 0
    for exchange in kept:
        # An answer that was interrupted is compared as far as it came.
        (output,) = llm.generate([list(exchange.prompt)], replace(params, max_tokens=len(exchange.answer)))
        drafted, plain = drafted + exchange.summary, plain + Summary.of([output.metrics])
        differing += list(output.outputs[0].token_ids) != list(exchange.answer)
    return Comparison(method, drafted, plain, differing, len(kept)) if kept else None
