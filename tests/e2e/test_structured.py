"""Structured output: whatever drafts, it is what the target alone would write under the same masks, and it is valid."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jsonschema
import pytest
import torch
from e2e_support import ALL_SETTINGS, EOS, VOCAB, Pair, Rounds, acceptance, assert_at_rest, prompts, token_ids
from graphed_llm import OpenGraphed
from joint_frequencies import ALARM, PROMPT, params_of, small_pair
from random_pace import RandomPace
from scipy.stats import chisquare

from pearl import LLM, SamplingParams, StructuredOutput
from pearl.errors import InvalidRequestError
from pearl.outputs import CompletionOutput

OpenLLM = Callable[..., LLM]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"enum": [1, 12, 123]}, "ok": {"type": "boolean"}},
    "required": ["name", "n", "ok"],
    "additionalProperties": False,
}
CHOICES = ("alpha", "alphabet soup", "beta", "gamma ray", "b")
FORMS: list[dict[str, Any]] = [
    {"json": SCHEMA},
    {"regex": r"[a-f]{3,9}-[0-9]{1,4}"},
    {"choice": CHOICES},
    {"grammar": 'root ::= "(" root ")" | [0-9] [0-9]?'},
    {"json_object": True},
]
METHODS: list[dict[str, Any]] = [{"method": "autoregressive"}, {"window": 3}, {"window": 4, "method": "speculative"}]
SETTINGS = (
    "pearl-1", "pearl-5", "pearl-auto", "pearl-no-pre-3", "pearl-no-post-3", "pearl-neither-4", "prepared-5",
    "prepared-no-pre-3", "speculative-3", "ngram-pearl", "ngram-speculative",
)  # fmt: skip


def requests(temperature: float, **values: Any) -> list[SamplingParams]:
    """Every form, beside requests without one, with penalties, and both."""
    common = {"temperature": temperature, "max_tokens": 40, **values}
    forms = [SamplingParams(seed=i, structured=form, **common) for i, form in enumerate(FORMS)]
    others: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 0.4},
        {"presence_penalty": 0.4, "structured": {"regex": "[0-9a-z]{12,20}"}},
        {"logit_bias": {5: 2.0}, "min_tokens": 4, "structured": {"regex": "[^x]{1,20}"}},
        {"structured": {"regex": "[a-z ]*"}, "ignore_eos": True, "stop_token_ids": [EOS + 1, EOS + 70]},
    ]
    return forms + [SamplingParams(seed=50 + i, **{**common, **other}) for i, other in enumerate(others)]


def batch_for(params: Sequence[SamplingParams]) -> list[list[int]]:
    return prompts([(1, 7, 20, 33, 12)[i % 5] for i in range(len(params))], seed=5)


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=("greedy", "coupled"))
def autoregressive(request: pytest.FixtureRequest, llama: Pair) -> tuple[float, list[list[int]]]:
    """One request at a time, without drafts and without batching."""
    params = requests(request.param)
    with llama.llm(method="autoregressive", verification="coupled", max_num_seqs=1) as llm:
        return request.param, token_ids(llm.generate(batch_for(params), params))


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_autoregressive_decoding_under_the_same_masks(
    llama: Pair, open_llm: OpenLLM, autoregressive: tuple[float, list[list[int]]], setting: str
) -> None:
    temperature, expected = autoregressive
    params, rounds = requests(temperature), Rounds()
    options = {**ALL_SETTINGS[setting], "verification": "coupled", "max_num_seqs": 4, "max_num_batched_tokens": 32}
    llm = open_llm(llama, **options, observer=rounds)
    outputs = llm.generate(batch_for(params), params)
    assert token_ids(outputs) == expected
    if "ngram" not in setting:
        assert 0.2 < acceptance(outputs) < 1
    if setting == "pearl-5":  # some ended inside what a verdict committed
        ends = [d.committed.index(EOS) + 1 < len(d.committed) for d in decisions(rounds) if EOS in d.committed]
        assert any(ends)
    assert_at_rest(llm)


def decisions(rounds: Rounds) -> list[Any]:
    return [decision for record in rounds for decision in record.result.decisions.values()]


@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_the_pace_does_not_matter(
    llama: Pair, open_llm: OpenLLM, autoregressive: tuple[float, list[list[int]]], draft: str
) -> None:
    temperature, expected = autoregressive
    options = {"draft": "ngram"} if draft == "ngram" else {}
    params = requests(temperature)
    llm = open_llm(llama, verification="coupled", max_window=5, max_num_seqs=6, **options)
    for seed in range(3):
        llm.engine.scheduler._pace = RandomPace(5, seed)
        assert token_ids(llm.generate(batch_for(params), params)) == expected
    assert_at_rest(llm)


def test_preemption_and_cached_prefixes_do_not_matter(
    llama: Pair, open_llm: OpenLLM, autoregressive: tuple[float, list[list[int]]]
) -> None:
    temperature, expected = autoregressive
    params = requests(temperature)
    memory = 2 * 12 * 8 * 3 * 2 * 2 * 16 * 4  # twelve pages of eight tokens for each of the two models
    llm = open_llm(
        llama, window=3, verification="coupled", max_num_seqs=8, page_size=8, max_model_len=80, kv_cache_memory=memory
    )
    outputs = llm.generate(batch_for(params), params)
    assert token_ids(outputs) == expected
    assert sum(output.outputs[0].metrics.preemptions for output in outputs) > 0
    roomy = open_llm(llama, window=3, verification="coupled", page_size=8)
    for cached in (False, True):
        outputs = roomy.generate(batch_for(params), params)
        assert token_ids(outputs) == expected
        assert any(output.outputs[0].metrics.cached_tokens for output in outputs) == cached


@pytest.mark.parametrize("on", ["target", "target apart"])
def test_captured_forwards_do_not_matter(
    llama: Pair, open_graphed: OpenGraphed, autoregressive: tuple[float, list[list[int]]], on: str
) -> None:
    """The target's are; nobody waits for its rows to mask them. (Windows that a host drafts wait for their device.)"""
    temperature, expected = autoregressive
    params = requests(temperature)
    graphed = open_graphed(llama, on, window=3, verification="coupled", max_num_seqs=4)
    outputs = graphed.llm.generate(batch_for(params), params)
    assert [output.outputs[0].error for output in outputs] == [None] * len(params)
    assert token_ids(outputs) == expected
    assert all(queue.replayed > 2 for queue in graphed.queues)
    assert_at_rest(graphed.llm)


