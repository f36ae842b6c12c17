"""Bad input (docs: errors): refused with a sentence that says what was wrong; nobody else loses anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_support import FAMILIES, VOCAB, Pair, assert_at_rest, byte_tokenizer, prompts, random_model, save, token_ids

from pearl import LLM, SamplingParams
from pearl.errors import (
    ConfigurationError,
    EngineClosedError,
    InvalidRequestError,
    ModelLoadError,
    PearlError,
    QueueFullError,
    UnsupportedModelError,
)

OpenLLM = Callable[..., LLM]
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ([[1, 2, VOCAB]], str(VOCAB)),
        ([[1, -1]], "-1"),
        ([[1, "a"]], "'a'"),
        ([[1] * 96], "96 tokens"),
        ([[1] * 200], "200 tokens"),
    ],
    ids=["empty text", "no tokens", "id too large", "negative id", "not a number", "fills the context", "too long"],
)
def test_bad_prompts_are_refused_before_any_work(llama: Pair, open_llm: OpenLLM, prompt: Any, says: str) -> None:
    llm = open_llm(llama, window=3, max_model_len=96)
    with pytest.raises(InvalidRequestError, match=says):
        llm.generate(prompt, PARAMS)
    with pytest.raises(InvalidRequestError, match=says):
        llm.stream(prompt if isinstance(prompt, str) else prompt[0], PARAMS)
    assert_at_rest(llm)
    good = prompts([9], seed=41)[0]
    with pytest.raises(InvalidRequestError, match=says):  # one bad prompt: no other of the call has begun either
        llm.generate([good, *([prompt] if isinstance(prompt, str) else prompt)], PARAMS)
    assert_at_rest(llm)
    assert token_ids(llm.generate([good], PARAMS)) == [llama.greedy(good, 16)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"draft_temperature": float("inf")}, "draft_temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 200}, "min_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n must"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        SamplingParams(**values)


def test_unknown_parameters_and_options_are_named() -> None:
    with pytest.raises(InvalidRequestError, match="temprature"):
        SamplingParams.from_mapping({"temprature": 1.0})
    with pytest.raises(ConfigurationError, match="windoww"):
        LLM(windoww=3)


def test_parameters_that_name_unknown_tokens_are_refused(llama: Pair, open_llm: OpenLLM) -> None:
    llm = open_llm(llama, window=2)
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        llm.generate("a", SamplingParams(logit_bias={VOCAB: 1.0}))
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        llm.generate("a", SamplingParams(stop_token_ids=[-3]))
    with pytest.raises(InvalidRequestError, match="2 prompts but 3"):
        llm.generate(["a", "b"], [PARAMS] * 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "magic"}, "method"),
        ({"verification": "hope"}, "verification"),
        ({"dtype": "int8"}, "dtype"),
        ({"window": 0}, "window"),
        ({"window": -2}, "window"),
        ({"window": "large"}, "window"),
        ({"window": 2.5}, "window"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"page_size": 0}, "page_size"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "meta"}, "meta"),
        ({"method": "speculative", "pre_verify": False}, "speculative"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_loading(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        LLM(target="/nowhere", draft="/nowhere", **options)


def test_cuda_that_is_absent_is_an_error(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ({"device": "cuda"}, {"draft_device": "cuda:1"}, {"target_device": "cuda"}):
        with pytest.raises(ConfigurationError, match="CUDA"):
            llama.llm(**{"device": "auto", **options})


@pytest.mark.parametrize("role", ["target", "draft"])
def test_models_that_are_not_there(llama: Pair, tmp_path: Path, role: str) -> None:
    with pytest.raises(PearlError, match="nothing-here"):
        llama.llm(**{role: str(tmp_path / "nothing-here")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(PearlError, match="empty"):
        llama.llm(**{role: str(tmp_path / "empty")})
    shutil.copytree(getattr(llama, role), tmp_path / "no-weights")
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no-weights"):
        llama.llm(**{role: str(tmp_path / "no-weights")})


def test_an_unknown_family_is_named(llama: Pair, tmp_path: Path) -> None:
    shutil.copytree(llama.target, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    changed = {**json.loads(config.read_text()), "model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    config.write_text(json.dumps(changed))
    with pytest.raises(UnsupportedModelError, match=r"(?i)bloom"):
        llama.llm(target=str(tmp_path / "model"))


def test_different_tokenizers_are_an_error(llama: Pair, tmp_path: Path) -> None:
    """Equally large, but other tokens: no length check would notice."""
    other = byte_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other = type(other)(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)), eos_token="<|endoftext|>"
    )
    draft = save(random_model(FAMILIES["llama"], 5), other, tmp_path / "draft")
    with pytest.raises(ConfigurationError, match="of the 300 ids that both have, 2 mean something else"):
        llama.llm(draft=draft)
    with llama.llm(draft=draft, method="autoregressive") as llm:  # which needs no draft, and does not read it
        assert token_ids(llm.generate([[5, 6]], PARAMS)) == [llama.greedy([5, 6], 16)]


def test_a_kv_budget_that_cannot_hold_one_request(llama: Pair) -> None:
    with pytest.raises(ConfigurationError, match="kv_cache_memory"):
        llama.llm(kv_cache_memory=10_000)


def test_the_waiting_queue_has_a_limit(llama: Pair, open_llm: OpenLLM) -> None:
    batch = prompts((5, 6, 7, 8, 9), seed=42)
    llm = open_llm(llama, window=2, max_num_seqs=1, max_waiting=3)
    with pytest.raises(QueueFullError, match=r"5 requests at once, but there is room for 4: .* raise max_waiting"):
        llm.generate(batch, PARAMS)
    with pytest.raises(QueueFullError, match="10000 requests at once"):
        llm.generate(batch[0], SamplingParams(n=10_000))
    assert_at_rest(llm)  # all or nothing, before anything is queued
    assert token_ids(llm.generate(batch[:4], PARAMS)) == [llama.greedy(prompt, 16) for prompt in batch[:4]]


def test_what_runs_at_once_does_not_wait(llama: Pair, open_llm: OpenLLM) -> None:
    batch = prompts((5, 6, 7, 8, 9), seed=42)
    llm = open_llm(llama, window=2, max_num_seqs=5, max_waiting=2)
    assert token_ids(llm.generate(batch, PARAMS)) == [llama.greedy(prompt, 16) for prompt in batch]


def test_more_positions_than_the_models_were_made_for(llama: Pair, tmp_path: Path) -> None:
    llama.llm(max_model_len=512).close()
    with pytest.raises(ConfigurationError, match=r"max_model_len=513 is more than .*; lower it to at most 512"):
        llama.llm(max_model_len=513)
    shutil.copytree(llama.draft, tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 100}))
    with pytest.raises(ConfigurationError, match="at most 100"):
        llama.llm(draft=tmp_path / "short", max_model_len=101)


def test_a_refused_request_takes_nothing_from_one_that_runs(llama: Pair, open_llm: OpenLLM) -> None:
    llm = open_llm(llama, window=3)
    prompt = prompts([12], seed=43)[0]
    stream = llm.stream(prompt, PARAMS)
    tokens = list(next(stream).token_ids)
    with pytest.raises(InvalidRequestError):
        llm.generate([[1, 2], []], PARAMS)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == llama.greedy(prompt, 16)
    assert_at_rest(llm)


@pytest.mark.parametrize("who", ["draft", "target"])
def test_a_failing_model_is_reported_and_survived(
    llama: Pair, open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """A worker's exception ends the requests of its round with the reason; the next call works."""
    llm = open_llm(llama, window=3)
    draft, target = (llm.engine.workers.drafter._fused, "draft"), (llm.engine.workers.target._runner, "forward")

    def fail(work: object) -> None:
        raise RuntimeError("the cable came loose")

    with monkeypatch.context() as patch:
        patch.setattr(*(draft if who == "draft" else target), fail)
        outputs = llm.generate(prompts((4, 8), seed=44), PARAMS)
        chunks = list(llm.stream("abc", PARAMS))
    for failed in [*(output.outputs[0] for output in outputs), chunks[-1]]:
        assert failed.finish_reason == "abort"
        assert failed.error == "RuntimeError: the cable came loose"
    assert_at_rest(llm)
    prompt = prompts([9], seed=45)[0]
    assert token_ids(llm.generate([prompt], PARAMS)) == [llama.greedy(prompt, 16)]


def test_a_closed_llm_says_so(llama: Pair) -> None:
    llm = llama.llm(window=2)
    with llm:
        llm.stream("abc", PARAMS)
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("abc", PARAMS)
