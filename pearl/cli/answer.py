"""Generates one answer and shows it as it grows: what ``generate`` and ``chat`` have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pearl.attribution import Attribution
from pearl.cli.resident import resident
from pearl.cli.summary import Summary
from pearl.cli.terminal import DRAFTED, OWN, Terminal
from pearl.errors import RoundError
from pearl.interrupts import InterruptGuard
from pearl.llm import LLM
from pearl.outputs import CompletionOutput, StreamChunk
from pearl.sampling_params import SamplingParams


class Display:
    """Sees every chunk of an answer; this one shows nothing."""

    def show(self, chunk: StreamChunk) -> None:
        """A chunk, as soon as it is committed."""

    def finish(self) -> None:
        """After the last chunk, also after an interruption."""


class TextDisplay(Display):
    """Writes the text as it comes, coloured by origin where there are colours.

    Of several outputs the first unfinished one is live; the ones behind it wait for their turn. A single output goes
    into a pipe exactly as it is; on a screen, among others, or with ``end_lines`` its last line is ended.
    """

    def __init__(
        self, terminal: Terminal, llm: LLM, prompt: Sequence[int], n: int = 1, end_lines: bool = False
    ) -> None:
        self._terminal, self._n = terminal, n
        self._end_lines = end_lines or terminal.interactive or n > 1
        self._attributions = [Attribution(llm.tokenizer.detokenizer(list(prompt))) for _ in range(n)]
        self._waiting: defaultdict[int, list[StreamChunk]] = defaultdict(list)
        self._live = 0
        self._at_line_start, self._titled = True, False

    def show(self, chunk: StreamChunk) -> None:
        self._waiting[chunk.index].append(chunk)
        while self._live < self._n and self._drain():
            self._end_output()

    def finish(self) -> None:
        while self._live < self._n:  # what an interruption left waiting
            self._drain()
            self._end_output()

    def _drain(self) -> bool:
        """Write what the live output has; whether that ends it."""
        chunks = self._waiting.pop(self._live, [])
        if self._n > 1 and not self._titled:
            self._terminal.note(f"── {self._live + 1} of {self._n} ──")
            self._titled = True
        for chunk in chunks:
            for piece, drafted in self._attributions[self._live].split(chunk):
                self._terminal.write(piece, DRAFTED if drafted else OWN)
                self._at_line_start = piece.endswith("\n")
        return bool(chunks) and chunks[-1].finish_reason is not None

    def _end_output(self) -> None:
        if self._end_lines and not self._at_line_start:
            self._terminal.write("\n")
        self._live += 1
        self._at_line_start, self._titled = True, False


@dataclass(frozen=True)
class Answer:
    outputs: list[CompletionOutput]

    @property
    def interrupted(self) -> bool:
        return any(output.finish_reason is None for output in self.outputs)

    @property
    def summary(self) -> Summary:
        return Summary.of([output.metrics for output in self.outputs])

    def closing_line(self, method: str) -> str:
        parts = ["interrupted"] if self.interrupted else []
        return " · ".join(filter(None, (*parts, self.summary.line(method), resident())))


def generate_answer(llm: LLM, prompt: Sequence[int], params: SamplingParams, display: Display) -> Answer:
    """Stream an answer to ``display``. Ctrl-C ends it between two rounds, with what there is.

    Raises RoundError if the engine gave up on the request; what was shown stays.
    """
    outputs = [CompletionOutput(index) for index in range(params.n)]
    with InterruptGuard() as interrupt, llm.stream(prompt, params) as chunks:
        for chunk in chunks:
            outputs[chunk.index].extend(chunk)
            display.show(chunk)
            if interrupt.requested:
                break
    display.finish()
    if errors := [output.error for output in outputs if output.error is not None]:
        raise RoundError(f"the engine failed, the answer is incomplete: {errors[0]}")
    return Answer(outputs)
