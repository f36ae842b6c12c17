"""Models that transformers' own modules compute, through the whole engine: the tokens are transformers' own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_support import (
    ALL_SETTINGS,
    VOCAB,
    Pair,
    acceptance,
    assert_at_rest,
    byte_tokenizer,
    perturbed,
    poison_ring,
    prompts,
    save,
    token_ids,
)
from transformers import PreTrainedModel
from transformers_families import build

from pearl import LLM, SamplingParams
from pearl.errors import ConfigurationError, UnsupportedModelError
from pearl.models.transformers_backend import TransformersModel

OpenLLM = Callable[..., LLM]
# Absolute positions, learned (GPT-2) and with an offset (OPT); partial rotary; windows in all layers or some; one KV
# head; a softcap; experts; norms of q and k. The native decoder knows none of them.
NAMES = (
    "gpt2-scales-by-layer", "opt-offset", "gpt_neox-partial-rotary", "starcoder2-window", "cohere2-windows",
    "gpt_bigcode-one-kv-head", "vaultgemma-softcap", "afmoe", "nemotron",
)  # fmt: skip
SETTINGS = ("autoregressive", "speculative-3", "pearl-auto", "prepared-2")  # the others: with the first three
LENGTHS = (1, 2, 17, 40)
TOKENS = 16
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Pairs by the names of ``transformers_families``; a target, and a draft that is nearly its copy."""
    tokenizer, pairs = byte_tokenizer(), {}

    def pair(name: str) -> Pair:
        if name not in pairs:
            root = tmp_path_factory.mktemp(name)
            judge = build(name, vocab_size=VOCAB, tie_word_embeddings=False)
            draft: PreTrainedModel = perturbed(judge, 0.03)
            target = save(judge, tokenizer, root / "target")
            pairs[name] = Pair(name, target, save(draft, tokenizer, root / "draft"), judge, tokenizer)
        return pairs[name]

    return pair


@pytest.mark.parametrize("name", NAMES)
def test_mixed_batch_equals_transformers(made: Callable[[str], Pair], open_llm: OpenLLM, name: str) -> None:
    """Late joiners, chunks, decoding and windows in one batch, twice: the second time from cached prefixes."""
    pair, batch = made(name), prompts(LENGTHS)
    expected = [pair.greedy(prompt, TOKENS) for prompt in batch]
    llm = open_llm(pair, window=3, max_num_seqs=3, max_num_batched_tokens=24, backend="transformers")
    poison_ring(llm)
    first, second = llm.generate(batch, GREEDY), llm.generate(batch, GREEDY)
    assert [token_ids(first), token_ids(second)] == [expected, expected]
    assert 0.2 < acceptance(first) < 0.98
    assert second[3].metrics.cached_tokens > 0
    assert len({token for tokens in expected for token in tokens}) > 12
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES[:2])
def test_every_method(made: Callable[[str], Pair], open_llm: OpenLLM, name: str, setting: str) -> None:
    pair, batch = made(name), prompts(LENGTHS)
    llm = open_llm(pair, **ALL_SETTINGS[setting])
    assert token_ids(llm.generate(batch, GREEDY)) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert_at_rest(llm)


@pytest.mark.parametrize("name", ["cohere2-windows", "gpt2-scales-by-layer"])
def test_preemption_changes_nothing(made: Callable[[str], Pair], open_llm: OpenLLM, name: str) -> None:
    pair, batch = made(name), prompts((30, 5, 41, 17), seed=2)
    config = pair.judge.config
    heads = {"cohere2-windows": 2}.get(name, 6)
    page_bytes = 16 * 2 * config.num_hidden_layers * heads * 8 * 4
    llm = open_llm(pair, window=3, kv_cache_memory=2 * 7 * page_bytes, max_model_len=80, max_num_batched_tokens=24)
    assert llm.engine.scheduler.target_kv.num_pages == 7
    outputs = llm.generate(batch, SamplingParams(max_tokens=30, ignore_eos=True))
    assert token_ids(outputs) == [pair.greedy(prompt, 30) for prompt in batch]
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", ["pearl-3", "speculative-3"])
def test_coupled_equals_seeded_decoding(made: Callable[[str], Pair], open_llm: OpenLLM, setting: str) -> None:
    pair, batch = made("starcoder2-window"), prompts(LENGTHS, seed=3)
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=TOKENS, ignore_eos=True) for i in range(len(batch))]
    plain = token_ids(open_llm(pair, method="autoregressive").generate(batch, params))
    outputs = open_llm(pair, **ALL_SETTINGS[setting], verification="coupled").generate(batch, params)
    assert token_ids(outputs) == plain
    assert acceptance(outputs) > 0.1


