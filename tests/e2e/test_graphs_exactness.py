"""With captured forwards, verifications and windows the tokens are those of eager mode, whatever is in the batch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from e2e_support import ALL_SETTINGS, KNOWN, Pair, acceptance, assert_at_rest, poison_ring, prompts, token_ids
from graphed_llm import OpenGraphed

import pearl.request_factory
from pearl import SamplingParams

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
        monkeypatch.setattr(pearl.request_factory.secrets, "randbits", lambda bits, seeds=seeds: next(seeds))
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
