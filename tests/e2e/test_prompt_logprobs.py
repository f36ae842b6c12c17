"""Log-probabilities of prompts are transformers', whatever else the forwards that find them have to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from e2e_support import ALL_SETTINGS, VOCAB, Pair, Rounds, assert_at_rest, prompts, token_ids
from graphed_llm import OpenGraphed
from transformers import AutoModelForCausalLM, PreTrainedModel

from pearl import LLM, SamplingParams
from pearl.messages import PromptLogprobs, TargetOutput, TargetPlan, TokenLogprobs
from pearl.models import bundled_path
from pearl.outputs import StreamChunk

OpenLLM = Callable[..., LLM]
MOST = 3
TOLD = SamplingParams(prompt_logprobs=MOST, max_tokens=6, ignore_eos=True)
# Around a page, a chunk of 40 tokens, and the most rows of logits that a forward has.
LENGTHS = (1, 2, 15, 16, 17, 40, 41, 63, 64, 65, 66, 130)


def assert_told(
    model: PreTrainedModel,
    prompt: Sequence[int],
    found: PromptLogprobs | None,
    most: int = MOST,
    ids: int | None = None,
) -> None:
    """To 1e-4; of the likeliest tokens the probabilities, since two equally likely ones may come in either order.

    ``ids``: that the tokenizer knows, where the model has more columns.
    """
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    with torch.inference_mode():
        rows = model(torch.tensor([list(prompt)])).logits[0, :, :ids].log_softmax(-1)
    for position in range(1, len(prompt)):
        entry, row = found[position], rows[position - 1]
        assert isinstance(entry, TokenLogprobs)
        assert entry.logprob == pytest.approx(row[prompt[position]].item(), abs=1e-4), position
        assert len(entry.top) == most
        assert [value for _, value in entry.top] == pytest.approx(row.topk(most).values.tolist(), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx([row[t].item() for t, _ in entry.top], abs=1e-4)


def wanted_rows(rounds: Rounds) -> dict[int, int]:
    """How many rows were computed for each request's prompt."""
    counts: dict[int, int] = {}
    for record in rounds:
        for rows in record.plan.target.prompts:
            counts[rows.request_id] = counts.get(rows.request_id, 0) + len(rows.tokens)
    return counts


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-3", "pearl-auto", "speculative-3", "ngram-pearl"])
def test_prompts_of_all_lengths_beside_requests_that_ask_for_nothing(
    llama: Pair, open_llm: OpenLLM, setting: str
) -> None:
    rounds, batch = Rounds(), prompts((*LENGTHS, 9, 70), seed=11)
    plain = SamplingParams(max_tokens=6, ignore_eos=True)
    params = [TOLD] * len(LENGTHS) + [plain, plain]
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_num_seqs=5, max_num_batched_tokens=40, observer=rounds)
    outputs = llm.generate(batch, params)
    for prompt, output in zip(batch[:-2], outputs, strict=False):
        assert_told(llama.judge, prompt, output.prompt_logprobs)
    assert [output.prompt_logprobs for output in outputs[-2:]] == [None, None]
    assert token_ids(outputs) == [llama.greedy(prompt, 6) for prompt in batch]
    assert sum(wanted_rows(rounds).values()) == sum(length - 1 for length in LENGTHS)
    assert_at_rest(llm)


@pytest.mark.parametrize("method", ["pearl", "autoregressive"])
def test_the_bundled_target(open_llm: OpenLLM, method: str) -> None:
    judge = AutoModelForCausalLM.from_pretrained(bundled_path("target"), dtype=torch.float32).eval()
    llm = open_llm(method=method, dtype="float32", max_model_len=512)
    batch = [*prompts((17, 200), seed=3, vocab=4000), llm.encode("def add(a, b):\n    return a + b\n")]
    for prompt, output in zip(batch, llm.generate(batch, TOLD), strict=True):
        assert_told(judge, prompt, output.prompt_logprobs)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_columns_that_only_pad_the_vocabulary_have_no_part(
    pairs: dict[str, Pair], open_llm: OpenLLM, family: str
) -> None:
    pair = pairs[family]
    llm = open_llm(pair, window=3)
    (prompt,) = prompts((50,), seed=4)
    (output,) = llm.generate([prompt], TOLD)
    assert_told(pair.judge, prompt, output.prompt_logprobs, ids=VOCAB)


