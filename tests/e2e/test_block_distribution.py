"""verification="block": joint frequencies against the exact distribution, enumerated, as for the rejection rule.

Requests have no seed, for those with one are tested token by token; what draws their seeds is replaced by a count, so
that a run that passes will pass again. The last test reuses keys on purpose.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from e2e_support import Pair, Rounds, acceptance, token_ids
from joint_frequencies import ALARM, DEPTH, PROMPT, PROOF, SAMPLES, exact_joint, params_of, small_pair, smallest_p

import pearl.request_factory
from pearl import LLM, SamplingParams
from pearl.engine import request as request_module

OpenLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return small_pair(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def counted_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts; their n outputs have the seeds that follow."""
    counter = itertools.count(1)
    monkeypatch.setattr(pearl.request_factory.secrets, "randbits", lambda bits: next(counter) << 32)


def seedless(**values: Any) -> SamplingParams:
    return params_of(**{"seed": None, **values})


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pearl-1": ({"window": 1}, {}),
    "pearl-3": ({"window": 3}, {}),
    "auto window": ({}, {}),
    "no pre-verify": ({"window": 3, "pre_verify": False}, {}),
    "no post-verify": ({"window": 3, "post_verify": False}, {}),
    "speculative-4": ({"window": 4, "method": "speculative"}, {}),
    "ngram speculative": ({"window": 3, "draft": "ngram", "method": "speculative"}, {}),
    "greedy draft": ({"window": 3}, {"draft_temperature": 0.0}),
    "prepared": ({"window": 3, "prepared_windows": 64 * 4}, {}),
    "prepared, few": ({"window": 5, "prepared_windows": 24}, {"draft_temperature": 1.6}),
    "prepared, auto window": ({"prepared_windows": 64}, {}),
    "prepared, no pre-verify": ({"window": 3, "pre_verify": False, "prepared_windows": 64}, {}),
    "top-k, top-p, other draft temperature": (
        {"window": 3},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "draft_temperature": 0.7},
    ),
    "preempted": (
        {"window": 3, "max_num_seqs": 32, "page_size": 4, "kv_cache_memory": 2 * 16 * 4 * 256, "max_model_len": 32},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_joint_frequencies_are_the_targets(small: Pair, open_llm: OpenLLM, case: str) -> None:
    options, values = CASES[case]
    params = seedless(**values)
    llm = open_llm(small, verification="block", **{"max_num_seqs": 64, **options})
    outputs = llm.generate([PROMPT], params)
    assert smallest_p(token_ids(outputs), exact_joint(small, params)) > ALARM
    assert 0.1 < acceptance(outputs) < 0.98
    if "prepared_windows" in options and "window" in options:  # the pace may decide for none
        assert sum(completion.metrics.prepared_hits for output in outputs for completion in output.outputs) > 100


def test_more_tokens_are_accepted_than_one_by_one(small: Pair, open_llm: OpenLLM) -> None:
    """Of windows of eight. The gain is several times its standard error."""
    found = {}
    for rule in ("rejection", "block"):
        llm = open_llm(small, verification=rule, method="speculative", window=8, max_num_seqs=64)
        found[rule] = acceptance(llm.generate([PROMPT], seedless(n=400, max_tokens=40)))
    assert found["block"] > found["rejection"] + 0.01


def test_blocks_are_what_a_round_tests(small: Pair, open_llm: OpenLLM) -> None:
    """The operator sees all pending tokens and the first of the new window at once, and q of each."""
    rounds = Rounds()
    llm = open_llm(small, verification="block", window=3, max_num_seqs=8, observer=rounds)
    seen = recording(llm)
    llm.generate([PROMPT], seedless(n=64))
    sizes = {tuple(b - a for a, b in itertools.pairwise(call["row_start"])) for call in seen}
    assert {size for call in sizes for size in call} >= {1, 3}
    for call in seen:
        assert all(row >= 0 for row, token in zip(call["draft_rows"], call["draft_tokens"], strict=True) if token >= 0)
    partly = [d for r in rounds for d in r.result.decisions.values() if 0 < d.accepted < len(d.tested)]
    assert partly


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 5, "max_num_seqs": 3}, {}], ids=str)
def test_requests_with_a_seed_are_tested_one_by_one(small: Pair, open_llm: OpenLLM, options: dict[str, Any]) -> None:
    """And say what they say under the rejection rule, beside others that have none."""
    params = params_of(n=60, max_tokens=20)
    expected = token_ids(open_llm(small, window=3, max_num_seqs=64).generate([PROMPT], params))
    llm = open_llm(small, verification="block", **{"max_num_seqs": 64, **options})
    outputs = llm.generate([PROMPT, PROMPT], [params, seedless(n=60, max_tokens=20)])
    assert token_ids([outputs[0]]) == expected
    assert token_ids([outputs[1]]) != expected


def test_greedy_requests_are_the_targets(small: Pair, open_llm: OpenLLM) -> None:
    params = params_of(n=1, temperature=0.0, max_tokens=30)
    plain = token_ids(open_llm(small, method="autoregressive").generate([PROMPT], params))
    assert token_ids(open_llm(small, verification="block", window=4).generate([PROMPT], params)) == plain


def recording(llm: LLM) -> list[dict[str, Any]]:
    """The arguments of every call of the verdict."""
    verifier, seen = llm.engine._verifier, []
    right = verifier._kernels.verify_numbers

    def verify_numbers(*args: Any, **given: Any) -> Any:
        seen.append(given)
        return right(*args, **given)

    verifier._kernels = dataclasses.replace(verifier._kernels, verify_numbers=verify_numbers)
    return seen


def test_keys_that_are_never_changed_are_found(small: Pair, open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that a verdict has looked at beyond the first failure draws again: a small error, of which many samples
    tell. test_1_no_random_number_is_examined_twice_in_blocks finds it at once."""
    monkeypatch.setattr(request_module, "_rekeyed", lambda seed, length: seed)
    llm = open_llm(small, verification="block", method="speculative", window=4, max_num_seqs=64)
    params = seedless(n=8 * SAMPLES, max_tokens=DEPTH)
    assert smallest_p(token_ids(llm.generate([PROMPT], params)), exact_joint(small, params)) < PROOF
