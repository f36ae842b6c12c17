"""What is captured, when, and never again; what a capture in a round teaches; and one that fails."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from e2e_support import Pair, prompts, token_ids
from graphed_llm import OpenGraphed

from pearl import SamplingParams
from pearl.errors import CaptureError, EngineClosedError
from pearl.pace import MeasuredRound


def test_a_serving_mix_captures_nothing_after_the_warm_up(llama: Pair, open_graphed: OpenGraphed) -> None:
    """Prompts of 1 to 400 tokens, greedy, sampled and penalised, more than run at once; in some rounds windows are
    prepared."""
    options = {"window": 8, "max_num_seqs": 12, "max_num_batched_tokens": 96, "prepared_windows": 9}
    graphed = open_graphed(llama, most_rows=108, most=(12, 9), capture_seconds=3600, **options)
    numbers = itertools.cycle((9, 0, 9, 3))
    decide = graphed.llm.engine.scheduler._pace.decide
    graphed.llm.engine.scheduler._pace.decide = lambda *of: decide(*of)._replace(branches=next(numbers))  # type: ignore[method-assign]
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
    assert sum(output.metrics.prepared_hits for output in outputs) > 9
    late = [record.proposal.on_device for record in graphed.rounds if record.proposal.on_device]
    assert {(windows.alternatives, len(windows.branches) > 2) for windows in late} >= {(8, True), (3, True), (0, False)}


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
