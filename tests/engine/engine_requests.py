"""Requests as tests of the engine want them, what models are told of them, and a text for each token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pearl.engine.output_processor import OutputProcessor
from pearl.engine.request import Request
from pearl.messages import Drafted, SequenceState
from pearl.outputs import RequestMetrics
from pearl.sampling_params import SamplingParams

EOS = 0


class PieceDetokenizer:
    """One fixed text for each token id; ``tail`` is what only ``flush`` gives out."""

    def __init__(self, pieces: Sequence[str] | None = None, tail: str = "") -> None:
        self._pieces, self._tail = pieces, tail

    def feed(self, tokens: Sequence[int]) -> str:
        return "".join(f"<{token}>" if self._pieces is None else self._pieces[token] for token in tokens)

    def flush(self) -> str:
        return self._tail


def request_of(
    request_id: int,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    params: SamplingParams | None = None,
    eos_ids: Collection[int] = (EOS,),
    seed: int = 0,
    pinned: bool = False,
    rekeys: bool = False,
) -> Request:
    params = params or SamplingParams(max_tokens=max_tokens)
    output = OutputProcessor(PieceDetokenizer(), params, max_tokens, eos_ids)
    metrics = RequestMetrics()
    return Request(request_id, params, seed, list(prompt), len(prompt), max_tokens, output, metrics, pinned, rekeys)


def drafted(*tokens: int) -> tuple[Drafted, ...]:
    return tuple(Drafted(token, 0.0, -1) for token in tokens)


def sequence_state(
    params: SamplingParams, history: Sequence[int] | None = None, prompt_length: int = 1
) -> SequenceState:
    return SequenceState(1, 0, params, 0, prompt_length, None if history is None else tuple(history))
