"""In which order a round reaches two devices, what its clocks measure, and what the verdict waits for.

Both models work on a ``RecordingQueue`` each, which write down what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from e2e_support import Pair, prompts, token_ids
from recording_queue import CountedMark, RecordingQueue
from torch.overrides import TorchFunctionMode

from pearl import LLM, SamplingParams
from pearl.config import EngineConfig
from pearl.drafting.logits_ring import LogitsRing
from pearl.engine.model_loading import load_models
from pearl.engine.rounds import RoundRecord
from pearl.messages import Busy, Mark
from pearl.models import Decoder
from pearl.workers import GraphRunner, ModelRunner
from pearl.workers.batch_arrays import BatchLists

Notes = list[tuple[str, str]]  # (who, what)
PLAN = ("host", "plan")
PENALTY = SamplingParams(temperature=0.8, seed=3, max_tokens=14, repetition_penalty=1.2, ignore_eos=True)
PLAIN = SamplingParams(temperature=0.8, seed=4, max_tokens=14, ignore_eos=True)


@dataclass(frozen=True)
class NotedMark(CountedMark):
    place: int  # in the notes

    def wait(self) -> None:
        super().wait()
        assert isinstance(self.queue, NotingQueue)
        self.queue.note("wait")


@dataclass
class NotingQueue(RecordingQueue):
    """Anyone may look at values here: what a stream would have to wait for is no matter of these tests."""

    name: str = ""
    notes: Notes = field(default_factory=list)

    def __post_init__(self) -> None:
        self._recorder.may_look = True

    def note(self, what: str) -> None:
        self.notes.append((self.name, what))

    def operator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        recorded = super().operator(function)

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._recorder.calls is None:  # not while capturing
                self.note("launch")
            return recorded(*args, **kwargs)

        return noted

    def mark(self) -> NotedMark:
        self.note("mark")
        mark = super().mark()
        return NotedMark(mark.at, self, mark.behind, len(self.notes))

    def since(self, begin: Mark) -> Busy:
        """The device rested before ``begin``, and works right after it."""
        assert isinstance(begin, NotedMark)
        assert self.notes[begin.place] == (self.name, "launch")
        return super().since(begin)

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        replay = super().capture(call)

        def noted() -> None:
            self.note("launch")
            replay()

        return noted


@dataclass
class Noted:
    llm: LLM
    target: NotingQueue
    draft: NotingQueue
    notes: Notes
    records: list[RoundRecord]

    @property
    def rounds(self) -> list[tuple[RoundRecord, Notes]]:
        """Each with what was noted from its plan to the next one."""
        begins = [at for at, note in enumerate(self.notes) if note == PLAN]
        ends = [*begins[1:], len(self.notes)]
        return [(r, self.notes[i:j]) for r, i, j in zip(self.records, [0, *begins[1:]], ends, strict=True)]

    @property
    def busy_rounds(self) -> list[tuple[RoundRecord, Notes]]:
        """Of decoding, in which both worked and the draft drafted."""
        return [
            (record, notes)
            for record, notes in self.rounds
            if record.plan.target.work
            and all(len(work.tokens) == work.num_logits for work in record.plan.target.work)
            and any(work.num_draft for work in record.plan.draft.work)
        ]


OpenNoted = Callable[..., Noted]


@pytest.fixture
def open_noted(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenNoted]:
    """``open_noted(captured, **options)``: both models on queues that write down, captured or launched."""
    opened: list[LLM] = []

    def build(captured: bool, **options: Any) -> Noted:
        notes: Notes = []
        records: list[RoundRecord] = []
        target, draft = (NotingQueue(name=name, notes=notes) for name in ("target", "draft"))
        options = {"device": "cpu", "dtype": "float32", "capture_seconds": 0, **options}
        config = EngineConfig(target=llama.target, draft=llama.draft, **options)
        models = load_models(config)
        assert models.draft
        models = replace(models, target=on(target, models.target, captured), draft=on(draft, models.draft, captured))
        note_calls(monkeypatch, BatchLists, "arrays", lambda: notes.append(("host", "pack")))
        note_calls(monkeypatch, LogitsRing, "store", lambda: notes.append(("draft", "store")))
        opened.append(LLM.from_models(models, config, records.append))
        note_calls(monkeypatch, opened[-1].engine.scheduler, "schedule", lambda: notes.append(PLAN))
        return Noted(opened[-1], target, draft, notes, records)

    yield build
    for llm in opened:
        llm.close()


def on(queue: NotingQueue, runner: ModelRunner, captured: bool) -> ModelRunner:
    model = runner.model
    model = Decoder(model.config, model.weights, model.cos_sin, queue.kernels(model.kernels))
    kind = (GraphRunner, 40) if captured else (ModelRunner, 1)
    made = kind[0](model, runner.cache, runner.page_size, queue, kind[1])
    made.fused = None  # operator by operator, as on a GPU
    return made


def note_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[[], None]) -> None:
    call = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)


@pytest.mark.parametrize(("captured", "params"), [(False, PLAIN), (True, [PLAIN, PENALTY])], ids=["eager", "penalty"])
def test_the_target_works_while_the_host_reads_what_is_drafted(
    open_noted: OpenNoted, captured: bool, params: Any
) -> None:
    """Where each drafted token is read before the next forward, the target's is enqueued before the first is."""
    noted = open_noted(captured, window=3)
    outputs = noted.llm.generate(prompts((6, 20), seed=3), params)
    assert [output.outputs[0].error for output in outputs] == [None, None]
    assert len(noted.busy_rounds) > 3
    for _, notes in noted.busy_rounds:
        assert notes.index(("target", "launch")) < notes.index(("draft", "wait"))


