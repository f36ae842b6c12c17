"""Captured forwards, verifications and windows: the tokens of eager mode, and one wait a round.

The device is ``RecordingQueue``, the models and kernels are real. A captured call that depended on anything but its
static inputs would repeat the first round for ever, and fail here.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from e2e_support import ALL_SETTINGS, KNOWN, Pair, Rounds, acceptance, assert_at_rest, poison_ring, prompts, token_ids
from recording_queue import CountedMark, RecordingQueue
from torch import Tensor

import pearl.llm
from pearl import LLM, SamplingParams
from pearl.config import EngineConfig
from pearl.engine.model_loading import load_models
from pearl.errors import CaptureError, EngineClosedError
from pearl.models import Decoder
from pearl.pace import MeasuredRound
from pearl.workers import GraphRunner, ModelRunner

LENGTHS = (1, 2, 3, 15, 16, 17, 40, 70)
TOKENS = 24
PLACES = ("target draft", "target draft apart", "target apart", "draft")
SAMPLED = [
    SamplingParams(temperature=t, seed=31 * i, max_tokens=TOKENS - i, ignore_eos=True, **cutoff)
    for i, (t, cutoff) in enumerate(
        [(0.0, {}), (0.7, {}), (1.0, {"top_k": 20}), (1.3, {"top_p": 0.8}), (0.9, {"min_p": 0.05}),
         (0.8, {"draft_temperature": 1.2}), (1.0, {"draft_temperature": 0.0}), (0.0, {})]
    )
]  # fmt: skip


@dataclass
class Graphed:
    llm: LLM
    target: RecordingQueue | None
    draft: RecordingQueue | None
    rounds: Rounds

    @property
    def queues(self) -> list[RecordingQueue]:
        return [queue for queue in (self.target, self.draft) if queue]


OpenGraphed = Callable[..., Graphed]


@pytest.fixture
def open_graphed() -> Iterator[OpenGraphed]:
    """``open_graphed(pair, on="target draft", **options)``: the models named work on a recording device each; "apart":
    the target's is another one."""
    with ExitStack() as stack:

        def build(
            pair: Pair,
            on: str = "target draft",
            most_rows: int = 40,
            most: tuple[int, int] = (0, 0),
            **options: Any,
        ) -> Graphed:
            paths = {"target": pair.target, "draft": pair.draft}
            config = EngineConfig(**{**paths, "device": "cpu", "dtype": "float32", "capture_seconds": 0, **options})
            models, rounds = load_models(config), Rounds()
            # To torch "cpu:0" is the CPU, but it is not the device of the other model's tensors.
            elsewhere = torch.device("cpu", 0) if "apart" in on else torch.device("cpu")
            target = RecordingQueue(elsewhere) if "target" in on else None
            draft = RecordingQueue() if "draft" in on and models.draft else None
            if target:
                models = replace(models, target=on_graphs(models.target, target, most_rows, *most))
            if draft and models.draft:
                models = replace(models, draft=on_graphs(models.draft, draft, most_rows, most[0], 1))
            return Graphed(stack.enter_context(LLM.from_models(models, config, rounds)), target, draft, rounds)

        yield build


def on_graphs(runner: ModelRunner, queue: RecordingQueue, most_rows: int, *limits: int) -> GraphRunner:
    model = runner.model
    attend = model.kernels.verify_attention

    def checked(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor,
                *rest: Any) -> Any:  # fmt: skip
        """Padding, and windows that have ended, may read any page; but one that is named."""
        read = torch.arange(tables.shape[1]) * keys.shape[1] < lengths[:, None]
        assert ((tables >= 0) | ~read).all()
        assert (lengths <= tables.shape[1] * keys.shape[1]).all()
        return attend(q, keys, values, tables, starts, lengths, *rest)

    kernels = queue.kernels(replace(model.kernels, verify_attention=checked))
    with torch.inference_mode():
        for tensor in (t for layer in runner.cache.layers for t in layer):
            tensor.fill_(torch.nan)
    recorded = Decoder(model.config, model.weights, model.cos_sin, kernels)
    return GraphRunner(recorded, runner.cache, runner.page_size, queue, most_rows, *limits)


