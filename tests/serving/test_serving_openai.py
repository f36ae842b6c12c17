"""The API as the ``openai`` package uses it, against a live server; what comes back is what the library returns."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_support import NAME, OPTIONS, PROMPT, LiveServer

from pearl import LLM, SamplingParams
from pearl.outputs import RequestOutput

ROUND_PARTS = ("rounds", "round_seconds", "round_tokens")
MESSAGES: Any = [{"role": "user", "content": "def add(a, b):"}]
SEEDED = {"temperature": 0.9, "seed": 7, "max_tokens": 24}


def generated(llm: LLM, prompt: Any, **params: Any) -> RequestOutput:
    (output,) = llm.generate(prompt, SamplingParams(**params))
    return output


def test_a_seeded_completion_is_the_librarys(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, **SEEDED)
    expected = generated(llm, PROMPT, **SEEDED)
    assert answer.choices[0].text == expected.outputs[0].text
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert (answer.model, answer.object) == (NAME, "text_completion")


def test_every_sampling_parameter_reaches_the_engine(server: LiveServer, llm: LLM) -> None:
    params: dict[str, Any] = {
        "temperature": 1.2, "seed": 3, "max_tokens": 20, "top_k": 40, "top_p": 0.95, "min_p": 0.01,
        "repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 18,
        "stop_token_ids": [11, 12], "ignore_eos": True, "stop": ["zzz"], "n": 2, "draft_temperature": 0.5,
    }  # fmt: skip
    answer = server.post("/v1/completions", prompt=PROMPT, logit_bias={"5": -100, "300": 3.5}, **params).json()
    expected = generated(llm, PROMPT, logit_bias={5: -100, 300: 3.5}, **params)
    assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected.outputs]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    # None of them is idle: without it the text is another, or it ends elsewhere.
    plain = generated(llm, PROMPT, temperature=1.2, seed=3, max_tokens=20, n=2)
    assert plain.outputs[0].text != expected.outputs[0].text


def test_streamed_pieces_are_the_whole(client: openai.OpenAI, llm: LLM) -> None:
    chunks = list(
        client.completions.create(
            model=NAME, prompt=PROMPT, n=2, stream=True, stream_options={"include_usage": True}, **SEEDED
        )
    )
    expected = generated(llm, PROMPT, n=2, **SEEDED)
    assert len(chunks) > 5
    for output in expected.outputs:
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == output.index]
        assert "".join(choice.text for choice in own) == output.text
        assert [choice.finish_reason for choice in own if choice.finish_reason] == [output.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == sum(len(output.token_ids) for output in expected.outputs)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_every_form_of_prompt(server: LiveServer, llm: LLM) -> None:
    texts = [PROMPT, "import os\n"]
    ids = [llm.encode(text) for text in texts]
    expected = [output.outputs[0].text for output in llm.generate(texts, SamplingParams(max_tokens=8))]
    for prompt, count in ((texts, 2), (ids, 2), (texts[0], 1), (ids[0], 1), ([texts[0]], 1)):
        answer = server.post("/v1/completions", prompt=prompt, temperature=0, max_tokens=8).json()
        assert [choice["text"] for choice in answer["choices"]] == expected[:count]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids[:count]))


def test_echo_puts_the_prompt_before_the_text(server: LiveServer, client: openai.OpenAI, llm: LLM) -> None:
    prompts = [PROMPT, "import os\n"]
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "echo": True, "n": 2}
    texts = [prompt + output.text for prompt in prompts for output in generated(llm, prompt, max_tokens=6, n=2).outputs]
    whole = server.post("/v1/completions", prompt=prompts, **body).json()
    assert [choice["text"] for choice in whole["choices"]] == texts
    of_ids = server.post("/v1/completions", prompt=[llm.encode(prompt) for prompt in prompts], **body).json()
    assert [choice["text"] for choice in of_ids["choices"]] == texts
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(model=NAME, prompt=prompts, stream=True, **body):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_chat_is_the_librarys(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.chat(MESSAGES, SamplingParams(**SEEDED))
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, **SEEDED)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.outputs[0].text
    limited = client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0.9, seed=7, max_completion_tokens=5
    )
    assert limited.usage is not None
    assert limited.usage.completion_tokens == 5
    chunks = list(client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True, **SEEDED))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.outputs[0].text
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    assert chunks[-1].choices[0].finish_reason == expected.outputs[0].finish_reason


def test_chat_without_a_limit_has_the_context(server: LiveServer) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "ignore_eos": True}
    usage = server.post("/v1/chat/completions", **body).json()["usage"]
    assert usage["total_tokens"] == OPTIONS["max_model_len"]


def test_continuous_usage_counts_every_token(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, stream=True, stream_options=options, max_completion_tokens=20,
            extra_body={"ignore_eos": True},
        )
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert len(counts) >= len(chunks) - 1


def test_completion_logprobs_in_their_form(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, logprobs=2, **SEEDED)
    given = answer.choices[0].logprobs
    output = generated(llm, PROMPT, logprobs=2, **SEEDED).outputs[0]
    assert given is not None
    assert output.logprobs is not None
    assert given.token_logprobs == [entry.logprob for entry in output.logprobs]
    assert given.tokens is not None
    assert given.text_offset is not None
    for offset, token in zip(given.text_offset, given.tokens, strict=True):
        assert token in ("<|endoftext|>", output.text[offset : offset + len(token)])
    assert given.top_logprobs is not None
    for token, own, top, entry in zip(
        given.tokens, given.token_logprobs or [], given.top_logprobs, output.logprobs, strict=True
    ):
        assert top[token] == own
        assert list(top.values())[:2] == [logprob for _, logprob in entry.top]


def test_chat_logprobs_in_their_form(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **SEEDED}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    ended = choice.finish_reason == "stop"
    data = b"".join(bytes(entry.bytes or ()) for entry in entries[: -1 if ended else None])
    assert data.decode(errors="replace") == choice.message.content
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **asked)
        for entry in ((chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or [])
    ]
    assert streamed == entries


def test_token_ids_and_statistics_on_request(server: LiveServer, llm: LLM) -> None:
    expected = generated(llm, PROMPT, **SEEDED)
    answer = server.post("/v1/completions", prompt=PROMPT, return_token_ids=True, metrics=True, **SEEDED).json()
    assert answer["choices"][0]["token_ids"] == expected.outputs[0].token_ids
    assert answer["choices"][0]["prompt_token_ids"] == expected.prompt_token_ids
    found = answer["metrics"]["speculative_decoding"]
    histogram = found["acceptance_histogram"]
    assert sum(histogram) == found["num_spec_steps"] > 0
    assert sum(i * count for i, count in enumerate(histogram)) == found["num_accepted_draft_tokens"]
    assert found["num_accepted_draft_tokens"] <= found["num_draft_tokens"]
    assert found["mean_acceptance_length"] == 1 + found["num_accepted_draft_tokens"] / found["num_spec_steps"]
    assert answer["metrics"]["pearl"]["target_forwards"] > 0
    assert "metrics" not in server.post("/v1/completions", prompt=PROMPT, **SEEDED).json()


def test_models_and_tokenizers(client: openai.OpenAI, server: LiveServer, llm: LLM) -> None:
    assert [model.id for model in client.models.list()] == [NAME, "alias"]
    assert client.models.retrieve("alias").id == "alias"
    card = server.http.get(f"/v1/models/{NAME}").json()
    assert (card["max_model_len"], card["default_sampling_params"]) == (llm.max_model_len, {"temperature": 1.0})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/name")
    text = "def läuft(self):\n    return '→'\n"
    found = server.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert found["tokens"] == llm.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), llm.max_model_len)
    assert len(found["token_strs"]) == found["count"]
    assert server.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": text}
    chat = server.post("/tokenize", messages=MESSAGES).json()
    assert chat["tokens"] == llm.tokenizer.render_chat(MESSAGES)
    assert server.http.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    assert server.http.get("/health").json() == {"status": "ok"}
    assert set(server.http.get("/version").json()) == {"version"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 0}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"seed": "7"}, "seed"),
        ({"stream_options": {"other": True}}, "stream_options.other"),
    ],
)
def test_refusals_name_the_field(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    body = {"messages": MESSAGES} | changes
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=body.pop("messages"), extra_body=body)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.body["message"]  # type: ignore[index]


def test_metrics_count_what_was_returned(server: LiveServer) -> None:
    before = scrape(server)
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True, "n": 2, "metrics": True}
    answer = server.post("/v1/completions", **body).json()
    after = scrape(server)
    new = {name: after[name] - before.get(name, 0) for name in after}
    found = answer["metrics"]["speculative_decoding"]
    assert new["vllm:generation_tokens_total"] == answer["usage"]["completion_tokens"] == 24
    assert new["vllm:prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    assert new["vllm:prefix_cache_queries_total"] == 2 * answer["usage"]["prompt_tokens"]
    assert new["vllm:spec_decode_num_drafts_total"] == found["num_spec_steps"]
    assert new["vllm:spec_decode_num_draft_tokens_total"] == found["num_draft_tokens"]
    assert new["vllm:spec_decode_num_accepted_tokens_total"] == found["num_accepted_draft_tokens"] > 0
    positions = {
        name: value for name, value in new.items() if name.startswith("vllm:spec_decode_num_accepted_tokens_per")
    }
    assert sum(positions.values()) == found["num_accepted_draft_tokens"]
    assert new["vllm:time_to_first_token_seconds_count"] == new["vllm:e2e_request_latency_seconds_count"] == 2
    assert new["vllm:request_success_total length"] == 2
    assert new["vllm:inter_token_latency_seconds_count"] > 0
    of_modes = {part: sum(v for k, v in new.items() if k.startswith(f"pearl:{part}_total ")) for part in ROUND_PARTS}
    assert of_modes["rounds"] > 0
    assert of_modes["round_tokens"] == 24
    assert 0 < of_modes["round_seconds"] < 60
    assert (after["vllm:num_requests_running"], after["pearl:healthy"]) == (0, 1)
    assert server.post("/v1/completions", **body | {"n": 13}).status_code == 429  # 4 run, 8 wait
    assert scrape(server)["pearl:requests_refused_total queue_full"] == 1


def scrape(server: LiveServer) -> dict[str, float]:
    """Values by name, with what tells series of one name apart."""
    values = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == NAME
            more = [value for label, value in sample.labels.items() if label not in ("model_name", "engine")]
            values[" ".join([sample.name, *more])] = sample.value
    return values


def test_prompts_found_in_the_cache_are_told_once(server: LiveServer) -> None:
    """Of each prompt, however many outputs share it."""
    prompt = list(range(1000, 1070))
    server.post("/v1/completions", prompt=prompt, max_tokens=1)
    usage = server.post("/v1/completions", prompt=[prompt, [*prompt, 7]], n=2, max_tokens=1).json()["usage"]
    page = server.engine.llm.config.page_size
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2 * (69 // page * page)}