def chosen_greedily(pair: Pair, prompt: list[int], choices: Sequence[str]) -> list[int]:
    """By transformers, and by trying each token: may any of the choices go on so?"""
    texts = [pair.tokenizer.convert_ids_to_tokens(i).replace("Ġ", " ") for i in range(VOCAB)]
    tokens, text = list(prompt), ""
    while True:
        with torch.inference_mode():
            logits = pair.judge(torch.tensor([tokens])).logits[0, -1, :VOCAB]
        allowed = [i for i in range(1, VOCAB) if any(c.startswith(text + texts[i]) for c in choices)]
        allowed += [EOS] * (text in choices)
        tokens.append(allowed[int(logits[allowed].argmax())])
        if tokens[-1] == EOS:
            return tokens[len(prompt) :]
        text += texts[tokens[-1]]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_masks_are_right(llama: Pair, open_llm: OpenLLM, options: dict[str, Any]) -> None:
    batch = prompts((3, 9, 14, 5, 21, 8), seed=9)
    outputs = open_llm(llama, **options).generate(batch, SamplingParams(structured={"choice": CHOICES}))
    assert token_ids(outputs) == [chosen_greedily(llama, prompt, CHOICES) for prompt in batch]
    assert len({output.outputs[0].text for output in outputs}) > 1
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)


def test_the_draft_is_masked_too(llama: Pair, open_llm: OpenLLM) -> None:
    """Or it would propose what cannot be: an unmasked one is hardly ever right about these."""
    batch, params = prompts((3, 9, 14, 5, 21, 8), seed=9), SamplingParams(structured={"choice": CHOICES})
    llm = open_llm(llama, window=3)
    assert acceptance(llm.generate(batch, params)) > 0.5
    llm.engine.workers.drafter._on_host._drawing._grammars.apply = lambda logits, rows: None
    assert acceptance(llm.generate(batch, params)) < 0.2


def is_valid(form: dict[str, Any], output: CompletionOutput) -> bool:
    if "json" in form or "json_object" in form:
        jsonschema.validate(json.loads(output.text), form.get("json", {"type": "object"}))
        return True
    if "choice" in form:
        return output.text in form["choice"]
    return re.fullmatch(form.get("regex", r"\(*[0-9]{1,2}\)*"), output.text) is not None


