"""Requests that are not drafted for, among those that are: the same tokens, no drafting, nobody waits long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from e2e_support import ALL_SETTINGS, Pair, Rounds, assert_at_rest, prompts, token_ids
from joint_frequencies import ALARM, PROMPT, exact_joint, params_of, small_pair, smallest_p
from random_pace import RandomPace

from pearl import LLM, SamplingParams
from pearl.methods import METHODS, Mode
from pearl.outputs import RequestOutput
from pearl.pace import Load, MeasuredRound, Pace

OpenLLM = Callable[..., LLM]
TOKENS = 24
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True, token_sources=True)
LENGTHS = (9, 30, 17, 4, 22)
PLAIN = (False, True, False, True, True)  # of these prompts


def mixed(params: SamplingParams) -> list[SamplingParams]:
    return [replace(params, draft=not plain, seed=params.seed and params.seed + i) for i, plain in enumerate(PLAIN)]


def paced(llm: LLM, pace: Any) -> LLM:
    llm.engine.scheduler._pace = llm.engine._pace = pace
    return llm


def assert_nothing_was_drafted(outputs: list[RequestOutput]) -> None:
    plain = [output.outputs[0] for output, is_plain in zip(outputs, PLAIN, strict=True) if is_plain]
    for output in plain:
        counted = output.metrics
        assert (counted.drafted, counted.draft_forwards, counted.tested, counted.prepared) == (0, 0, 0, 0)
        assert output.sources == ["plain"] * len(output.token_ids)
        assert not any(output.drafted)
    assert len(plain) == sum(PLAIN)


@pytest.mark.parametrize("setting", ["autoregressive", "pearl-3", "pearl-auto", "pearl-no-pre-3", "pearl-no-post-3",
                                     "pearl-neither-4", "prepared-5", "speculative-3", "speculative-auto",
                                     "ngram-pearl", "ngram-speculative"])  # fmt: skip
def test_greedy_output_is_the_targets_with_every_method(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_num_seqs=4, max_num_batched_tokens=32)
    batch = prompts(LENGTHS)
    outputs = llm.generate(batch, mixed(GREEDY))
    assert token_ids(outputs) == [llama.greedy(prompt, TOKENS) for prompt in batch]
    assert_nothing_was_drafted(outputs)
    if setting != "autoregressive":
        assert all(output.metrics.drafted for output, plain in zip(outputs, PLAIN, strict=True) if not plain)
    assert_at_rest(llm)


@pytest.mark.parametrize("options", [{}, {"draft": "ngram"}, {"prefix_caching": False}], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_modes_may_follow_each_other_at_random(
    llama: Pair, open_llm: OpenLLM, seed: int, options: dict[str, Any]
) -> None:
    batch, rounds = prompts(LENGTHS), Rounds()
    llm = open_llm(llama, **options, max_window=5, max_num_seqs=3, max_num_batched_tokens=32, observer=rounds)
    outputs = paced(llm, RandomPace(5, seed)).generate(batch, mixed(GREEDY))
    assert token_ids(outputs) == [llama.greedy(prompt, TOKENS) for prompt in batch]
    assert_nothing_was_drafted(outputs)
    assert len({record.plan.pace.mode for record in rounds if record.plan.pace is not None}) >= 5
    assert_at_rest(llm)


def test_preempted_and_found_in_the_prefix_cache(llama: Pair, open_llm: OpenLLM) -> None:
    pages, page_bytes = 11, 16 * 2 * llama.judge.config.num_hidden_layers * 2 * 16 * 4
    memory = 2 * pages * page_bytes
    scarce = open_llm(llama, window=3, max_num_seqs=5, max_model_len=96, kv_cache_memory=memory)
    batch = prompts((40, 41, 42, 39, 44))
    for _ in range(2):
        outputs = scarce.generate(batch, mixed(GREEDY))
        assert token_ids(outputs) == [llama.greedy(prompt, TOKENS) for prompt in batch]
        assert_nothing_was_drafted(outputs)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert_at_rest(scarce)


@pytest.mark.parametrize("verification", ["coupled", "rejection", "block"])
def test_a_seed_gives_what_autoregressive_decoding_gives(llama: Pair, open_llm: OpenLLM, verification: str) -> None:
    batch = prompts(LENGTHS)
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=TOKENS, ignore_eos=True)
    expected = token_ids(
        open_llm(llama, method="autoregressive", verification=verification).generate(batch, mixed(params))
    )
    for seed in (1, 2):
        llm = paced(open_llm(llama, verification=verification, max_window=5, max_num_seqs=4), RandomPace(5, seed))
        outputs = token_ids(llm.generate(batch, mixed(params)))
        compared = [verification == "coupled" or plain for plain in PLAIN]
        assert [out for out, same in zip(outputs, compared, strict=True) if same] == [
            out for out, same in zip(expected, compared, strict=True) if same
        ]


def test_sampled_frequencies_are_the_targets(tmp_path_factory: pytest.TempPathFactory, open_llm: OpenLLM) -> None:
    """Of both halves of a batch, one of which is not drafted for."""
    small, params = small_pair(tmp_path_factory.mktemp("small")), params_of(seed=None)
    llm = open_llm(small, window=3, max_num_seqs=64, seed=11)
    outputs = llm.generate([PROMPT, PROMPT], [params, replace(params, draft=False)])
    joint = exact_joint(small, params)
    for output in outputs:
        assert smallest_p(token_ids([output]), joint) > ALARM
    assert outputs[0].metrics.drafted
    assert not outputs[1].metrics.drafted


class Steady:
    """One mode; keeps what it is asked and told."""

    changes = listens = True

    def __init__(self, mode: Mode) -> None:
        self.mode, self.loads, self.told = mode, list[Load](), list[MeasuredRound]()

    def decide(self, request_ids: Any, load: Load, pinned: bool) -> Pace:
        self.loads.append(load)
        return Pace(self.mode, (3,) * len(request_ids))

    def observe(self, measured: MeasuredRound) -> None:
        self.told.append(measured)


@pytest.mark.parametrize("mode", METHODS)
def test_nobody_starves_and_nobody_is_held_up(llama: Pair, open_llm: OpenLLM, mode: Mode) -> None:
    """A plain request gets a token every other round at least; drafted ones work as often as without it."""

    def run(*params: SamplingParams) -> tuple[list[RequestOutput], Steady]:
        llm, pace = open_llm(llama, max_num_seqs=4), Steady(mode)
        return paced(llm, pace).generate(prompts((9, 5, 7, 8)[: len(params)]), params), pace

    drafting = replace(GREEDY, max_tokens=60)
    alone, _ = run(drafting)
    beside, pace = run(drafting, *[replace(GREEDY, draft=False, max_tokens=20)] * 3)
    assert beside[0].metrics.rounds == alone[0].metrics.rounds
    most = [output.metrics.rounds for output in beside[1:]]
    assert most == [20, 20, 20]  # a round in which it waited is none of its own
    waited = len(pace.loads)
    assert waited <= 2 * alone[0].metrics.rounds
    # The pace is asked for, and told of, those that are drafted for alone; but for the rows that the target computed.
    assert {load.batch for load in pace.loads} == {1}
    assert all(len(told.requests) <= 1 for told in pace.told)
    assert mode in ("speculative",) or any(told.target_rows > 3 for told in pace.told)


def test_a_batch_of_plain_requests_asks_no_pace(llama: Pair, open_llm: OpenLLM) -> None:
    rounds, pace = Rounds(), Steady("pearl")
    llm = paced(open_llm(llama, observer=rounds), pace)
    outputs = llm.generate(prompts((3, 40)), replace(GREEDY, draft=False))
    assert token_ids(outputs) == [llama.greedy(prompt, TOKENS) for prompt in prompts((3, 40))]
    assert all(not record.plan.draft.work for record in rounds)
    assert {record.plan.pace.mode for record in rounds if record.plan.pace is not None} == {"autoregressive"}
    assert not pace.told
    assert not [load for load in pace.loads if load.batch]
    # The draft's prefix cache was not even asked.
    assert llm.engine.scheduler.draft_kv is not None
    assert llm.engine.scheduler.draft_kv.stats.queried_tokens == 0


def test_a_drafted_output_after_a_plain_one_of_the_same_prompt(llama: Pair, open_llm: OpenLLM) -> None:
    """The target finds the prompt in its cache; the draft, which never saw it, computes it."""
    prompt, llm = prompts((50,)), open_llm(llama, window=3)
    for draft in (False, True, False, True):
        assert token_ids(llm.generate(prompt, replace(GREEDY, draft=draft))) == [llama.greedy(prompt[0], TOKENS)]


@pytest.mark.parametrize(
    ("options", "cycle"),
    [
        ({"method": "speculative"}, ["post-verify"] * 3 + ["plain"]),
        ({"post_verify": False}, ["pre-verify", "post-verify", "post-verify", "plain"]),
        ({}, ["post-verify"]),
    ],
    ids=("speculative", "no-post", "pearl"),
)
def test_how_the_tokens_of_a_perfect_draft_came(
    llama: Pair, open_llm: OpenLLM, options: dict[str, Any], cycle: list[str]
) -> None:
    llm = open_llm(llama, draft=llama.target, window=3, prepared_windows=0, **options)
    (output,) = llm.generate(prompts((9,)), GREEDY)
    first = [] if options else ["pre-verify"]
    assert output.outputs[0].sources == [*first, *cycle * TOKENS][:TOKENS]


def test_pace_auto(llama: Pair, open_llm: OpenLLM) -> None:
    batch, rounds = prompts((3, 11, 26, 7, 5)), Rounds()
    llm = open_llm(llama, observer=rounds)
    params = [replace(each, max_tokens=60) for each in mixed(GREEDY)]
    outputs = llm.generate(batch, params)
    assert token_ids(outputs) == [llama.greedy(prompt, 60) for prompt in batch]
    assert_nothing_was_drafted(outputs)
    modes = {record.plan.pace.mode for record in rounds if record.plan.pace is not None and record.plan.load}
    assert len(modes) > 1
    assert_at_rest(llm)