SETTINGS = ["autoregressive", "pearl-1", "pearl-3", "pearl-8", "pearl-auto", "pearl-no-pre-3", "pearl-no-post-3",
            "pearl-neither-4", "speculative-3", "ngram-pearl"]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "setting"),
    [*(("llama", setting) for setting in SETTINGS), ("mistral", "pearl-3"), ("qwen2", "pearl-4"), ("qwen3", "pearl-8")],
)
def test_greedy_batches_equal_transformers(
    pairs: dict[str, Pair], open_graphed: OpenGraphed, family: str, setting: str
) -> None:
    """Late joiners, prompts in chunks and all phases in one batch."""
    pair, batch = pairs[family], prompts(LENGTHS)
    graphed = open_graphed(pair, **ALL_SETTINGS.get(setting, {"window": 4}), max_num_seqs=5, max_num_batched_tokens=32)
    outputs = graphed.llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert [o.outputs[0].error for o in outputs] == [None] * len(batch)
    assert token_ids(outputs) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert all(queue.replayed > 2 for queue in graphed.queues)
    assert_at_rest(graphed.llm)


@pytest.mark.parametrize(
    ("setting", "verification", "on"),
    [
        *((setting, "rejection", "target draft") for setting in ("pearl-1", "speculative-3", "pearl-no-pre-3")),
        *(("pearl-4", rule, on) for rule in ("rejection", "coupled") for on in PLACES),
    ],
)
def test_sampled_batches_equal_eager_mode(
    llama: Pair, open_graphed: OpenGraphed, setting: str, verification: str, on: str
) -> None:
    """Also where only one of the models is on a device, or each on its own: rows, or tokens, cross."""
    options = {**ALL_SETTINGS.get(setting, {"window": 4}), "verification": verification, "max_num_seqs": 4}
    batch = prompts(LENGTHS, seed=4)
    with llama.llm(**options) as eager:
        expected = eager.generate(batch, SAMPLED)
    graphed = open_graphed(llama, on, **options)
    outputs = graphed.llm.generate(batch, SAMPLED)
    assert token_ids(outputs) == token_ids(expected)
    assert acceptance(outputs) == acceptance(expected)
    assert [o.metrics.rounds for o in outputs] == [o.metrics.rounds for o in expected]
    assert_at_rest(graphed.llm)


@pytest.mark.parametrize("on", PLACES)
@pytest.mark.parametrize("seeded", [True, False])
def test_blocks_equal_eager_mode(
    llama: Pair, open_graphed: OpenGraphed, monkeypatch: pytest.MonkeyPatch, on: str, seeded: bool
) -> None:
    """Without seeds, which here are counted, and with them, where tokens are judged one by one."""
    batch, options = prompts(LENGTHS, seed=4), {"window": 4, "verification": "block", "max_num_seqs": 4}
    params = SAMPLED if seeded else [replace(one, seed=None) for one in SAMPLED]
    made = []
    for build in (lambda: llama.llm(**options), lambda: open_graphed(llama, on, **options).llm):
        seeds = itertools.count(5)
        monkeypatch.setattr(pearl.llm.secrets, "randbits", lambda bits, seeds=seeds: next(seeds))
        with build() as llm:
            outputs = llm.generate(batch, params)
        made.append((token_ids(outputs), [(o.metrics.rounds, o.metrics.accepted) for o in outputs]))
    assert made[0] == made[1]


@pytest.mark.parametrize("method", ["pearl", "speculative"])
def test_windows_that_end_at_every_place_of_a_page(llama: Pair, open_graphed: OpenGraphed, method: str) -> None:
    """Nine requests, so that shapes are padded; some end while others draft on; more rows than are captured."""
    options = {"method": method, "window": 5, "page_size": 4, "max_num_seqs": 9}
    batch = prompts(range(4, 22), seed=8)
    params = [SamplingParams(temperature=0.6, seed=i, max_tokens=5 + i, ignore_eos=True) for i in range(18)]
    with llama.llm(**options) as eager:
        expected = eager.generate(batch, params)
    graphed = open_graphed(llama, most_rows=16, **options)
    outputs = graphed.llm.generate(batch, params)
    assert [o.outputs[0].error for o in outputs] == [None] * len(batch)
    assert token_ids(outputs) == token_ids(expected)
    # The drafts too: a drafter that works on wrong rows or keys would only be wrong more often.
    assert [(o.metrics.rounds, o.metrics.accepted) for o in outputs] == [
        (o.metrics.rounds, o.metrics.accepted) for o in expected
    ]
    decoding = [
        r.plan.target.work for r in graphed.rounds if all(w.num_logits == len(w.tokens) for w in r.plan.target.work)
    ]
    rows = [sum(len(work.tokens) for work in works) for works in decoding if works]
    assert min(rows) < 10
    assert max(rows) > 16
    if method == "speculative":  # as many rows as sequences in the captured shape, and yet not a row for each
        assert any(
            (len(w), sum(len(i.forward.tokens) for i in w)) == (9, 10)
            for w in (r.plan.draft.work for r in graphed.rounds)
        )


