"""Where an output ends: EOS, stop tokens and max_tokens at every phase of a window; nothing after, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_support import (
    ALL_SETTINGS,
    EOS,
    Pair,
    Rounds,
    assert_at_rest,
    greedy_reference,
    prompts,
    save,
    token_ids,
)

from pearl import LLM, SamplingParams

OpenLLM = Callable[..., LLM]
SETTINGS = (
    "autoregressive",
    "pearl-1",
    "pearl-2",
    "pearl-5",
    "pearl-8",
    "pearl-auto",
    "pearl-no-pre-3",
    "pearl-no-post-3",
    "pearl-neither-4",
    "speculative-1",
    "speculative-5",
    "ngram-pearl",
)


def first_occurrences(tokens: list[int]) -> dict[int, int]:
    """token -> offset at which a continuation has it for the first time."""
    return {token: tokens.index(token) for token in tokens}


@pytest.mark.parametrize("setting", SETTINGS)
def test_max_tokens_at_every_offset(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    window = ALL_SETTINGS[setting].get("window", 3)
    limits = range(1, 2 * (4 if window == "auto" else window) + 4)
    batch = prompts((1, 21), seed=11)
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_num_seqs=7)
    asked = [(prompt, limit) for prompt in batch for limit in limits]
    outputs = llm.generate(
        [prompt for prompt, _ in asked], [SamplingParams(max_tokens=limit, ignore_eos=True) for _, limit in asked]
    )
    assert token_ids(outputs) == [llama.greedy(prompt, limits[-1])[:limit] for prompt, limit in asked]
    for output, (_, limit) in zip(outputs, asked, strict=True):
        assert output.outputs[0].finish_reason == "length"
        assert output.metrics.output_tokens == limit == len(output.outputs[0].drafted)
        assert output.metrics.target_forwards <= limit + len(output.prompt_token_ids)
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", SETTINGS)
def test_stop_token_at_every_offset(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """Each token of the continuation in turn ends the request; every phase of a window must really have been hit."""
    batch = prompts((6, 18), seed=12)
    asked = []
    for prompt in batch:
        continuation = llama.greedy(prompt, 22)
        asked += [(prompt, token, at) for token, at in first_occurrences(continuation).items()]
    rounds = Rounds()
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_num_seqs=6, observer=rounds)
    first_id = llm._factory.made + 1
    outputs = llm.generate(
        [prompt for prompt, _, _ in asked],
        [SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=[token]) for _, token, _ in asked],
    )
    for output, (prompt, token, at) in zip(outputs, asked, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == llama.greedy(prompt, 22)[: at + 1]
        assert completion.token_ids[-1] == token
        assert completion.finish_reason == "stop"
        assert output.metrics.output_tokens == at + 1
        assert completion.text == llama.tokenizer.decode(completion.token_ids[:-1])
    if setting.startswith(("pearl", "speculative")) and not setting.endswith("-1"):
        phases = ending_phases(rounds, {first_id + i: token for i, (_, token, _) in enumerate(asked)})
        assert phases >= {"accepted, tokens follow", "correction"}
    assert_at_rest(llm)


def ending_phases(rounds: Rounds, ending: dict[int, int]) -> set[str]:
    """In which places of a verdict the ending tokens stood."""
    phases = set()
    for record in rounds:
        for request_id, decision in record.result.decisions.items():
            if (token := ending.get(request_id)) in decision.committed:
                at = decision.committed.index(token)
                if at == decision.accepted:
                    phases.add("correction" if decision.rejected else "bonus")
                else:
                    last = at == len(decision.committed) - 1
                    phases.add("accepted, last of its window" if last else "accepted, tokens follow")
    return phases


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_every_phase_of_pearl_meets_a_stop_token(llama: Pair, open_llm: OpenLLM, window: int) -> None:
    """Inside a window, its last token, and the correction after it."""
    asked = []
    for prompt in prompts((4, 9, 14, 30, 2), seed=13):
        asked += [(prompt, token, at) for token, at in first_occurrences(llama.greedy(prompt, 22)).items()]
    rounds = Rounds()
    llm = open_llm(llama, window=window, observer=rounds, max_num_seqs=32)
    outputs = llm.generate(
        [prompt for prompt, _, _ in asked],
        [SamplingParams(max_tokens=22, ignore_eos=True, stop_token_ids=[token]) for _, token, _ in asked],
    )
    assert token_ids(outputs) == [llama.greedy(prompt, 22)[: at + 1] for prompt, _, at in asked]
    phases = ending_phases(rounds, {1 + i: token for i, (_, token, _) in enumerate(asked)})
    inside = {"accepted, tokens follow"} if window > 1 else set()
    assert phases == {"accepted, last of its window", "correction"} | inside


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7])
def test_the_models_own_eos_ends_the_output(llama: Pair, open_llm: OpenLLM, tmp_path: Path, offset: int) -> None:
    """generation_config.json names the token that stands at ``offset``; transformers stops there, and so do we."""
    batch = prompts((8, 25, 1, 3), seed=14)
    continuation = llama.greedy(batch[0], 30)
    eos = continuation[offset]
    assert continuation.index(eos) == offset
    path = save(llama.judge, llama.tokenizer, tmp_path / "model", eos_token_id=[EOS, eos])
    llama.judge.generation_config.eos_token_id = EOS
    expected = [greedy_reference(llama.judge, prompt, 30, eos_token_id=[EOS, eos]).tokens for prompt in batch]
    assert expected[0] == continuation[: offset + 1]
    for setting in ("pearl-1", "pearl-3", "speculative-3", "autoregressive", "pearl-neither-4"):
        llm = open_llm(llama, target=path, **ALL_SETTINGS[setting])
        outputs = llm.generate(batch, SamplingParams(max_tokens=30))
        assert token_ids(outputs) == expected, setting
        assert outputs[0].outputs[0].finish_reason == "stop"
        ignoring = llm.generate(batch, SamplingParams(max_tokens=30, ignore_eos=True))
        assert token_ids(ignoring) == [llama.greedy(prompt, 30) for prompt in batch]


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-1", "pearl-5", "pearl-neither-4", "speculative-5"])
@pytest.mark.parametrize("min_tokens", [1, 12])
def test_min_tokens_holds_the_end_back(llama: Pair, open_llm: OpenLLM, setting: str, min_tokens: int) -> None:
    """Below min_tokens an ending token cannot be drawn: transformers' min_new_tokens."""
    prompt = prompts([8], seed=14)[0]
    stop = llama.greedy(prompt, 3)[0 if min_tokens == 1 else 2]
    reference = greedy_reference(llama.judge, prompt, 30, eos_token_id=stop, min_new_tokens=min_tokens)
    llm = open_llm(llama, **ALL_SETTINGS[setting])
    params = SamplingParams(max_tokens=30, min_tokens=min_tokens, ignore_eos=True, stop_token_ids=[stop])
    output = llm.generate(prompt, params)[0].outputs[0]
    assert output.token_ids == reference.tokens
    assert stop not in output.token_ids[:min_tokens]
    assert output.token_ids != llama.greedy(prompt, 30)[: len(output.token_ids)]
    assert output.text


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-3"])
def test_a_special_tokens_text_as_a_stop_string_is_the_token(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """Which has no text in the output: as text it would never be found."""
    prompt = prompts([8], seed=14)[0]
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop="<|endoftext|>", logit_bias={EOS: 6.0})
    reference = greedy_reference(llama.judge, prompt, 30, sequence_bias=[[[EOS], 6.0]], eos_token_id=EOS).tokens
    assert 2 < len(reference) < 30
    output = open_llm(llama, **ALL_SETTINGS[setting]).generate(prompt, params)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (reference, "stop")
    assert output.text == llama.tokenizer.decode(reference[:-1])


@pytest.mark.parametrize("setting", SETTINGS)
def test_metrics_count_what_was_returned(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """Wherever in a verdict the output ends: by a stop token, a stop string or max_tokens."""
    prompt = prompts([6], seed=12)[0]
    tokens = llama.greedy(prompt, 22)
    every = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0) for n in range(1, 12)]
    every += [SamplingParams(max_tokens=22, ignore_eos=True, stop_token_ids=[token]) for token in tokens[:11]]
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_num_seqs=8)
    for output in llm.generate([prompt] * len(every), every):
        completion, metrics = output.outputs[0], output.metrics
        assert completion.logprobs is None or len(completion.logprobs) == len(completion.token_ids)
        assert metrics.accepted == sum(completion.drafted)
        assert metrics.accepted <= metrics.output_tokens == len(completion.token_ids)
        assert metrics.accepted <= metrics.tested <= min(metrics.drafted, metrics.output_tokens)
        assert metrics.runs <= metrics.rounds
    assert_at_rest(llm)