@pytest.mark.parametrize(("page_size", "cached_of_80"), [(16, 64), (4, 76)])
def test_the_prefix_cache_is_filled_and_not_read(
    llama: Pair, open_llm: OpenLLM, page_size: int, cached_of_80: int
) -> None:
    llm = open_llm(llama, window=3, page_size=page_size)
    long = prompts((80,), seed=5)[0]
    plain = SamplingParams(max_tokens=4, ignore_eos=True)
    # Who asks comes before, between and after those who do not; the last one's prefix is cached by one who asked.
    asked = [
        (long[:50], TOLD, 0),
        (long[:50], plain, 48),
        (long, TOLD, 0),
        (long, plain, cached_of_80),
        (long[:33], TOLD, 0),
    ]
    for prompt, params, cached in asked:
        (output,) = llm.generate([prompt], params)
        assert output.metrics.cached_tokens == cached
        assert token_ids([output]) == [llama.greedy(prompt, params.max_tokens)]
        if params is TOLD:
            assert_told(llama.judge, prompt, output.prompt_logprobs)
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-3", "speculative-3"])
def test_what_was_told_before_a_preemption_is_neither_lost_nor_told_again(
    llama: Pair, open_llm: OpenLLM, setting: str
) -> None:
    """A prompt in the middle gives way to one that was there before, and finds its pages in the cache or not."""
    rounds, halves = Rounds(), []
    batch = prompts((10, 90), seed=6)
    models = 1 if setting == "autoregressive" else 2
    token_bytes = 2 * llama.judge.config.num_hidden_layers * 2 * 16 * 4
    llm = open_llm(
        llama, **ALL_SETTINGS[setting], page_size=4, max_num_batched_tokens=8, max_model_len=104, max_num_seqs=3,
        kv_cache_memory=104 * token_bytes * models, observer=rounds,
    )  # fmt: skip
    preempt = llm.engine.scheduler._preempt

    def noted(request: Any) -> None:
        if request.prompt_logprobs is not None:
            halves.append(request.prompt_logprobs.missing)
        preempt(request)

    llm.engine.scheduler._preempt = noted  # type: ignore[method-assign]
    outputs = llm.generate(batch, [SamplingParams(max_tokens=90, ignore_eos=True), TOLD])
    assert any(0 < missing < 89 for missing in halves), halves
    assert outputs[1].metrics.preemptions > 0
    assert_told(llama.judge, batch[1], outputs[1].prompt_logprobs)
    assert wanted_rows(rounds) == {max(wanted_rows(rounds)): 89}
    assert token_ids(outputs) == [llama.greedy(batch[0], 90), llama.greedy(batch[1], 6)]
    assert_at_rest(llm)


def test_several_outputs_share_one_telling(llama: Pair, open_llm: OpenLLM) -> None:
    rounds, (prompt,) = Rounds(), prompts((45,), seed=7)
    llm = open_llm(llama, window=3, observer=rounds)
    params = SamplingParams(prompt_logprobs=0, n=3, temperature=1.0, seed=5, max_tokens=5, logprobs=1)
    (output,) = llm.generate([prompt], params)
    assert_told(llama.judge, prompt, output.prompt_logprobs, most=0)
    assert list(wanted_rows(rounds).values()) == [44]
    assert [o.prompt_logprobs is None for o in output.outputs] == [False, True, True]
    assert all(len(o.logprobs or ()) == len(o.token_ids) > 0 for o in output.outputs)


