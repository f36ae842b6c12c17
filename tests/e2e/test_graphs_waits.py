"""When the host waits for a device that works on captured calls: once a round, and before its memory is let go."""

from __future__ import annotations

import gc

import pytest
from e2e_support import ALL_SETTINGS, Pair, prompts, token_ids
from graphed_llm import OpenGraphed, on_devices
from recording_queue import CountedMark, RecordingQueue

from pearl import LLM, SamplingParams
from pearl.config import EngineConfig
from pearl.engine.model_loading import load_models


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


@pytest.mark.parametrize("prepared", [0, 5])
@pytest.mark.parametrize(("on", "rule"), [("target draft", "coupled"), ("target draft apart", "rejection")])
def test_a_verdict_waits_for_the_windows_first_tokens_only(
    llama: Pair, open_graphed: OpenGraphed, on: str, rule: str, prepared: int
) -> None:
    """And for their q, also of another device; not for branches that join. The recording device does what is behind a
    mark only when somebody waits for it."""
    graphed = open_graphed(llama, on, window=4, verification=rule, prepared_windows=prepared)
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
        joins = any(branch.token is None for branch, *_ in windows.branches)
        assert joins <= bool(prepared)
        assert windows.ready.behind - windows.first_ready.behind == windows.steps - 1 + joins
        assert id(windows.first_ready) in followed
        assert id(windows.ready) not in followed
    assert max(windows.steps for windows in late) == 4
    firsts = {id(windows.first_ready) for windows in late}
    draft_s = [m for m in graphed.target.followed if isinstance(m, CountedMark) and m.queue is graphed.draft]
    assert {id(mark) for mark in draft_s} <= firsts
    windows = sum(record.proposal.on_device is not None for record in graphed.rounds)
    assert graphed.draft.waits + graphed.target.waits == len(graphed.rounds) + windows


def test_an_engine_that_nobody_closes_waits_for_its_round_in_flight(llama: Pair) -> None:
    """The device still writes to its KV, which would be another's memory."""
    config = EngineConfig(target=llama.target, draft=llama.draft, device="cpu", dtype="float32", capture_seconds=0)
    models, queues = load_models(config), (RecordingQueue(), RecordingQueue())
    assert models.draft
    llm = LLM.from_models(on_devices(models, *queues), config)
    llm.generate([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
    next(stream)
    assert llm.engine._in_flight is not None
    waited = [queue.waits for queue in queues]
    del models, llm, stream
    gc.collect()
    assert [queue.waits for queue in queues] == [count + 1 for count in waited]
    assert not any(queue._recorder.waiting for queue in queues)
