"""What a request that says nothing gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import BODY, FakeEngine, ask, chunk

from pearl import LLM, ConfigurationError, SamplingParams
from pearl.serving.protocol import CompletionRequest
from pearl.serving.sampling import SamplingDefaults, sampling_params


def defaults_of(folder: Path, **said: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(said))
    return SamplingDefaults.of_model(str(folder))


def params(defaults: SamplingDefaults, max_tokens: int | None = 16, **fields: Any) -> SamplingParams:
    body = CompletionRequest(prompt="a", **fields)
    return sampling_params(body, defaults, room=100, max_tokens=max_tokens, logprobs=None)


def test_a_request_then_the_model_then_openai(tmp_path: Path) -> None:
    said = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": 3, "min_p": None}
    defaults = defaults_of(tmp_path, **said)
    assert params(defaults) == SamplingParams(
        temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, max_tokens=16
    )
    own = params(defaults, temperature=0.0, top_k=-1, top_p=1.0, repetition_penalty=1.0)
    assert own == SamplingParams(max_tokens=16)
    assert params(SamplingDefaults.of_openai()) == SamplingParams(temperature=1.0, max_tokens=16)
    assert SamplingDefaults.of_model(str(tmp_path / "nowhere_empty")) == SamplingDefaults.of_openai()


def test_max_new_tokens_limits_every_request(tmp_path: Path) -> None:
    defaults = defaults_of(tmp_path, max_new_tokens=10)
    assert [params(defaults, asked).max_tokens for asked in (None, 4, 50)] == [10, 4, 10]
    assert params(SamplingDefaults.of_openai(), None).max_tokens == 100
    assert defaults.shown() == {"temperature": 1.0, "max_tokens": 10}


def test_a_file_that_makes_no_sense_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"generation_config.json: top_p must be"):
        defaults_of(tmp_path, top_p=3)


def test_completions_have_sixteen_tokens_by_default(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("a", "length"))
    ask(engine, "POST", "/v1/completions", json={"prompt": "a"})
    ask(engine, "POST", "/v1/completions", json=BODY)
    assert [asked.max_tokens for _, asked in engine.asked] == [16, 4]


def test_templates_of_clients_are_not_run(idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("a", "length"))
    messages = [{"role": "user", "content": "a"}]
    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": messages, "chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}
        response = ask(engine, "POST", path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")
        body["chat_template_kwargs"] = {"enable_thinking": False}
        assert ask(engine, "POST", path, json=body).status_code == 200


def test_every_field_arrives() -> None:
    fields: dict[str, Any] = {
        "temperature": 1.2, "seed": 3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 8, "stop_token_ids": [11, 12],
        "ignore_eos": True, "stop": ["zzz"], "n": 2, "draft_temperature": 0.5,
    }  # fmt: skip
    body = CompletionRequest(prompt="a", logit_bias={"5": -100, "300": 3.5}, **fields)
    made = sampling_params(body, SamplingDefaults.of_openai(), room=100, max_tokens=20, logprobs=3)
    assert made == SamplingParams(logit_bias={5: -100, 300: 3.5}, max_tokens=20, logprobs=3, **fields)
    for name in fields:
        assert getattr(made, name) != getattr(SamplingParams(), name)
