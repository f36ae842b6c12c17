"""No output depends on the pace: modes and windows that switch at random, and the automatic pace itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from e2e_support import Pair, Rounds, assert_at_rest, prompts, token_ids
from joint_frequencies import ALARM, PROMPT, exact_joint, params_of, small_pair, smallest_p
from random_pace import RandomPace

from pearl import LLM, SamplingParams
from pearl.methods import METHODS
from pearl.request_factory import RequestFactory

OpenLLM = Callable[..., LLM]
LARGEST = 5
TOKENS = 24


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return small_pair(tmp_path_factory.mktemp("small"))


def switching(llm: LLM, seed: int = 0) -> LLM:
    llm.engine.scheduler._pace = RandomPace(LARGEST, seed)
    return llm


def modes(rounds: Rounds) -> set[str]:
    return {record.plan.pace.mode for record in rounds if record.plan.pace is not None}


@pytest.mark.parametrize("options", [{}, {"draft": "ngram"}], ids=("model", "ngram"))
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_greedy_output_is_the_targets_whatever_modes_follow_each_other(
    pairs: dict[str, Pair], open_llm: OpenLLM, family: str, options: dict[str, Any]
) -> None:
    pair, batch, rounds = pairs[family], prompts((1, 9, 30, 17, 4, 22, 8)), Rounds()
    llm = open_llm(pair, **options, max_window=LARGEST, max_num_seqs=5, max_num_batched_tokens=32, observer=rounds)
    outputs = switching(llm).generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert modes(rounds) == set(METHODS)
    assert_at_rest(llm)


@pytest.mark.parametrize("seed", [1, 2])
def test_coupled_output_is_the_seeded_one(llama: Pair, open_llm: OpenLLM, seed: int) -> None:
    batch = prompts((3, 11, 26, 7))
    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=TOKENS, ignore_eos=True) for i in range(4)]
    expected = open_llm(llama, method="autoregressive", verification="coupled").generate(batch, params)
    llm = switching(open_llm(llama, verification="coupled", max_window=LARGEST, max_num_seqs=3), seed)
    assert token_ids(llm.generate(batch, params)) == token_ids(expected)


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"method": "speculative"}], ids=str)
def test_a_seed_gives_the_same_output_at_any_pace(llama: Pair, open_llm: OpenLLM, options: dict[str, Any]) -> None:
    """Under the rejection rule: requests beside it, of which some are greedy or have no seed, make no difference."""
    batch = prompts((3, 11, 26, 7))
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=TOKENS, ignore_eos=True) for i in range(4)]
    expected = token_ids(open_llm(llama, window=3).generate(batch, params))
    for pace in (lambda llm: llm, switching):
        llm = pace(open_llm(llama, max_window=LARGEST, **options))
        assert token_ids(llm.generate(batch, params)) == expected
        strangers = [SamplingParams(temperature=t, max_tokens=9, ignore_eos=True) for t in (0.0, 1.0, 0.0, 1.0)]
        mixed = llm.generate(batch + batch, [*strangers, *params])
        assert token_ids(mixed[4:]) == expected


@pytest.mark.parametrize("seed", [3, 4])
def test_frequencies_are_the_targets_although_modes_change(
    small: Pair, open_llm: OpenLLM, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests that are not pinned: tokens of the target's own beside drafted ones."""
    monkeypatch.setattr(RequestFactory, "_is_pinned", lambda llm, params: False)
    rounds, params = Rounds(), params_of()
    llm = switching(open_llm(small, max_window=LARGEST, max_num_seqs=64, observer=rounds), seed)
    outputs = llm.generate([PROMPT], params)
    assert smallest_p(token_ids(outputs), exact_joint(small, params)) > ALARM
    assert modes(rounds) == set(METHODS)
    bonus = [d for r in rounds for d in r.result.decisions.values() if d.next_token is not None and not d.rejected]
    assert len(bonus) > 100


def test_the_automatic_pace_decides_for_itself_and_says_so(llama: Pair, open_llm: OpenLLM) -> None:
    batch, rounds = prompts((3, 11, 26, 7)), Rounds()
    llm = open_llm(llama, observer=rounds)
    outputs = llm.generate(batch, SamplingParams(max_tokens=200, ignore_eos=True))
    assert token_ids(outputs) == [llama.greedy(prompt, 200) for prompt in batch]
    paces = [record.plan.pace for record in rounds]
    assert len({pace.mode for pace in paces if pace is not None}) > 1  # it looks at what it does not know
    assert all(pace is not None and pace.tokens_per_second > 0 for pace in paces)
    for record in rounds:
        assert record.plan.load is not None
        assert record.plan.load.batch == len(record.plan.pace.windows)  # type: ignore[union-attr]
