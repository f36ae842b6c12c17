"""Log-probabilities of prompts, as clients of the API ask for them: what comes back is what the library returns."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import httpx
import jinja2
import openai
import pytest
from async_support import greedy, read, run, serving
from fake_engine import BODY, FakeEngine, ask, chunk
from serving_support import NAME, PROMPT, LiveServer

from pearl import LLM, SamplingParams
from pearl.messages import TokenLogprobs
from pearl.outputs import RequestOutput
from pearl.serving.logprobs import ranked_logprobs

TEXTS = (PROMPT, "import os\nimport sys\n\n\ndef main(argv=None):\n    # " + "läuft → " * 20)
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}


def generated(llm: LLM, prompt: Any, most: int, **params: Any) -> RequestOutput:
    (output,) = llm.generate(prompt, SamplingParams(prompt_logprobs=most, logprobs=most, **ASKED | params))
    return output


def assert_is(choice: dict[str, Any], output: RequestOutput, llm: LLM, prompt: str) -> None:
    """The form of a prompt with its output: numbers and texts of each token, where it begins, what else was likely."""
    completion, told = output.outputs[0], choice["logprobs"]
    tokens = [*output.prompt_token_ids, *completion.token_ids]
    found = [*(output.prompt_logprobs or ()), *(completion.logprobs or ())]
    assert choice["text"] == prompt + completion.text
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is found[0] is None
    assert told["token_logprobs"][1:] == pytest.approx([entry.logprob for entry in found[1:] if entry], abs=1e-4)
    names = [bytes(llm.tokenizer.token_bytes(token)) for token in tokens]
    for name, data in zip(told["tokens"], names, strict=True):
        assert name.startswith("bytes:") or name.encode() == data
    whole = choice["text"].encode()
    for offset, name, size in zip(told["text_offset"], told["tokens"], range(len(names)), strict=True):
        if not name.startswith("bytes:"):  # whole characters: the tokens before it are the text before it
            assert len(whole[: len(b"".join(names[:size]))].decode()) == offset
    for top, entry in zip(told["top_logprobs"][1:], found[1:], strict=True):
        assert entry is not None
        assert max(top.values()) == pytest.approx(entry.top[0][1], abs=1e-4)
        assert len(top) <= len(entry.top) + 1


def test_echo_with_logprobs_is_the_librarys(server: LiveServer, llm: LLM) -> None:
    ids = [llm.encode(text) for text in TEXTS]
    expected = [generated(llm, text, 2) for text in TEXTS]
    for prompt, count in ((list(TEXTS), 2), (ids, 2), (TEXTS[0], 1), (ids[0], 1)):
        answer = server.post("/v1/completions", prompt=prompt, echo=True, logprobs=2, **ASKED).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        for choice, output, text in zip(answer["choices"], expected, TEXTS, strict=False):
            assert_is(choice, output, llm, text)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids[:count]))
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_as_the_openai_package_reads_it(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model=NAME, prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
        told = answer.choices[0].logprobs
    assert told is not None
    assert "".join(told.tokens or ()) == answer.choices[0].text == PROMPT


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "import os"]])
def test_the_prompt_alone(server: LiveServer, prompt: Any) -> None:
    asked = {"prompt": prompt, "echo": True, "logprobs": 1, "seed": 3}
    alone = server.post("/v1/completions", max_tokens=0, return_token_ids=True, **asked).json()
    longer = server.post("/v1/completions", max_tokens=1, **asked).json()
    assert alone["usage"]["completion_tokens"] == 0
    for choice, other in zip(alone["choices"], longer["choices"], strict=True):
        assert (choice["token_ids"], choice["finish_reason"]) == ([], "length")
        for name, values in choice["logprobs"].items():
            if name in ("tokens", "text_offset"):
                assert values == other["logprobs"][name][:-1]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
            other["logprobs"]["token_logprobs"][1:-1], abs=1e-4
        )
        assert other["text"].startswith(choice["text"])
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    texts = [prompt] if isinstance(prompt, str) else prompt
    plain = server.post("/v1/completions", prompt=prompt, echo=True, max_tokens=0).json()
    assert [(choice["text"], choice["logprobs"]) for choice in plain["choices"]] == [(text, None) for text in texts]
    refused = server.post("/v1/completions", prompt=prompt, max_tokens=0, logprobs=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def joined(response: httpx.Response) -> dict[int, dict[str, Any]]:
    """The choices of a stream: texts and lists put together."""
    choices: dict[int, dict[str, Any]] = {}
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        for choice in json.loads(line)["choices"]:
            whole = choices.setdefault(choice["index"], {"text": "", "logprobs": {}})
            whole["text"] += choice["text"]
            for name, values in choice["logprobs"].items():
                whole["logprobs"].setdefault(name, []).extend(values)
    return choices


def test_a_stream_tells_the_same(server: LiveServer) -> None:
    asked = {"prompt": list(TEXTS), "echo": True, "logprobs": 1, "n": 2, **ASKED}
    whole = server.post("/v1/completions", **asked).json()["choices"]
    pieces = joined(server.post("/v1/completions", stream=True, **asked))
    assert len(whole) == len(pieces) == 4
    for choice in whole:
        piece = pieces[choice["index"]]
        assert piece["text"] == choice["text"]
        for name in ("tokens", "text_offset"):
            assert piece["logprobs"][name] == choice["logprobs"][name]
        numbers, expected = (each["logprobs"]["token_logprobs"] for each in (piece, choice))
        assert numbers[1:] == pytest.approx(expected[1:], abs=1e-4)
    alone = joined(server.post("/v1/completions", stream=True, **asked | {"max_tokens": 0}))
    assert [alone[index]["text"] for index in range(4)] == [text for text in TEXTS for _ in range(2)]


def test_greedy_is_told_by_equality_with_the_largest(server: LiveServer, llm: LLM) -> None:
    """As lm-eval tells it, of the tokens behind a context, with the token that it asks for too much."""
    context = llm.encode(PROMPT)
    (greedy_output,) = llm.generate([context], SamplingParams(max_tokens=8, ignore_eos=True))
    likely = greedy_output.outputs[0].token_ids
    for tail, expected in ((likely, True), ([*likely[:-1], likely[-1] - 1], False), ([7, *likely[1:]], False)):
        asked = {"prompt": [[*context, *tail]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
        (choice,) = server.post("/v1/completions", echo=True, **asked).json()["choices"]
        told = choice["logprobs"]
        numbers, tops = (told[name][len(context) : -1] for name in ("token_logprobs", "top_logprobs"))
        assert len(numbers) == len(tail)
        assert all(own == max(top.values()) for own, top in zip(numbers, tops, strict=True)) is expected


def test_a_prompt_that_ends_inside_a_character(server: LiveServer, llm: LLM) -> None:
    *begin, _ = llm.encode("a\N{SNOWMAN}")
    asked = {"prompt": begin, "echo": True, "logprobs": 0, "logit_bias": {str(llm.encode("b")[0]): 100}, **ASKED}
    (choice,) = server.post("/v1/completions", **asked).json()["choices"]
    told, generated_from = choice["logprobs"], len(llm.tokenizer.decode(begin))
    assert choice["text"].startswith(llm.tokenizer.decode(begin))
    assert told["tokens"][0] == "a"
    assert told["tokens"][1].startswith("bytes:")
    assert told["text_offset"][: len(begin)] == [0] + [1] * (len(begin) - 1)
    assert told["text_offset"][len(begin)] == generated_from
    assert [len(top) for top in told["top_logprobs"][1:]] == [1] * (len(begin) + 4)


def test_vllms_field(server: LiveServer, llm: LLM) -> None:
    output = generated(llm, PROMPT, 2)
    (choice,) = server.post("/v1/completions", prompt=PROMPT, prompt_logprobs=2, **ASKED).json()["choices"]
    assert_ranked(choice["prompt_logprobs"], output)
    # With an echo that wants fewer alternatives, each has its own.
    both = server.post("/v1/completions", prompt=PROMPT, prompt_logprobs=2, echo=True, logprobs=0, **ASKED).json()
    assert_ranked(both["choices"][0]["prompt_logprobs"], output)
    assert {len(top) for top in both["choices"][0]["logprobs"]["top_logprobs"][1:]} == {1}
    messages = [{"role": "user", "content": PROMPT}]
    answer = server.post("/v1/chat/completions", messages=messages, prompt_logprobs=2, n=2, **ASKED).json()
    assert_ranked(answer["prompt_logprobs"], generated(llm, llm.tokenizer.render_chat(messages), 2))
    for path, prompt in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": messages})):
        for wrong in ({"prompt_logprobs": 1, "stream": True}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1}):
            refused = server.post(path, **prompt, **wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


def assert_ranked(told: list[dict[str, Any] | None], output: RequestOutput) -> None:
    found = output.prompt_logprobs
    assert found is not None
    assert told[0] is None
    for token, entries, entry in zip(output.prompt_token_ids[1:], told[1:], found[1:], strict=True):
        assert entries is not None
        assert entry is not None
        assert entries[str(token)]["logprob"] == pytest.approx(entry.logprob, abs=1e-4)
        assert set(entries) == {str(token), *(str(other) for other, _ in entry.top)}
        for rank, (other, _) in enumerate(entry.top, 1):
            assert entries[str(other)]["rank"] == rank
        assert entries[str(token)]["rank"] in (None, 1, 2)


def test_outputs_wait_for_who_tells_of_their_prompt(idle_llm: LLM) -> None:
    """The second output of a prompt may come first, but its prompt is told with the first."""
    told = (None, *[TokenLogprobs(-1.0, ())] * (len(idle_llm.encode(str(BODY["prompt"]))) - 1))
    first = replace(chunk("a"), logprobs=(TokenLogprobs(-2.0, ()),), prompt_logprobs=told)
    others = [replace(one, logprobs=(TokenLogprobs(-3.0, ()),)) for one in (chunk("b", index=1), chunk("c", "stop"))]
    last = replace(chunk("d", "stop", index=1), logprobs=(TokenLogprobs(-4.0, ()),))
    asked = BODY | {"n": 2, "echo": True, "logprobs": 0, "stream": True}
    pieces = joined(ask(FakeEngine(idle_llm, others[0], last, first, others[1]), "POST", "/v1/completions", json=asked))
    assert {index: piece["text"] for index, piece in pieces.items()} == {0: "secret wordsac", 1: "secret wordsbd"}
    numbers = [pieces[index]["logprobs"]["token_logprobs"] for index in (0, 1)]
    assert [each[: len(told)] for each in numbers] == [[None] + [-1.0] * (len(told) - 1)] * 2
    assert [each[len(told) :] for each in numbers] == [[-2.0, -3.0], [-3.0, -4.0]]
    failing = FakeEngine(idle_llm, others[0], chunk("", "abort", "it broke"))
    assert ask(failing, "POST", "/v1/completions", json=asked).status_code == 500


def test_what_many_outputs_tell_of_a_prompt_holds_nobody_up(
    server: LiveServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found once, and not on the event loop, however short the prompt is."""
    threads = []

    def watched(*asked: Any) -> Any:
        threads.append(threading.current_thread().name)
        return ranked_logprobs(*asked)

    monkeypatch.setattr("pearl.serving.answers.ranked_logprobs", watched)
    texts = [TEXTS[1], TEXTS[1] + "x"]
    answer = server.post("/v1/completions", prompt=texts, prompt_logprobs=20, n=4, **ASKED).json()
    assert [name.startswith("pearl-texts") for name in threads] == [True, True]
    for choice in answer["choices"]:
        (output,) = llm.generate(texts[choice["index"] // 4], SamplingParams(max_tokens=1, prompt_logprobs=20))
        found = choice["prompt_logprobs"]
        assert len(found) == len(output.prompt_token_ids)
        for entries, entry in zip(found[1:], (output.prompt_logprobs or ())[1:], strict=True):
            assert entry is not None
            assert entries[str(entry.top[0][0])]["logprob"] == pytest.approx(entry.top[0][1], abs=1e-4)
    assert answer["usage"]["completion_tokens"] == 8 * ASKED["max_tokens"]
    assert "prompt_logprobs" not in answer


def test_a_slow_reader_misses_nothing_of_the_prompt() -> None:
    async def test() -> None:
        async with serving(dtype="float32") as engine:
            prompt = engine.llm.encode(PROMPT)
            slow = engine.submit(prompt, greedy(30, prompt_logprobs=1))
            await read(engine.submit([5, 6, 7], greedy(100)))
            await engine.drain()
            (output,) = await read(slow)
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(prompt)

    run(test())


def test_what_clients_that_make_prompts_themselves_ask_for(server: LiveServer, llm: LLM) -> None:
    """As lm-eval's remote tokenizer does: ids of special tokens by their texts, prompts by the template."""
    info = server.http.get("/tokenizer_info").json()
    assert set(info) >= {"bos_token", "eos_token", "pad_token", "chat_template"}
    for name in ("bos_token", "eos_token", "pad_token"):
        found = server.post("/tokenize", prompt=info[name], add_special_tokens=False).json()["tokens"]
        assert found == list(llm.tokenizer.eos_ids)
    messages = [{"role": "user", "content": "def add(a, b):"}, {"role": "assistant", "content": "    return a + b"}]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(info["chat_template"])
    text = template.render(messages=messages, add_generation_prompt=True)
    own = server.post("/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
    assert own == server.post("/tokenize", messages=messages).json()["tokens"]
    assert server.post("/detokenize", tokens=own).json() == {"prompt": text}
