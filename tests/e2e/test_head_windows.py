"""What heads draft, and from which logits, is what the same heads in plain torch say: in every phase of a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from e2e_support import Rounds, acceptance, assert_at_rest, token_ids
from head_checks import HeadCheck

from pearl import LLM, SamplingParams
from pearl.bench.measure import replay_alone
from pearl.messages import Windows
from pearl.request_factory import RequestFactory

if TYPE_CHECKING:
    from conftest import Headed
    from graphed_llm import OpenGraphed

OpenLLM = Callable[..., LLM]
TOKENS = 22
SETTINGS: dict[str, dict[str, Any]] = {
    "pearl-1": {"window": 1},
    "pearl-3": {"window": 3},
    "pearl-6": {"window": 6},
    "no-pre-3": {"window": 3, "pre_verify": False},
    "no-post-3": {"window": 3, "post_verify": False},
    "speculative-4": {"window": 4, "method": "speculative"},
    "prepared-4": {"window": 4, "prepared_windows": 6},
    "prepared-no-pre-3": {"window": 3, "pre_verify": False, "prepared_windows": 5},
    "transformers-3": {"window": 3, "backend": "transformers"},
    "auto": {},
}
both = pytest.mark.parametrize("kind", ["eagle", "medusa"])


@both
@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_windows_of_mixed_batches(headed: dict[str, Headed], open_llm: OpenLLM, kind: str, setting: str) -> None:
    """Late joiners, chunks of prompts, and pages that windows cross."""
    own = headed[kind]
    check = HeadCheck(own.pair.judge, own.plain)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "page_size": 4, **SETTINGS[setting]}
    llm = open_llm(own.pair, **options, observer=check)
    check.watch(llm, own.batch)
    outputs = llm.generate(own.batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [own.pair.greedy(prompt, TOKENS) for prompt in own.batch]
    if setting == "auto":  # which may find that drafting does not pay here
        return
    assert acceptance(outputs) > 0.2
    assert check.checked > 60
    assert check.continued > 0 or setting in ("pearl-1", "no-post-3", "speculative-4")
    assert_at_rest(llm)


@both
@pytest.mark.parametrize("setting", ["pearl-3", "speculative-4", "prepared-4"])
def test_sampled_windows_and_their_rows(
    headed: dict[str, Headed], open_llm: OpenLLM, kind: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejections at every place; what the verdict will read as q is the row that the token was drawn from. With seeds,
    and drafted all the same, so that each run is alike.
    """
    monkeypatch.setattr(RequestFactory, "_is_pinned", lambda self, params: False)
    own = headed[kind]
    check = HeadCheck(own.pair.judge, own.plain)
    llm = open_llm(own.pair, **SETTINGS[setting], max_num_seqs=3, page_size=4, observer=check)
    check.watch(llm, own.batch)
    outputs = llm.generate(own.batch, SamplingParams(temperature=0.4, seed=5, max_tokens=TOKENS, ignore_eos=True))
    assert check.after_rejection > 10
    assert 0.02 < acceptance(outputs) < 0.98
    rejected = {place for o in outputs for place, count in enumerate(o.metrics.acceptance_histogram) if count}
    assert len(rejected) > 2
    assert check.hits > 0 or setting != "prepared-4" or kind == "medusa"
    assert_at_rest(llm)


