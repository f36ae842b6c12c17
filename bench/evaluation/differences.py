"""Outputs of all setups against plain decoding: how many are equal, and where the others part, by how much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.evaluation.records import Key, Record
from bench.greedy_agreement import TIES, shared_prefix
from pearl.llm import LLM
from pearl.sampling_params import SamplingParams


@dataclass(frozen=True)
class Difference:
    """The first one of an answer. Log-probabilities are the target's, of both tokens at that place after what is
    common, by a forward of its own: their difference is that of the logits. An output that ended has the token None.
    """

    question: str
    turn: int
    setup: str
    position: int
    expected: int | None
    token: int | None
    expected_logprob: float | None
    logprob: float | None
    tie: bool

    def sentence(self) -> str:
        where = f"{self.setup}, {self.question}, turn {self.turn + 1}, token {self.position}"
        if self.expected_logprob is None or self.logprob is None:
            return f"{where}: {self.token} for {self.expected}, where one of the outputs had ended: NO TIE"
        gap = self.expected_logprob - self.logprob
        said = f"{self.token} at {self.logprob:.4f} for {self.expected} at {self.expected_logprob:.4f}"
        return f"{where}: {said}, logits apart by {gap:.4f}: {'a tie' if self.tie else 'NO TIE'}"


@dataclass(frozen=True)
class Compared:
    """Of one setup, by its name."""

    setup: str
    answers: int
    equal: int


def compare(records: Iterable[Record], llm: LLM) -> tuple[list[Compared], list[Difference]]:
    """Of answers that must be plain decoding's (greedy, or coupled), each with its to the same question, in every
    repeat; its own repeats too.

    ``llm``: with the target, to ask it about ties. A difference that comes again in another repeat is told once.
    """
    exact = [record for record in records if record.exact]
    truth = _truth(exact)
    counts: dict[str, list[int]] = {}
    parted: dict[Key, tuple[Record, int]] = {}
    for record in exact:
        for index, output in enumerate(record.outputs):
            expected, _ = truth.get((record.questions[index], record.turn, record.temperature), (None, None))
            if expected is None:
                continue
            count = counts.setdefault(record.setup, [0, 0])
            count[0] += 1
            if output == expected:
                count[1] += 1
            else:
                parted.setdefault(Key(record.questions[index], record.turn, record.setup, 0), (record, index))
    found = []
    for record, index in parted.values():
        expected, prompt = truth[record.questions[index], record.turn, record.temperature]
        found.append(_difference(llm, record, index, prompt, expected))
    return [Compared(setup, *count) for setup, count in counts.items()], found


def _truth(exact: Sequence[Record]) -> dict[tuple[str, int, float], tuple[list[int], list[int]]]:
    """By question and turn: the first answer of the setup that the others are compared with, and the prompt."""
    found: dict[tuple[str, int, float], tuple[list[int], list[int]]] = {}
    for record in sorted(exact, key=lambda record: (record.batch, record.repeat)):
        if record.setup == record.base and record.prompts is not None:
            for question, prompt, output in zip(record.questions, record.prompts, record.outputs, strict=True):
                found.setdefault((question, record.turn, record.temperature), (output, prompt))
    return found


def _difference(llm: LLM, record: Record, index: int, prompt: Sequence[int], expected: Sequence[int]) -> Difference:
    output, question = record.outputs[index], record.questions[index]
    position = shared_prefix(expected, output)
    ours, theirs = (ids[position] if position < len(ids) else None for ids in (expected, output))
    about = (question, record.turn, record.setup, position, ours, theirs)
    if ours is None or theirs is None:
        return Difference(*about, None, None, False)
    before = [*prompt, *expected[:position]]
    likely, other = (_logprob(llm, before, token) for token in (ours, theirs))
    dtype = str(llm.models.target.model.dtype).removeprefix("torch.")
    threshold = TIES.get(dtype, TIES["bfloat16"])  # float16 rounds less than that
    return Difference(*about, likely, other, abs(likely - other) <= threshold)


def _logprob(llm: LLM, before: Sequence[int], token: int) -> float:
    """As the target's own: of a prompt's last token."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([[*before, token]], params)
    assert output.prompt_logprobs is not None
    found = output.prompt_logprobs[-1]
    assert found is not None
    return found.logprob