@pytest.mark.parametrize("role", ["target", "draft"])
def test_one_model_of_each_backend(made: Callable[[str], Pair], llama: Pair, open_llm: OpenLLM, role: str) -> None:
    """Neither knows anything of the other, so that nearly all drafts are rejected and rolled back."""
    theirs, batch = made("opt-offset"), prompts(LENGTHS, seed=4)
    judge, draft = (theirs, llama) if role == "target" else (llama, theirs)
    llm = open_llm(target=judge.target, draft=draft.target, dtype="float32", window=3)
    runners = {"target": llm.models.target, "draft": llm.models.draft}
    assert [isinstance(runner.model, TransformersModel) for runner in runners.values()] == [
        name == role for name in runners
    ]
    assert token_ids(llm.generate(batch, GREEDY)) == [judge.greedy(prompt, TOKENS) for prompt in batch]
    assert_at_rest(llm)


def test_a_draft_of_fewer_ids(llama: Pair, made: Callable[[str], Pair], open_llm: OpenLLM, tmp_path: Path) -> None:
    draft = save(build("phi", vocab_size=258), byte_tokenizer(258), tmp_path)
    llm = open_llm(target=llama.target, draft=draft, dtype="float32", window=2)
    batch = prompts(LENGTHS, seed=5)
    assert token_ids(llm.generate(batch, GREEDY)) == [llama.greedy(prompt, TOKENS) for prompt in batch]


@pytest.mark.parametrize("name", ["gpt2-scales-by-layer", "opt-offset"])
def test_context_filled_to_the_last_learned_position(made: Callable[[str], Pair], open_llm: OpenLLM, name: str) -> None:
    pair, batch = made(name), prompts((120, 90), seed=6)
    outputs = open_llm(pair, window=3).generate(batch, SamplingParams(max_tokens=100, ignore_eos=True))
    assert token_ids(outputs) == [pair.greedy(prompt, 128 - len(prompt)) for prompt in batch]
    with pytest.raises(ConfigurationError, match=r"max_model_len=129 is more than the 128 positions"):
        open_llm(pair, max_model_len=129)


def test_a_request_that_breaks_ends_alone(made: Callable[[str], Pair], open_llm: OpenLLM) -> None:
    """One token's embedding is no number: found in no probe, but in the logits of the text that has it."""
    pair, batch = made("phi"), prompts((9, 12, 7), seed=7)
    healthy = [pair.greedy(prompt, TOKENS) for prompt in batch]
    sick = next(t for t in range(1, VOCAB) if not any(t in text for text in (*batch, *healthy)))
    llm = open_llm(pair, window=3, prefix_caching=False)
    for runner in (llm.models.target, llm.models.draft):
        with torch.no_grad():
            runner.model._module.get_input_embeddings().weight[sick] = torch.nan
    outputs = llm.generate([batch[0], [*batch[1], sick], batch[2]], GREEDY)
    assert [token_ids([outputs[0]]), token_ids([outputs[2]])] == [[healthy[0]], [healthy[2]]]
    assert "logits are NaN or infinite" in str(outputs[1].outputs[0].error or outputs[1].error)


def test_the_choice_is_logged_and_can_be_made(
    made: Callable[[str], Pair], llama: Pair, open_llm: OpenLLM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pearl.models.backend"):
        llm = open_llm(llama, draft="ngram", backend="transformers")
        assert isinstance(llm.models.target.model, TransformersModel)
        assert not caplog.messages  # it was asked for
        batch = prompts(LENGTHS, seed=8)
        assert token_ids(llm.generate(batch, GREEDY)) == [llama.greedy(prompt, TOKENS) for prompt in batch]
        pair = made("phi")
        open_llm(pair, draft="ngram")
        assert any(
            "runs through transformers' PhiForCausalLM" in m and "'phi' is not sup" in m for m in caplog.messages
        )
    with pytest.raises(UnsupportedModelError, match="model_type 'phi' is not supported; the decoder knows"):
        open_llm(pair, backend="native")
    llm = open_llm(llama, backend="transformers", draft_backend="native")
    assert not isinstance(llm.models.draft.model, TransformersModel)


@pytest.mark.parametrize("options", [{"target_weights": "int8"}, {"draft_weights": "int8"}, {"target_parallel": 2}])
def test_options_of_the_native_decoder(made: Callable[[str], Pair], open_llm: OpenLLM, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=rf"^{name}.* is for models that the native decoder runs; .*Phi"):
        open_llm(made("phi"), **options)
