"""Bugs found in other systems, with real forwards; each test fails on the buggy behaviour.

Of the numbered list, 1 and 3 are distribution errors (test_rejection_distribution.py), 7 is a window of any size
(test_greedy.py).
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from e2e_support import (
    ALL_SETTINGS,
    EOS,
    Pair,
    Rounds,
    acceptance,
    assert_at_rest,
    prompts,
    token_ids,
)
from transformers import AutoModelForCausalLM

from pearl import LLM, SamplingParams
from pearl.models import bundled_path

OpenLLM = Callable[..., LLM]
TOKENS = 24


@pytest.mark.parametrize("setting", ["pearl-3", "speculative-3"])
def test_2_token_ids_survive_bf16(open_llm: OpenLLM, setting: str) -> None:
    """bf16 holds integers exactly only up to 256: a rounded id would be a token that the target finds absurd."""
    judge = AutoModelForCausalLM.from_pretrained(bundled_path("target"), dtype="float32").eval()
    texts = ["import os\n\ndef walk(path):\n", "class Queue:\n    def __init__(self", "for index, line in enumerate("]
    outputs = open_llm(dtype="bfloat16", **ALL_SETTINGS[setting]).generate(texts, SamplingParams(max_tokens=TOKENS))
    for output in outputs:
        tokens = output.outputs[0].token_ids
        with torch.inference_mode():
            rows = judge(torch.tensor([output.prompt_token_ids + tokens])).logits[0, -len(tokens) - 1 : -1]
        behind = rows.amax(-1) - rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max() < 0.5  # bf16 may decide a near-tie otherwise; any other token is far behind
    everything = [token for tokens in token_ids(outputs) for token in tokens]
    assert sum(token > 256 for token in everything) > len(everything) / 2
    assert acceptance(outputs) > 0.3


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("setting", ["pearl-1", "pearl-5", "pearl-neither-4", "speculative-5"])
def test_4_nothing_follows_the_end_of_text(llama: Pair, open_llm: OpenLLM, setting: str, verification: str) -> None:
    """A hundred sampled outputs, of which most meet EOS: accepted, inside a window, or as a correction."""
    params = SamplingParams(temperature=1.2, seed=1, n=60, max_tokens=40, logit_bias={EOS: 7.0})
    rounds = Rounds()
    llm = open_llm(llama, **ALL_SETTINGS[setting], verification=verification, observer=rounds)
    completions = [o for output in llm.generate(prompts((3, 30), seed=51), params) for o in output.outputs]
    for completion in completions:
        tokens = completion.token_ids
        assert EOS not in tokens[:-1]
        assert completion.finish_reason == ("stop" if tokens[-1] == EOS else "length")
        assert completion.metrics.output_tokens == len(tokens) == len(completion.drafted) <= 40
        assert completion.text == llama.tokenizer.decode([t for t in tokens if t != EOS])
    ended = [completion.drafted[-1] for completion in completions if completion.finish_reason == "stop"]
    assert len(ended) > 30
    assert any(ended)
    assert not all(ended)
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", ["pearl-1", "pearl-8", "pearl-no-pre-3", "pearl-no-post-3", "speculative-5"])
def test_5_max_tokens_is_met_exactly_when_sampling(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    limits = list(range(1, 21))
    every = [SamplingParams(temperature=0.7, seed=i, max_tokens=i, ignore_eos=True, logprobs=1) for i in limits]
    outputs = open_llm(llama, **ALL_SETTINGS[setting]).generate(prompts([5] * 20, seed=52), every)
    for output, limit in zip(outputs, limits, strict=True):
        completion = output.outputs[0]
        assert len(completion.token_ids) == len(completion.logprobs or []) == output.metrics.output_tokens == limit
        assert output.metrics.accepted == sum(completion.drafted)


@pytest.mark.parametrize("setting", ["pearl-1", "pearl-4", "speculative-3"])
def test_6_draft_and_target_agree_on_the_first_token(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """Prompts that take the two models different numbers of chunks; one-token outputs; sampled first tokens."""
    settings = {**ALL_SETTINGS, "pearl-4": {"window": 4}}
    batch = prompts((1, 31, 32, 33, 64, 90), seed=53)
    every = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=1 if i % 2 else TOKENS, ignore_eos=True) for i in range(6)
    ]
    plain = open_llm(llama, method="autoregressive").generate(batch, every)
    llm = open_llm(llama, **settings[setting], verification="coupled", max_num_batched_tokens=32, page_size=8)
    for _ in range(2):  # the second time the prompts come from the prefix cache
        outputs = llm.generate(batch, every)
        assert token_ids(outputs) == token_ids(plain)
        assert_at_rest(llm)
    assert [output.metrics.cached_tokens > 0 for output in outputs] == [False, *[True] * 5]
    assert acceptance(outputs) > 0.2  # a pair that drifted apart would still be exact, but never agree


@pytest.mark.parametrize("window", [1, 2, 5])
def test_8_rejected_tokens_never_enter_the_prefix_cache(
    llama: Pair, open_llm: OpenLLM, unrelated_draft: str, window: int
) -> None:
    """Prompts made of committed text followed by what was drafted there and rejected: a stale page would answer."""
    for draft in (llama.draft, unrelated_draft):
        rounds = Rounds()
        llm = open_llm(llama, draft=draft, window=window, page_size=2, observer=rounds)
        prompt = prompts([7], seed=54)[0]
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        whole = prompt + llm.generate([prompt], params)[0].outputs[0].token_ids
        poisoned = []
        for record in rounds:
            for work in record.plan.verify:
                decision = record.result.decisions[work.request_id]
                rejected = decision.tested[decision.accepted :]
                rejected += tuple(d.token for d in record.result.windows.get(work.request_id, ())[1:])
                if decision.rejected:
                    poisoned.append(whole[: work.position + decision.accepted] + list(rejected))
        assert len(poisoned) > 5
        outputs = llm.generate([*poisoned, whole], SamplingParams(max_tokens=4, ignore_eos=True))
        assert token_ids(outputs) == [llama.greedy(p, 4) for p in [*poisoned, whole]]
        assert min(output.metrics.cached_tokens for output in outputs) >= 6  # what was committed is found again
        assert_at_rest(llm)


def test_9_a_window_is_verified_as_one_sequence(llama: Pair, open_llm: OpenLLM) -> None:
    rounds = Rounds()
    open_llm(llama, window=4, observer=rounds).generate(prompts((6, 20), seed=55), SamplingParams(max_tokens=TOKENS))
    for record in rounds:
        work = record.plan.target.work
        assert len({w.state.request_id for w in work}) == len(work)
    sizes = {len(verify.pending) for record in rounds for verify in record.plan.verify}
    assert sizes >= {0, 3}


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-1", "pearl-5", "pearl-neither-4", "speculative-3"])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_10_tokens_of_probability_zero_are_never_accepted(
    llama: Pair, open_llm: OpenLLM, setting: str, verification: str
) -> None:
    """top_k=1, a tiny top_p or min_p=1 at temperature 1 leave one token: the greedy one, whatever is drafted."""
    batch = prompts((4, 19, 33), seed=56)
    base = {"temperature": 1.0, "seed": 3, "max_tokens": TOKENS, "ignore_eos": True, "n": 4}
    every = [SamplingParams(**base, **cut) for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})]
    outputs = open_llm(llama, **ALL_SETTINGS[setting], verification=verification).generate(batch, every)
    assert token_ids(outputs) == [llama.greedy(prompt, TOKENS) for prompt in batch for _ in range(4)]


@pytest.mark.parametrize("window", [1, 8])
def test_11_any_temperatures_and_short_prompts_share_a_batch(llama: Pair, open_llm: OpenLLM, window: int) -> None:
    batch = prompts((1, 2, 3, 1, 7, 2), seed=57)
    every = [
        SamplingParams(temperature=t, seed=5, max_tokens=m, ignore_eos=True)
        for t, m in ((0.0, 20), (1.0, 3), (0.3, 1), (2.0, 9), (0.0, 2), (0.9, 20))
    ]
    outputs = open_llm(llama, window=window).generate(batch, every)
    assert [len(tokens) for tokens in token_ids(outputs)] == [20, 3, 1, 9, 2, 20]
    for index in (0, 4):
        assert outputs[index].outputs[0].token_ids == llama.greedy(batch[index], every[index].max_tokens)


def test_12_engines_do_not_collide(llama: Pair, open_llm: OpenLLM) -> None:
    """Two engines in two threads of this process while a second process runs a third, all of the same models."""
    prompt = prompts([20], seed=58)[0]
    expected = llama.greedy(prompt, TOKENS)
    script = (
        "from pearl import LLM, SamplingParams\n"
        f"llm = LLM({llama.target!r}, {llama.draft!r}, device='cpu', window=3, target_threads=1)\n"
        f"out = llm.generate([{prompt}], SamplingParams(max_tokens={TOKENS}, ignore_eos=True))\n"
        "print(out[0].outputs[0].token_ids)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    wrong: list[list[int]] = []

    def work(llm: LLM) -> None:
        for _ in range(8):
            tokens = llm.generate([prompt], SamplingParams(max_tokens=TOKENS, ignore_eos=True))[0].outputs[0].token_ids
            if tokens != expected:
                wrong.append(tokens)

    threads = [threading.Thread(target=work, args=(open_llm(llama, window=window),)) for window in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    printed, _ = other.communicate(timeout=120)
    assert not wrong
    assert printed.strip() == str(expected)


def test_13_draft_probabilities_are_kept_for_one_window_only(llama: Pair, open_llm: OpenLLM) -> None:
    """Greedy and coupled requests keep none; sampled ones at most two windows for each place in the batch."""
    greedy, sampled = SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=1.0, seed=1, n=9)
    llm = open_llm(llama, window=4, max_num_seqs=3)
    ring = llm.engine.workers.drafter._ring
    llm.generate("abc", greedy)
    assert ring.logits is None
    llm.generate("abc", sampled)
    assert ring.logits.shape[0] == 3 * 2 * 4 + 1  # and one that is nobody's
    coupled = open_llm(llama, window=4, verification="coupled")
    coupled.generate("abc", sampled)
    assert coupled.engine.workers.drafter._ring.logits is None
