"""Rounds played on traced texts are the engine's own; what they are predicted to take; the command."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bench_support import Finished

from bench.simulation.program import traced
from bench.simulation.ranks import TracedText
from bench.simulation.rounds import PlayedRound, play
from bench.simulation.times import Curve, ForwardTimes
from pearl import LLM, SamplingParams
from pearl.engine.odds import Odds
from pearl.engine.rounds import RoundRecord, hits
from pearl.messages import Drafted, Ranked

SCRIPT = "prepared_gain.py"
TOKENS = 40


def text_of(ranks: str) -> TracedText:
    """Of each token its rank in what the draft says: 0 is drafted itself; "-" is not among the best."""
    tokens, drafted = [], []
    for at, rank in enumerate(ranks):
        best = [10 * at + place for place in range(4)]
        tokens.append(99_000 + at if rank == "-" else best[int(rank)])
        drafted.append(Drafted(best[0], 0.0, -1, Ranked(-0.5, tuple(best[1:]), (-1.5, -2.5, -3.5))))
    return TracedText(tuple(tokens), tuple(drafted))


def short(rounds: list[PlayedRound]) -> list[tuple[int, int, int, bool]]:
    return [(r.rows, r.steps, r.tokens, r.hit) for r in rounds]


def test_rounds_by_hand() -> None:
    text, odds = text_of("0001000-"), Odds("rejection")
    assert short([*play("speculative", 3, 0, text, odds)]) == [
        (0, 3, 0, False), (4, 0, 4, False), (0, 3, 0, False), (4, 0, 4, False)
    ]  # fmt: skip
    assert short([*play("pearl", 3, 0, text, odds)]) == [
        (1, 3, 1, False), (3, 3, 3, False), (1, 3, 1, False), (3, 1, 3, False)
    ]  # fmt: skip
    # The correction at the fourth token is the best alternative: the window behind it is prepared.
    assert short([*play("pearl", 3, 12, text, odds)]) == [
        (1, 3, 1, False), (3, 3, 3, True), (3, 2, 3, False), (1, 0, 1, False)
    ]  # fmt: skip
    assert [*play("autoregressive", 1, 0, text, odds)] == [PlayedRound(1, 0, 0, 1)] * 8


@pytest.mark.parametrize("branches", [0, 6])
def test_played_rounds_are_the_engines(branches: int) -> None:
    """Of the bundled pair: what each round commits and finds prepared, on real texts."""
    prompts = ["def mean(values):\n", "import os\n\n\nclass Path:\n"]
    with LLM(device="cpu", dtype="float32", prefix_caching=False, max_num_seqs=1) as llm:
        texts = traced(llm, prompts, TOKENS)
        rounds: list[RoundRecord] = []
        with llm.variant(window=4, prepared_windows=branches, observer=rounds.append) as pearl:
            outputs = pearl.generate(prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == [text.tokens for text in texts]
    odds = Odds("rejection")
    played = [one for text in texts for one in play("pearl", 4, branches, text, odds)]
    real = [
        (len(decision.tested), len(decision.committed), bool(hits(record)))
        for record in rounds
        for decision in record.result.decisions.values()
    ]
    if not branches:
        assert [(r.rows, r.tokens, r.hit) for r in played] == real
    found, expected = sum(r.hit for r in played), sum(hit for *_, hit in real)
    assert abs(found - expected) <= 1  # which are chosen behind a token that fails is the one thing that is not traced
    assert (expected > 3) == bool(branches)
    assert sum(r.tokens for r in played) == sum(committed for _, committed, _ in real) == 2 * TOKENS


def test_a_round_takes_as_long_as_its_longer_forward() -> None:
    alone, beside = Curve((1.0, 5.0), (2.0, 4.0)), Curve((1.0, 5.0), (3.0, 6.0))
    times = ForwardTimes(
        {False: alone, True: beside}, {False: Curve((1.0,), (0.5,)), True: Curve((1.0, 3.0), (1.0, 2.0))}
    )
    assert times.seconds(PlayedRound(3, 0, 0, 1), 0.25) == 3.25
    assert times.seconds(PlayedRound(0, 4, 1, 0), 0.25) == 2.25
    assert times.seconds(PlayedRound(3, 4, 1, 1), 0.25) == 4.5 + 0.25
    assert times.seconds(PlayedRound(3, 4, 3, 1), 0.25) == 8.25
    assert times.seconds(PlayedRound(9, 1, 1, 1), 0.0) == 9.0  # as steep as between the first and the last
    assert times.apart().seconds(PlayedRound(3, 4, 3, 1), 0.0) == 4.0  # a row adds as much in proportion
    assert times.apart(free_rows=True).seconds(PlayedRound(1, 3, 3, 1), 0.0) == 2.0
    points = {1: [1.0, 3.0] * 8, 2: [9.0], 4: [5.0] * 12}
    assert Curve.through(points) == Curve((1.0, 4.0), (2.0, 5.0))  # a single round tells little


def test_the_command(script: Callable[..., Finished]) -> None:
    methods = "autoregressive,speculative@2,pearl@3+2"
    done = script("--prompts", "2", "--max-tokens", "12", "--repeats", "1", "--methods", methods)
    assert done.code == 0, done.err
    lines = [line.split("|") for line in done.out.splitlines() if line.startswith("| ")]
    assert [line[1].strip() for line in lines] == ["", *methods.split(",")]
    assert all(float(line[2]) > 0 and float(line[3]) > 0 for line in lines[1:])
    refused = script("--methods", "pearl")
    assert refused.code == 2
    assert "has no fixed window" in " ".join(refused.err.split())