def test_a_captured_window_is_enqueued_before_the_target(open_noted: OpenNoted) -> None:
    """Nobody waits for it, and to enqueue it takes less time than a forward of the target."""
    noted = open_noted(True, window=3)
    noted.llm.generate(prompts((6, 20), seed=3), PLAIN)
    assert len(noted.busy_rounds) > 3
    for _, notes in noted.busy_rounds:
        assert notes.index(("draft", "launch")) < notes.index(("target", "launch"))


@pytest.mark.parametrize("captured", [False, True])
def test_a_forward_s_time_begins_when_it_is_launched(open_noted: OpenNoted, captured: bool) -> None:
    """Not when the host begins to pack its batch (``NotingQueue.since``). Prompts, windows and lone forwards."""
    noted = open_noted(captured, window=3, max_num_batched_tokens=32)
    outputs = noted.llm.generate(prompts((6, 50), seed=3), [PLAIN, PENALTY])
    assert [output.outputs[0].error for output in outputs] == [None, None]
    for record, notes in noted.rounds:
        assert (record.target.begin > 0) == bool(record.plan.target.work)
        assert (record.proposal.busy.begin > 0) == bool(record.plan.draft.work)
        assert ("host", "pack") in notes


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 3}, {"window": 3, "method": "speculative"}], ids=str)
@pytest.mark.parametrize("captured", [False, True])
def test_a_verdict_waits_until_the_rows_that_it_may_read_are_stored(
    llama: Pair, open_noted: OpenNoted, captured: bool, options: dict[str, Any]
) -> None:
    """Rows of host-drafted tokens are stored behind the read of the token: with both models on one GPU nothing else
    makes the target's stream wait for the last of them, in this round or in one in which the draft rests."""
    noted = open_noted(captured, **options)
    found = noted.llm.generate(prompts((6, 20), seed=3), PENALTY)
    rounds = noted.rounds  # before another one stores as well
    with llama.llm(**options) as alone:
        assert token_ids(found) == token_ids(alone.generate(prompts((6, 20), seed=3), PENALTY))
    stored, seen, rested = 0, 0, 0
    for record, notes in rounds:
        stored = max((at for at, note in enumerate(notes, start=seen) if note == ("draft", "store")), default=stored)
        seen += len(notes)
        if any(decision.tested for decision in record.result.decisions.values()):
            mark = record.proposal.stored
            assert isinstance(mark, NotedMark)
            assert mark.place > stored
            assert any(mark is followed for followed in noted.target.followed)
            rested += not record.plan.draft.work
    assert stored > 0
    assert rested or "method" not in options


class TopNotes(TorchFunctionMode):
    """Notes when the most likely tokens are looked for, and values are read one by one."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("topk", "log_softmax", "item"):
            self._notes.append(("logprobs", func.__name__))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("captured", [False, True])
def test_log_probabilities_are_computed_before_the_wait_for_the_verdict(
    llama: Pair, open_noted: OpenNoted, captured: bool
) -> None:
    """One wait a round: also the committed token's own is found on the device. Requests that want different numbers."""
    params = [replace(PLAIN, logprobs=most, seed=most) for most in (3, 0, 5)] + [PLAIN]
    batch = prompts((6, 20, 9, 11), seed=3)
    noted = open_noted(captured, window=3)
    with TopNotes(noted.target.notes):
        found = noted.llm.generate(batch, params)
    for record, notes in noted.rounds:
        if record.result.decisions:
            waited = max(at for at, note in enumerate(notes) if note == ("target", "wait"))
            assert max((at for at, note in enumerate(notes) if note[0] == "logprobs"), default=0) < waited
    for most, one, prompt, output in zip((3, 0, 5, None), params, batch, found, strict=True):
        with llama.llm(window=3) as alone:
            (expected,) = alone.generate([prompt], one)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        logprobs, by_itself = output.outputs[0].logprobs, expected.outputs[0].logprobs
        assert (logprobs is None) == (by_itself is None) == (most is None)
        for mine, theirs in zip(logprobs or (), by_itself or (), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            assert len(mine.top) == most