@pytest.mark.parametrize("rule", ["rejection", "coupled", "block"])
def test_what_ends_by_itself_is_valid(llama: Pair, open_llm: OpenLLM, rule: str) -> None:
    llm = open_llm(llama, verification=rule, window=4, max_num_seqs=32)
    ended: Counter[str] = Counter()
    for form in FORMS:
        params = SamplingParams(temperature=1.2, seed=3, n=12, max_tokens=80, structured=form)
        for output in llm.generate(prompts((9,), seed=2), params)[0].outputs:
            assert output.error is None
            if output.finish_reason == "stop":
                assert output.token_ids[-1] == EOS
                assert is_valid(form, output), (form, output.text)
                ended[next(iter(form))] += 1
    assert len(ended) == len(FORMS)
    cut = llm.generate(prompts((9,), seed=2), SamplingParams(temperature=1.2, n=20, max_tokens=2, structured=FORMS[2]))
    assert all(any(c.startswith(output.text) for c in CHOICES) for output in cut[0].outputs)
    assert_at_rest(llm)


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_the_distribution_is_the_masked_targets(
    tmp_path_factory: pytest.TempPathFactory, open_llm: OpenLLM, options: dict[str, Any], rule: str
) -> None:
    pair = small_pair(tmp_path_factory.mktemp("small"))
    ways = [[1, 2], [1, 3, 7], [2], [7, 7, 7, 1], [1, 3]]  # of tokens, which are letters with a space before each
    choices = ["".join(f" {chr(96 + token)}" for token in way) for way in ways]
    samples = 1500
    params = params_of(n=samples, ignore_eos=False, structured={"choice": choices})
    llm = open_llm(pair, verification=rule, max_num_seqs=64, **options)
    counts = Counter(map(tuple, token_ids(llm.generate([PROMPT], params))))
    expected = [samples * chance(pair, way, ways) for way in ways]
    assert sum(expected) == pytest.approx(samples)
    assert min(expected) > 5
    observed = [counts.pop((*way, 0)) for way in ways]
    assert not counts
    assert chisquare(observed, expected).pvalue > ALARM


def chance(pair: Pair, way: list[int], ways: Sequence[list[int]]) -> float:
    p = 1.0
    for i, token in enumerate([*way, 0]):
        with torch.inference_mode():
            logits = pair.judge(torch.tensor([[*PROMPT, *way[:i]]])).logits[0, -1].double()
        allowed = sorted({[*other, 0][i] for other in ways if other[:i] == way[:i]})
        p *= float(logits[allowed].softmax(0)[allowed.index(token)])
    return p


def test_a_grammar_without_a_way_on_ends_its_request_alone(llama: Pair, open_llm: OpenLLM) -> None:
    batch = prompts((5, 9, 6))
    banned = {i: -1e9 for i in range(VOCAB) if "z" in llama.tokenizer.convert_ids_to_tokens(i)}
    dead = SamplingParams(max_tokens=9, structured={"regex": "ab[yz]z"}, logit_bias=banned)
    plain = SamplingParams(max_tokens=9, ignore_eos=True)
    for options in ({"method": "autoregressive"}, {"window": 3}, {"draft": "ngram", "window": 2}):
        llm = open_llm(llama, **options)
        outputs = [output.outputs[0] for output in llm.generate(batch, [plain, dead, plain])]
        assert [outputs[0].token_ids, outputs[2].token_ids] == [llama.greedy(p, 9) for p in batch[::2]]
        assert outputs[1].finish_reason == "abort"
        assert "no token is left to draw" in str(outputs[1].error)
        assert "aby".startswith(outputs[1].text)
        assert_at_rest(llm)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"structured": {"regex": "(a"}}, "unclosed group"),
        ({"structured": {"json": {"type": "strin"}}}, "strin"),
        ({"structured": {"json": {"$ref": "http://localhost:9/x.json"}}}, "does not fetch"),
        ({"structured": {"json": {"$ref": "#"}}}, "no text matches"),
        ({"structured": {"json": False}}, "schema is false"),
        ({"structured": {"grammar": 'start: "a" b'}}, 'unknown name: "b"'),
        ({"structured": {"grammar": "root ::= (a"}}, "GBNF"),
        ({"structured": {"grammar": '%llguidance {"no_forcing": false}\nstart: "a"'}}, "not a request's"),
        ({"structured": {"grammar": "start: <|endoftext|>"}}, "special token"),
        ({"structured": {"regex": "a"}, "ignore_eos": True}, "stop_token_ids"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_queued(
    llama: Pair, open_llm: OpenLLM, values: dict[str, Any], says: str
) -> None:
    llm, bad, good = open_llm(llama, window=3), SamplingParams(**values), prompts((5,))[0]
    for refuse in (lambda: llm.generate([good, good], [SamplingParams(), bad]), lambda: llm.stream(good, bad)):
        with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
            refuse()
        assert caught.value.param == "structured"
        assert_at_rest(llm)


def test_without_the_library_there_is_a_sentence(
    llama: Pair, open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    llm = open_llm(llama)
    with pytest.raises(InvalidRequestError, match=re.escape("pip install 'pearl-engine[structured]'")):
        llm.generate([[1, 2]], SamplingParams(structured=StructuredOutput(regex="a")))
