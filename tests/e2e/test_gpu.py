"""The engine on a real GPU: graphs against eager mode, streams, placements. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e_support import Pair, Rounds, acceptance, assert_at_rest, prompts, token_ids

from pearl import LLM, SamplingParams
from pearl.errors import ConfigurationError
from pearl.workers.cuda_queue import CudaQueue

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OpenLLM = Callable[..., LLM]
LENGTHS = (1, 2, 17, 40, 70, 9)
PLACES: dict[str, dict[str, Any]] = {
    "both": {"device": "cuda"},
    "draft on cpu": {"device": "cuda", "draft_device": "cpu"},
    "target on cpu": {"device": "cpu", "draft_device": "cuda"},
}
METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {"method": "autoregressive"},
    "speculative": {"method": "speculative", "window": 3},
    "pearl": {"window": 4},
    "pearl-prepared": {"window": 4, "prepared_windows": 6},
    "pearl-auto": {},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", PLACES)
def test_greedy_fp32_equals_transformers(pairs: dict[str, Pair], open_llm: OpenLLM, place: str, method: str) -> None:
    for family in ("llama", "qwen3"):
        pair, batch = pairs[family], prompts(LENGTHS)
        llm = open_llm(pair, **PLACES[place], **METHODS[method], max_num_seqs=4, max_num_batched_tokens=64)
        outputs = llm.generate(batch, SamplingParams(max_tokens=24, ignore_eos=True))
        assert [o.outputs[0].error for o in outputs] == [None] * len(batch)
        assert token_ids(outputs) == [pair.greedy(prompt, 24) for prompt in batch]
        assert_at_rest(llm)


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("method", ["speculative", "pearl", "pearl-prepared"])
def test_graphs_draw_what_eager_mode_draws(llama: Pair, open_llm: OpenLLM, method: str, verification: str) -> None:
    batch = prompts(LENGTHS, seed=3)
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=24, ignore_eos=True)
        for i, t in enumerate((0.0, 0.7, 1.0, 1.3, 0.8, 0.0))
    ]
    runs = []
    for eager in (False, True):
        llm = open_llm(llama, device="cuda", enforce_eager=eager, verification=verification, **METHODS[method])
        runs.append(llm.generate(batch, params))
    assert token_ids(runs[0]) == token_ids(runs[1])
    assert acceptance(runs[0]) == acceptance(runs[1])
    hits = [sum(output.metrics.prepared_hits for output in outputs) for outputs in runs]
    assert hits[0] == hits[1]
    assert (hits[0] > 0) == (method == "pearl-prepared")


@pytest.mark.parametrize("prepared", [0, 5])
def test_nothing_is_captured_after_the_warm_up(llama: Pair, open_llm: OpenLLM, prepared: int) -> None:
    batch = prompts(LENGTHS, seed=3)
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=24, ignore_eos=True) for i in range(6)]
    options = {"window": 3, "max_num_seqs": 3, "prepared_windows": prepared}
    llm = open_llm(llama, device="cuda", capture_seconds=120, **options)
    queues = [runner.queue for runner in (llm.models.target, llm.models.draft) if runner]
    captured = [queue.captured for queue in queues]
    assert min(captured) > 5
    outputs = llm.generate(batch, params)
    assert [queue.captured for queue in queues] == captured
    assert token_ids(outputs) == token_ids(open_llm(llama, device="cuda", enforce_eager=True).generate(batch, params))


@pytest.mark.alone
def test_the_models_work_at_the_same_time(open_llm: OpenLLM) -> None:
    """The bundled pair, on one GPU: by their events, both were busy for longer than the rounds lasted."""
    rounds = Rounds()
    llm = open_llm(device="cuda", window=6, observer=rounds)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    llm.generate("def read(", params)
    rounds.clear()
    llm.generate("class Reader", params)
    both = [r for r in rounds if r.target.seconds and r.proposal.busy.seconds]
    assert len(both) > 20
    busy = sum(r.target.seconds + r.proposal.busy.seconds for r in both)
    assert busy > 1.1 * sum(r.whole.seconds for r in both)


def test_a_queue_captures_marks_and_follows() -> None:
    device = torch.device("cuda", 0)
    first, second = CudaQueue("first", device), CudaQueue("second", device, urgent=True)
    values = torch.ones(1 << 24, device=device)
    total = torch.zeros(1, device=device)
    torch.cuda.synchronize()

    def work() -> None:
        for _ in range(20):
            values.mul_(2).mul_(0.5)
        values.add_(1)

    replay = first.capture(work)
    with first.enter("work"):
        begin = first.mark()
        replay()
        took = first.since(begin)
    with second.enter("sum"):
        second.follow(first.mark())
        total.copy_(values[:10].sum())
    second.synchronize()
    assert total.item() == 10 * 3  # the warm-up, and one replay
    assert 0 < took.seconds < 1


def test_more_multiprocessors_than_there_are() -> None:
    with pytest.raises(ConfigurationError, match="leave some to the target"):
        CudaQueue("target", torch.device("cuda", 0), spare=10_000)