def test_rows_of_logits_have_a_bound(llama: Pair, open_llm: OpenLLM) -> None:
    """However long prompts are, and also where many verdicts leave little of it."""
    rounds = Rounds()
    llm = open_llm(llama, window=2, max_num_seqs=8, max_num_batched_tokens=400, observer=rounds)
    assert llm.config.max_logit_rows == 64
    batch = prompts((200, 150, 30, 30, 30, 30), seed=8)
    outputs = llm.generate(batch, SamplingParams(prompt_logprobs=1, max_tokens=20, ignore_eos=True))
    for prompt, output in zip(batch, outputs, strict=True):
        assert_told(llama.judge, prompt, output.prompt_logprobs, most=1)
    forwards = [sum(work.num_logits for work in record.plan.target.work) for record in rounds]
    assert 50 < max(forwards) <= 64


def test_other_chunks_are_as_long_as_ever(llama: Pair, open_llm: OpenLLM) -> None:
    """Who asks for nothing is not cut to the rows of logits, and has none but its verdict's."""
    rounds, batch = Rounds(), prompts((200, 200), seed=9)
    llm = open_llm(llama, method="autoregressive", max_num_batched_tokens=512, observer=rounds)
    llm.generate(batch, [TOLD, SamplingParams(max_tokens=6, ignore_eos=True)])
    (first,) = [r.plan.target.work for r in rounds if r.plan.target.work][:1]
    assert [(len(work.tokens), work.num_logits) for work in first] == [(62, 62), (200, 1)]


@pytest.mark.parametrize("on", ["target draft", "target draft apart"])
def test_on_a_device_that_only_enqueues(llama: Pair, open_graphed: OpenGraphed, on: str) -> None:
    graphed = open_graphed(llama, on=on, window=3, max_num_seqs=3, most=(3, 4))
    batch = prompts((3, 4, 20, 70), seed=10)
    outputs = graphed.llm.generate(batch, [TOLD, TOLD, SamplingParams(max_tokens=6, ignore_eos=True), TOLD])
    for index in (0, 1, 3):
        assert_told(llama.judge, batch[index], outputs[index].prompt_logprobs)
    assert token_ids(outputs) == [llama.greedy(prompt, 6) for prompt in batch]


def test_a_stream_tells_with_its_first_piece(llama: Pair, open_llm: OpenLLM) -> None:
    llm = open_llm(llama, window=3)
    (prompt,) = prompts((30,), seed=12)
    chunks: list[StreamChunk] = list(llm.stream(prompt, SamplingParams(prompt_logprobs=MOST, n=2, max_tokens=9)))
    (told,) = [chunk for chunk in chunks if chunk.prompt_logprobs is not None]
    assert told == next(chunk for chunk in chunks if chunk.index == 0)
    assert_told(llama.judge, prompt, told.prompt_logprobs)


def test_a_prompt_without_numbers_fails_alone(llama: Pair, open_llm: OpenLLM) -> None:
    """Rows of the prompt alone: of the verdict's it would be found anyway."""
    llm = open_llm(llama, method="autoregressive")
    right = llm.engine.workers.target.run

    def poisoned(plan: TargetPlan) -> TargetOutput:
        output, row = right(plan), 0
        for work in plan.work:
            if work.state.prompt_length == 20 and work.num_logits > 1:
                assert output.logits is not None
                output.logits[row] = torch.nan
            row += work.num_logits
        return output

    llm.engine.workers.target.run = poisoned  # type: ignore[method-assign]
    batch = prompts((20, 21), seed=13)
    bad, good = llm.generate(batch, TOLD)
    assert (bad.outputs[0].finish_reason, bad.prompt_logprobs) == ("abort", None)
    assert "NaN" in (bad.outputs[0].error or "")
    assert_told(llama.judge, batch[1], good.prompt_logprobs)
    assert token_ids([good]) == [llama.greedy(batch[1], 6)]
    assert_at_rest(llm)