def test_requests_that_need_the_host_for_each_token_draft_eagerly(llama: Pair, open_graphed: OpenGraphed) -> None:
    """Penalties, beside a request without, then the latter alone."""
    params = [
        SamplingParams(max_tokens=9, temperature=0.8, seed=1, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=0.8, seed=2, logprobs=2, ignore_eos=True),
    ]
    batch = prompts((5, 20), seed=9)
    with llama.llm(window=3) as eager:
        expected = eager.generate(batch, params)
    graphed = open_graphed(llama, window=3)
    assert graphed.draft
    assert graphed.target
    with graphed.draft.looking(), graphed.target.looking():
        outputs = graphed.llm.generate(batch, params)
    assert token_ids(outputs) == token_ids(expected)
    assert outputs[1].outputs[0].logprobs == expected[1].outputs[0].logprobs
    for record in graphed.rounds:
        late = record.proposal.on_device
        assert set(late.rows if late else ()) == {
            work.forward.state.request_id
            for work in record.plan.draft.work
            if not work.forward.state.params.changes_logits and work.num_draft
        }


@pytest.mark.parametrize("on", PLACES)
def test_a_draft_of_a_smaller_vocabulary(narrow: dict[str, Pair], open_graphed: OpenGraphed, on: str) -> None:
    batch = prompts(LENGTHS, seed=6)
    with narrow["llama"].llm(window=4) as eager:
        expected = eager.generate(batch, SAMPLED)
    graphed = open_graphed(narrow["llama"], on, window=4)
    poison_ring(graphed.llm)
    outputs = graphed.llm.generate(batch, SAMPLED)
    assert token_ids(outputs) == token_ids(expected)
    assert acceptance(outputs) == acceptance(expected) > 0.1
    assert any(max(tokens[:-1]) >= KNOWN for tokens in token_ids(outputs))