def test_states_of_a_tensor_parallel_target(headed: dict[str, Headed], open_llm: OpenLLM) -> None:
    """They are whole on its first rank, whose embeddings the head takes, too."""
    own = headed["eagle"]
    check = HeadCheck(own.pair.judge, own.plain)
    llm = open_llm(own.pair, window=3, page_size=4, max_num_batched_tokens=24, target_parallel=2, observer=check)
    check.watch(llm, own.batch)
    outputs = llm.generate(own.batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [own.pair.greedy(prompt, TOKENS) for prompt in own.batch]
    assert acceptance(outputs) > 0.2
    assert check.continued > 0
    assert_at_rest(llm)


@both
def test_prefixes_that_are_found(headed: dict[str, Headed], open_llm: OpenLLM, kind: str) -> None:
    """Neither the target nor the head computes again what an earlier request left; a changed token ends the prefix."""
    own = headed[kind]
    longest = own.batch[-1]
    batches = [[longest], [longest, [*longest[:33], 7, 8, 9], longest[:34]], [[5, *longest[1:]], longest[:9]]]
    check = HeadCheck(own.pair.judge, own.plain)
    llm = open_llm(own.pair, window=3, page_size=4, observer=check)
    found = []
    for batch in batches:
        check.watch(llm, batch)
        outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
        assert token_ids(outputs) == [own.pair.reference(prompt, TOKENS).tokens[:TOKENS] for prompt in batch]
        found.append([output.metrics.cached_tokens for output in outputs])
    assert found == [[0], [36, 32, 32], [0, 4]]
    assert_at_rest(llm)


@both
def test_requests_that_are_preempted(headed: dict[str, Headed], open_llm: OpenLLM, kind: str) -> None:
    own = headed[kind]
    check = HeadCheck(own.pair.judge, own.plain)
    llm = open_llm(own.pair, window=3, page_size=4, max_num_seqs=6, kv_cache_memory=110_000, max_model_len=80,
                   observer=check)  # fmt: skip
    check.watch(llm, own.batch)
    outputs = llm.generate(own.batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [own.pair.greedy(prompt, TOKENS) for prompt in own.batch]
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert_at_rest(llm)


@both
def test_beside_requests_that_are_not_drafted_for(headed: dict[str, Headed], open_llm: OpenLLM, kind: str) -> None:
    own = headed[kind]
    check = HeadCheck(own.pair.judge, own.plain)
    llm = open_llm(own.pair, window=3, page_size=4, max_num_batched_tokens=24, observer=check)
    check.watch(llm, own.batch)
    params = [
        SamplingParams(max_tokens=TOKENS, ignore_eos=True, draft=i % 2 == 0, logprobs=i % 3 or None)
        for i in range(len(own.batch))
    ]
    outputs = llm.generate(own.batch, params)
    assert token_ids(outputs) == [own.pair.greedy(prompt, TOKENS) for prompt in own.batch]
    assert all((o.outputs[0].metrics.drafted > 0) == p.draft for o, p in zip(outputs, params, strict=True))
    assert_at_rest(llm)


@both
def test_rounds_that_a_benchmark_replays(headed: dict[str, Headed], open_llm: OpenLLM, kind: str) -> None:
    """Each forward alone, in their order: a head reads the same states again, and drafts the same."""
    own, rounds = headed[kind], Rounds()

    def ids(windows: Windows) -> dict[int, list[int]]:
        return {request_id: [drafted.token for drafted in window] for request_id, window in windows.items()}

    llm = open_llm(own.pair, window=3, max_num_seqs=3, prefix_caching=False, observer=rounds)
    llm.generate(own.batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    drafted = 0
    for record in rounds:
        again = llm.engine.run_draft(record.plan.draft).windows
        assert ids(again) == ids(record.result.windows)
        llm.engine.run_target(record.plan.target)
        drafted += sum(map(len, again.values()))
    assert drafted > 20
    assert replay_alone(llm, rounds) > 0


@both
@pytest.mark.parametrize("on", ["target", "target apart"])
def test_states_of_a_target_that_replays_graphs(
    headed: dict[str, Headed], open_graphed: OpenGraphed, kind: str, on: str
) -> None:
    """The next forward is enqueued, and fills the same buffers, before the head has read this one's states."""
    own = headed[kind]
    eager = own.pair.llm(window=3, page_size=4, max_num_seqs=4)
    graphed = open_graphed(own.pair, on=on, window=3, page_size=4, max_num_seqs=4)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    expected, outputs = eager.generate(own.batch, params), graphed.llm.generate(own.batch, params)
    eager.close()
    assert graphed.target is not None
    assert graphed.target.captured > 0
    assert token_ids(outputs) == token_ids(expected) == [own.pair.greedy(prompt, TOKENS) for prompt in own.batch]
    accepted = [[o.metrics.accepted for o in every] for every in (outputs, expected)]
    assert accepted[0] == accepted[1]
    assert_at_rest(graphed.llm)
