"""Streams, interruptions, stop strings, logprobs: what a caller sees while and after the engine works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from e2e_support import ALL_SETTINGS, VOCAB, Pair, assert_at_rest, prompts, token_ids

from pearl import LLM, SamplingParams
from pearl.outputs import OutputDelta, StreamChunk

OpenLLM = Callable[..., LLM]
SETTINGS = ("autoregressive", "pearl-1", "pearl-5", "pearl-auto", "pearl-neither-4", "speculative-3", "ngram-pearl")
TOKENS = 40


def joined(chunks: list[StreamChunk], index: int = 0) -> tuple[str, list[int]]:
    mine = [chunk for chunk in chunks if chunk.index == index]
    return "".join(chunk.text for chunk in mine), [token for chunk in mine for token in chunk.token_ids]


@pytest.mark.parametrize("setting", SETTINGS)
def test_stream_adds_up_to_generate(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    llm = open_llm(llama, **ALL_SETTINGS[setting])
    for prompt in ["import os\n", *prompts((1, 30), seed=31)]:
        for params in (
            SamplingParams(max_tokens=TOKENS, ignore_eos=True),
            SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=7),
        ):
            chunks = list(llm.stream(prompt, params))
            ids = llama.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if params.temperature == 0:
                expected = llama.greedy(ids, TOKENS)
                assert joined(chunks) == (llama.tokenizer.decode(expected), expected)
            if setting != "pearl-auto" and setting != "pearl-neither-4":
                whole = llm.generate(prompt, params)[0].outputs[0]
                assert joined(chunks) == (whole.text, whole.token_ids)
            assert [c.finish_reason for c in chunks][-1] is not None
            assert all(c.finish_reason is None for c in chunks[:-1])
            assert all(len(c.drafted) == len(c.token_ids) for c in chunks)
    assert_at_rest(llm)


def test_streamed_tokens_are_never_taken_back(llama: Pair, open_llm: OpenLLM) -> None:
    """At every moment the stream is a prefix of the target's own greedy output, although drafts were rejected."""
    prompt = prompts([10], seed=32)[0]
    expected = llama.greedy(prompt, TOKENS)
    text = llama.tokenizer.decode(expected)
    llm, chunks = open_llm(llama, window=4), []
    for chunk in llm.stream(prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True)):
        chunks.append(chunk)
        streamed, tokens = joined(chunks)
        assert tokens == expected[: len(tokens)]
        assert text.startswith(streamed)
    last = chunks[-1].metrics
    assert last.tested > last.accepted > 0
    assert last.output_tokens == TOKENS
    assert sum(sum(chunk.drafted) for chunk in chunks) == last.accepted


def test_several_outputs_stream_side_by_side(llama: Pair, open_llm: OpenLLM) -> None:
    params = SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=3, n=3, ignore_eos=True)
    llm = open_llm(llama, window=3)
    chunks = list(llm.stream("abc", params))
    whole = llm.generate("abc", params)[0].outputs
    assert [joined(chunks, i) for i in range(3)] == [(o.text, o.token_ids) for o in whole]