def test_preempted_requests_and_shared_pages(llama: Pair, open_graphed: OpenGraphed) -> None:
    """So little KV that requests give way; and completions of one prompt, which share pages until one writes."""
    options = {"window": 3, "page_size": 4, "max_model_len": 64, "max_num_seqs": 4}
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=3, n=3, ignore_eos=True)
    batch = prompts((18, 18), seed=2)
    with llama.llm(**options) as eager:
        expected = eager.generate(batch, params)
        tokens = eager.models.num_pages * 4
        memory = eager.config.kv_cache_memory or 0
        assert not memory
        bytes_per_token = sum(
            2 * r.model.config.layers * r.model.config.kv_heads * r.model.config.head_dim * 4
            for r in (eager.models.target, eager.models.draft)
            if r
        )
    graphed = open_graphed(llama, kv_cache_memory=tokens * bytes_per_token * 2 // 5, **options)
    outputs = graphed.llm.generate(batch, params)
    assert token_ids(outputs) == token_ids(expected)
    assert sum(c.metrics.preemptions for o in outputs for c in o.outputs) > 0
    assert_at_rest(graphed.llm)


@pytest.mark.parametrize("setting", ["pearl-4", "speculative-3", "autoregressive"])
def test_the_host_waits_once_a_round_and_captures_only_what_is_new(
    llama: Pair, open_graphed: OpenGraphed, setting: str
) -> None:
    options = ALL_SETTINGS.get(setting, {"window": 4})
    graphed = open_graphed(llama, **options, prefix_caching=False)
    batch, params = (
        prompts((5, 20, 33), seed=5),
        SamplingParams(max_tokens=40, temperature=0.7, seed=5, ignore_eos=True),
    )
    first = token_ids(graphed.llm.generate(batch, params))
    captured, rounds = [queue.captured for queue in graphed.queues], len(graphed.rounds)
    waits, replays = sum(queue.waits for queue in graphed.queues), sum(queue.replayed for queue in graphed.queues)
    assert token_ids(graphed.llm.generate(batch, params)) == first
    assert [queue.captured for queue in graphed.queues] == captured
    assert len(graphed.rounds) == 2 * rounds
    late = sum(record.proposal.on_device is not None for record in graphed.rounds[rounds:])
    # The verdict does not wait for windows, but for their first tokens: they are waited for when they are read.
    assert sum(queue.waits for queue in graphed.queues) - waits == rounds + late
    assert sum(queue.replayed for queue in graphed.queues) - replays >= rounds - 2


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("on", ["target draft", "target draft apart"])
def test_a_verdict_waits_for_the_windows_first_tokens_only(
    llama: Pair, open_graphed: OpenGraphed, on: str, rule: str
) -> None:
    """And for their q, also of another device. The recording device does what is behind a mark only when somebody
    waits for it."""
    graphed = open_graphed(llama, on, window=4, verification=rule)
    assert graphed.draft
    assert graphed.target
    params = SamplingParams(max_tokens=40, temperature=0.7, seed=5, ignore_eos=True)
    outputs = graphed.llm.generate(prompts((5, 20, 33), seed=5), params)
    with llama.llm(window=4, verification=rule) as eager:
        assert token_ids(outputs) == token_ids(eager.generate(prompts((5, 20, 33), seed=5), params))
    late = [r.proposal.on_device for r in graphed.rounds if r.proposal.on_device and r.result.decisions]
    followed = {id(mark) for mark in graphed.target.followed}
    assert len(late) > 10
    for windows in late:
        assert isinstance(windows.first_ready, CountedMark)
        assert isinstance(windows.ready, CountedMark)
        assert windows.ready.behind - windows.first_ready.behind == windows.steps - 1
        assert id(windows.first_ready) in followed
        assert id(windows.ready) not in followed
    assert max(windows.steps for windows in late) == 4
    firsts = {id(windows.first_ready) for windows in late}
    draft_s = [m for m in graphed.target.followed if isinstance(m, CountedMark) and m.queue is graphed.draft]
    assert {id(mark) for mark in draft_s} <= firsts


def test_a_serving_mix_captures_nothing_after_the_warm_up(llama: Pair, open_graphed: OpenGraphed) -> None:
    """Prompts of 1 to 400 tokens, greedy, sampled and penalised, more than run at once."""
    options = {"window": 8, "max_num_seqs": 12, "max_num_batched_tokens": 96}
    graphed = open_graphed(llama, most_rows=108, most=(12, 9), capture_seconds=3600, **options)
    made = [queue.captured for queue in graphed.queues]
    assert min(made) > 9
    chance = random.Random(3)
    batch = prompts([chance.choice((1, 7, 40, 200, 400)) for _ in range(40)], seed=7)
    params = [
        SamplingParams(temperature=chance.choice((0.0, 0.9)), seed=i, max_tokens=chance.randint(2, 40), ignore_eos=True,
                       repetition_penalty=1.3 if i % 8 == 5 else 1.0)
        for i in range(40)
    ]  # fmt: skip
    with ExitStack() as penalties:  # are the host's
        for queue in graphed.queues:
            penalties.enter_context(queue.looking())
        outputs = graphed.llm.generate(batch, params)
    with llama.llm(**options) as eager:
        assert token_ids(outputs) == token_ids(eager.generate(batch, params))
    assert [queue.captured for queue in graphed.queues] == made
    stats = graphed.llm.engine.stats
    assert (stats.rounds, stats.preparations) == (len(graphed.rounds), 0)
    assert sum(queue.replayed for queue in graphed.queues) > stats.rounds
    rows = {sum(len(work.tokens) for work in record.plan.target.work) for record in graphed.rounds}
    assert len(rows) > 12


def test_an_engine_around_the_same_models_captures_nothing_of_them_again(
    llama: Pair, open_graphed: OpenGraphed
) -> None:
    graphed = open_graphed(
        llama, most_rows=6, most=(2, 3), window=2, max_num_seqs=2, capture_seconds=3600, prefix_caching=False
    )
    assert graphed.target
    before = graphed.target.captured, graphed.target.replayed
    assert min(before) > 3
    graphed.llm.variant(window=1)
    assert (graphed.target.captured, graphed.target.replayed) == before


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-3", "speculative-3", "ngram-pearl"])
def test_outputs_made_while_the_next_round_runs_are_those_of_eager_mode(
    llama: Pair, open_graphed: OpenGraphed, setting: str
) -> None:
    """Stop strings, found with another round in flight; log-probabilities, read when it is; ends by length and id."""
    options = {**ALL_SETTINGS[setting], "max_num_seqs": 4}
    batch = prompts(LENGTHS, seed=9)
    with llama.llm(**options) as eager:
        long = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=2)
        found = eager.generate(batch, long)
        params = []
        for i, output in enumerate(found):
            text, ids = output.outputs[0].text, output.outputs[0].token_ids
            end = [{"stop": text[len(text) // 2 :][:5]}, {"stop_token_ids": [ids[9]]}, {"max_tokens": 7}][i % 3]
            params.append(replace(long, **end))
        expected = eager.generate(batch, params)
    graphed = open_graphed(llama, **options)
    outputs = graphed.llm.generate(batch, params)
    for mine, theirs in zip(outputs, expected, strict=True):
        a, b = mine.outputs[0], theirs.outputs[0]
        assert (a.text, a.token_ids, a.drafted, a.finish_reason) == (b.text, b.token_ids, b.drafted, b.finish_reason)
        counts = [(m.output_tokens, m.accepted, m.tested, m.runs, m.rounds, m.drafted) for m in (a.metrics, b.metrics)]
        assert counts[0] == counts[1]
        assert len(a.logprobs or ()) == len(a.token_ids)
        for one, other in zip(a.logprobs or (), b.logprobs or (), strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop", "length"}
    assert_at_rest(graphed.llm)


def test_an_engine_that_nobody_closes_waits_for_its_round_in_flight(llama: Pair) -> None:
    """The device still writes to its KV, which would be another's memory."""
    config = EngineConfig(target=llama.target, draft=llama.draft, device="cpu", dtype="float32", capture_seconds=0)
    models, queues = load_models(config), (RecordingQueue(), RecordingQueue())
    assert models.draft
    llm = LLM.from_models(
        replace(
            models, target=on_graphs(models.target, queues[0], 40), draft=on_graphs(models.draft, queues[1], 40, 0, 1)
        ),
        config,
    )
    llm.generate([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    next(stream)
    assert llm.engine._in_flight is not None
    waited = [queue.waits for queue in queues]
    del models, llm, stream
    gc.collect()
    assert [queue.waits for queue in queues] == [count + 1 for count in waited]
    assert not any(queue._recorder.waiting for queue in queues)


def test_rounds_that_capture_teach_nothing(llama: Pair, open_graphed: OpenGraphed) -> None:
    graphed = open_graphed(llama, window="auto", max_window=3)
    learned: list[MeasuredRound] = []
    graphed.llm.engine._pace.observe = learned.append  # type: ignore[method-assign]
    graphed.llm.generate(prompts((5, 20, 33), seed=5), SamplingParams(max_tokens=40, ignore_eos=True))
    made = sum(queue.captured for queue in graphed.queues)
    assert sum(record.preparations for record in graphed.rounds) == graphed.llm.engine.stats.preparations == made > 2
    decoding = [
        record
        for record in graphed.rounds
        if all(len(work.tokens) == work.num_logits for work in record.plan.target.work)
        and all(len(work.forward.tokens) <= 2 for work in record.plan.draft.work)
    ]
    assert any(record.preparations for record in decoding)
    assert len(learned) == sum(not record.preparations for record in decoding)


@pytest.mark.parametrize("while_capturing", [True, False])
def test_memory_that_runs_out_in_a_capture_ends_the_engine_elsewhere_the_round(
    llama: Pair, open_graphed: OpenGraphed, while_capturing: bool
) -> None:
    graphed = open_graphed(llama, window=3, max_num_seqs=2)
    draft, runner = graphed.draft, graphed.llm.models.draft
    assert draft
    assert runner
    sample, healthy = runner.kernels.sample, replace(runner.kernels)

    def out_of_memory(*args: Any) -> Any:
        if (draft._recorder.calls is not None) == while_capturing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(*args)

    runner.kernels = replace(runner.kernels, sample=out_of_memory)
    outputs = graphed.llm.generate(prompts((5, 20, 33), seed=5), SamplingParams(max_tokens=9, ignore_eos=True))
    errors = [output.outputs[0].error or "" for output in outputs]
    assert all("CUDA out of memory." in error for error in errors)
    runner.kernels = healthy
    if while_capturing:
        assert graphed.llm.engine.stats.rounds < 3  # the third request was answered without one
        with pytest.raises(EngineClosedError, match="CaptureError") as closed:
            graphed.llm.generate([1, 2, 3])
        assert isinstance(closed.value.__cause__, CaptureError)
    else:
        (output,) = graphed.llm.generate([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
        assert output.outputs[0].error is None
