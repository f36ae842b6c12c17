"""Prepared windows in captured ones: rows that join at the second step, pages copied on the way, missing alternatives.

The same requests in an eager engine have the same tokens, rounds and windows that came true.
"""

from __future__ import annotations

from typing import Any

import pytest
from e2e_support import PREPARED_SETTINGS, Pair, acceptance, assert_at_rest, poison_ring, prompts, token_ids
from graphed_llm import OpenGraphed
from random_branches import RandomBranches

from pearl import LLM, SamplingParams
from pearl.outputs import RequestOutput

LENGTHS = (1, 2, 15, 16, 17, 40)
TOKENS = 24
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
# The narrow ones have fewer alternatives than are asked for, or none.
SAMPLED = [
    SamplingParams(temperature=t, seed=17 * i, max_tokens=TOKENS - i, ignore_eos=True, **others)
    for i, (t, others) in enumerate(
        [(0.7, {}), (0.0, {}), (1.0, {"top_k": 2}), (1.3, {"top_p": 0.9}), (0.9, {"draft_temperature": 1.4}),
         (0.8, {"draft_temperature": 0.0}), (1.0, {"top_k": 1})]
    )
]  # fmt: skip


def choosing(llm: LLM, seed: int | None) -> LLM:
    """With a seed branches are chosen at random."""
    assert llm.engine.scheduler.branches is not None
    if seed is not None:
        llm.engine.scheduler.branches._choose = RandomBranches(seed)
    return llm


def history(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    """Drafts too: a window that is drafted from wrong rows or pages would only be wrong more often."""
    every = [output.metrics for output in outputs]
    return [(m.rounds, m.tested, m.accepted, m.prepared, m.prepared_hits, m.prepared_accepted) for m in every]


def joined(graphed: Any) -> int:
    """Late branches that had a token."""
    return sum(
        branch.token is None and bool(record.result.prepared[branch.id])
        for record in graphed.rounds
        for item in record.plan.draft.work
        for branch in item.branches
    )


@pytest.mark.parametrize(
    ("family", "setting"),
    [*(("llama", f"prepared-{setting}") for setting in (5, "auto", "no-pre-3")), ("mistral", "prepared-5"),
     ("qwen3", "prepared-2")],
)  # fmt: skip
def test_random_branches_change_no_greedy_token(
    pairs: dict[str, Pair], open_graphed: OpenGraphed, family: str, setting: str
) -> None:
    pair, batch = pairs[family], prompts(LENGTHS)
    graphed = open_graphed(pair, **PREPARED_SETTINGS[setting], max_num_seqs=4, max_num_batched_tokens=32)
    poison_ring(graphed.llm)
    outputs = choosing(graphed.llm, 0).generate(batch, GREEDY)
    assert token_ids(outputs) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert joined(graphed) > 0
    assert_at_rest(graphed.llm)


@pytest.mark.parametrize(
    ("verification", "on", "seed"),
    [("rejection", "target draft", None), ("rejection", "target draft", 1), ("rejection", "target draft apart", 2),
     ("rejection", "draft", 3), ("coupled", "target draft", None)],
)  # fmt: skip
def test_sampled_batches_are_those_of_eager_mode(
    llama: Pair, open_graphed: OpenGraphed, verification: str, on: str, seed: int | None
) -> None:
    """In pages so small that branches begin at every place of one. Outputs are also those without branches."""
    options = {"window": 4, "verification": verification, "max_num_seqs": 5, "page_size": 4}
    batch = prompts((*LENGTHS, 9), seed=4)
    with llama.llm(**options, prepared_windows=0) as plain:
        without = token_ids(plain.generate(batch, SAMPLED))
    with llama.llm(**options, prepared_windows=7) as eager:
        expected = choosing(eager, seed).generate(batch, SAMPLED)
    graphed = open_graphed(llama, on, prepared_windows=7, **options)
    poison_ring(graphed.llm)
    outputs = choosing(graphed.llm, seed).generate(batch, SAMPLED)
    assert token_ids(outputs) == token_ids(expected) == without
    assert history(outputs) == history(expected)
    assert acceptance(outputs) > 0.3
    assert sum(output.metrics.prepared_hits for output in outputs) > 2
    assert joined(graphed) > 10
    assert_at_rest(graphed.llm)


def test_branches_of_requests_that_need_the_host_beside_others(llama: Pair, open_graphed: OpenGraphed) -> None:
    """Penalties: their late branches join from the host, and their pages are copied then."""
    options = {"window": 4, "prepared_windows": 8, "page_size": 4}
    params = [
        SamplingParams(max_tokens=20, temperature=0.8, seed=i, ignore_eos=True,
                       repetition_penalty=1.3 if i % 2 else 1.0)
        for i in range(4)
    ]  # fmt: skip
    batch = prompts((5, 20, 9, 14), seed=9)
    with llama.llm(**options) as eager:
        expected = eager.generate(batch, params)
    graphed = open_graphed(llama, **options)
    assert graphed.draft
    assert graphed.target
    with graphed.draft.looking(), graphed.target.looking():
        outputs = graphed.llm.generate(batch, params)
    assert token_ids(outputs) == token_ids(expected)
    assert history(outputs) == history(expected)
    for rest in (0, 1):
        assert sum(output.metrics.prepared_hits for output in outputs[rest::2]) > 0
    copied = [record.plan.draft for record in graphed.rounds if record.plan.draft.late_copies]
    assert any(len({item.forward.state.params.changes_logits for item in draft.work}) == 2 for draft in copied)
    assert_at_rest(graphed.llm)


def test_scarce_pages_and_shared_ones(llama: Pair, open_graphed: OpenGraphed) -> None:
    """Completions of one prompt share pages until one writes; branches give way, and requests are preempted."""
    options = {"window": 5, "prepared_windows": 8, "page_size": 4, "max_model_len": 64, "max_num_seqs": 4}
    page_bytes = 2 * 4 * 2 * llama.judge.config.num_hidden_layers * 2 * 16 * 4
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=3, n=3, ignore_eos=True)
    batch = prompts((18, 18), seed=2)
    graphed = open_graphed(llama, kv_cache_memory=26 * page_bytes, **options)
    outputs = choosing(graphed.llm, 3).generate(batch, params)
    with llama.llm(**options) as eager:
        assert token_ids(outputs) == token_ids(eager.generate(batch, params))
    every = [completion.metrics for output in outputs for completion in output.outputs]
    assert sum(m.preemptions for m in every) > 0
    assert sum(m.prepared_hits for m in every) > 0
    assert_at_rest(graphed.llm)