@pytest.mark.parametrize("after", [0, 1, 4])
def test_closing_a_stream_frees_everything(llama: Pair, open_llm: OpenLLM, after: int) -> None:
    llm = open_llm(llama, window=3)
    prompt = prompts([50], seed=33)[0]
    stream = llm.stream(prompt, SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(after):
        next(stream)
    stream.close()
    assert_at_rest(llm)
    again = llm.generate(prompt, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(again) == [llama.greedy(prompt, TOKENS)]


def test_streams_and_generate_may_be_interleaved(llama: Pair, open_llm: OpenLLM) -> None:
    """Two streams advanced in turn with a generate between them: each gets all of its own tokens."""
    first, second, third = prompts((5, 20, 9), seed=34)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    llm = open_llm(llama, window=3)
    one, two = llm.stream(first, params), llm.stream(second, params)
    got_one, got_two = [next(one)], [next(two), next(two)]
    assert token_ids(llm.generate(third, params)) == [llama.greedy(third, TOKENS)]
    got_one += list(one)
    got_two += list(two)
    assert joined(got_one)[1] == llama.greedy(first, TOKENS)
    assert joined(got_two)[1] == llama.greedy(second, TOKENS)
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-3", "pearl-neither-4", "speculative-3"])
def test_ctrl_c_leaves_the_llm_usable(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    batch = prompts((5, 40, 12, 7), seed=35)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_num_seqs=3)
    for moment in (1, 2, 7):
        seen: list[OutputDelta] = []

        def interrupt(delta: OutputDelta, seen: list[OutputDelta] = seen, moment: int = moment) -> None:
            seen.append(delta)
            if len(seen) == moment:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            llm.generate(batch, params, on_output=interrupt)
        assert_at_rest(llm)
    assert token_ids(llm.generate(batch, params)) == [llama.greedy(prompt, TOKENS) for prompt in batch]


@pytest.mark.parametrize("where", ["draft", "target", "verdict"])
def test_ctrl_c_in_the_middle_of_a_round(
    llama: Pair, open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The interruption arrives before the round was applied: both models come to rest, nothing stays reserved."""
    prompt = prompts([20], seed=36)[0]
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    llm = open_llm(llama, window=3)
    engine = llm.engine
    owner, name = {
        "draft": (engine.workers.drafter, "propose"),
        "target": (engine.workers.target, "run"),
        "verdict": (engine._verifier, "verify"),
    }[where]
    right, calls = getattr(owner, name), []

    def interrupted(*arguments):  # type: ignore[no-untyped-def]
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompt, params)
    assert_at_rest(llm)
    assert token_ids(llm.generate(prompt, params)) == [llama.greedy(prompt, TOKENS)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_stop_strings_cut_text_and_tokens(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """Stop strings taken from the continuation at many places, most of them across tokens."""
    prompt = prompts([6], seed=37)[0]
    tokens = llama.greedy(prompt, TOKENS)
    text = llama.tokenizer.decode(tokens)
    stops = [text[at : at + 3] for at in range(0, len(text) - 3, 3) if "\ufffd" not in text[at : at + 3]]
    assert len(stops) >= 3
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_num_seqs=32)
    every = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, stop=[stop, "never seen"]) for stop in stops]
    for output, stop in zip(llm.generate([prompt] * len(stops), every), stops, strict=True):
        completion = output.outputs[0]
        needed = next(n for n in range(1, TOKENS + 1) if stop in llama.tokenizer.decode(tokens[:n]))
        assert completion.text == text[: text.index(stop)]
        assert completion.token_ids == tokens[:needed]
        assert completion.finish_reason == "stop"
    streamed, _ = joined(list(llm.stream(prompt, every[1])))
    assert streamed == text[: text.index(stops[1])]


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-1", "pearl-5", "pearl-neither-4", "speculative-3"])
def test_logprobs_are_the_log_softmax_of_raw_logits(pairs: dict[str, Pair], open_llm: OpenLLM, setting: str) -> None:
    """Also of sampled and penalised requests: temperature, cutoffs and penalties do not change what is reported."""
    pair, batch = pairs["qwen3"], prompts((4, 21, 9), seed=38)
    every = [
        SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=5),
        SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=3, temperature=1.5, top_k=50, seed=1),
        SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=0, repetition_penalty=1.5),
    ]
    outputs = open_llm(pair, **ALL_SETTINGS[setting]).generate(batch, every)
    for prompt, params, output in zip(batch, every, outputs, strict=True):
        completion = output.outputs[0]
        with torch.inference_mode():
            logits = pair.judge(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1, :VOCAB]
        expected = logits.log_softmax(-1)
        assert completion.logprobs is not None
        assert len(completion.logprobs) == TOKENS
        for row, token, reported in zip(expected, completion.token_ids, completion.logprobs, strict=True):
            assert reported.logprob == pytest.approx(row[token].item(), abs=1e-3)
            values, ids = row.topk(params.logprobs)
            assert [value for _, value in reported.top] == pytest.approx(values.tolist(), abs=1e-3)
            assert [row[i].item() for i, _ in reported.top] == pytest.approx(values.tolist(), abs=1e-3)
            assert len({i for i, _ in reported.top}) == len(ids)


def test_a_stream_gives_the_logprobs_that_generate_gives(llama: Pair, open_llm: OpenLLM) -> None:
    prompt, params = prompts([9], seed=38)[0], SamplingParams(max_tokens=TOKENS, logprobs=2, ignore_eos=True)
    llm = open_llm(llama, window=3)
    chunks = list(llm.stream(prompt, params))
    assert all(len(chunk.logprobs or ()) == len(chunk.token_ids) for chunk in chunks)
    streamed = [logprob for chunk in chunks for logprob in chunk.logprobs or ()]
    assert [token.top[0][0] for token in streamed] == llama.greedy(prompt, TOKENS)
    assert streamed == llm.generate(prompt, params)[0].outputs[0].logprobs
    assert all(chunk.logprobs is None for chunk in llm.stream(prompt, SamplingParams(max_tokens=4)))


def test_two_llms_take_turns_in_one_process(pairs: dict[str, Pair], open_llm: OpenLLM) -> None:
    """Other families, page sizes and windows; rounds interleaved one by one."""
    one, two = pairs["llama"], pairs["qwen3"]
    prompt = prompts([20], seed=39)[0]
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    streams = [
        (one, open_llm(one, window=2).stream(prompt, params)),
        (two, open_llm(two, window=5, page_size=8).stream(prompt, params)),
        (one, open_llm(one, method="speculative", window=3, max_model_len=128).stream(prompt, params)),
    ]
    chunks: list[list[StreamChunk]] = [[], [], []]
    for _ in range(TOKENS + 8):
        for (_, stream), mine in zip(streams, chunks, strict=True):
            mine += [chunk for chunk in [next(stream, None)] if chunk is not None]
    assert [joined(mine)[1] for mine in chunks] == [pair.greedy(prompt, TOKENS) for pair, _ in streams]
