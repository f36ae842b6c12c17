"""Drafters that are compared: what they propose, and that outputs stay the target's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bench.drafter_training.layers import TrainedLayers
from bench.evaluation.entrants import Entrants, share_of_target
from bench.evaluation.guesses import GuessPool
from bench.evaluation.lookahead import LookaheadDrafter
from bench.evaluation.phrases import PhraseDrafter
from bench.evaluation.setups import (
    PHRASE,
    Setup,
    Windows,
    at,
    drafting,
    other_drafts,
    others,
    plain,
    prompt_lookup,
)
from bench.roofline.generators import Contender, Generated, assistant
from pearl import LLM
from pearl.errors import ConfigurationError
from pearl.models import bundled_path

PROMPTS = [
    "def gcd(a, b):\n",
    "import os\n\n\nclass Path:\n    def",
    "x",
    "for i in range(10):\n    print(i)\nfor j in",
]
TOKENS = 24


@pytest.fixture(scope="module")
def first() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="bfloat16", prefix_caching=False, max_num_seqs=4, max_window=20) as llm:
        yield llm


def test_ngrams_are_what_was_guessed_at_rows_behind_each_other() -> None:
    pool = GuessPool()
    # 5 is committed, 6 to 9 were tested; behind 7 the target would go on with 20, which no tested token is.
    pool.observe(1, [5, 6, 7, 8, 9], [6, 7, 20, 21, 22], held=2)
    assert pool.phrase(1, 5, 9) == [6, 7, 20, 21]
    assert pool.phrase(1, 7, 2) == [20, 21]
    assert pool.phrase(1, 8, 9) == [21, 22]
    assert pool.phrase(1, 30, 9) == pool.phrase(2, 5, 9) == []
    assert pool.ahead(1) == [21, 22], "behind the correction, 20"
    pool.observe(1, [22, 5], [5, 6], held=1)
    pool.observe(1, [6], [50], held=0)
    assert pool.phrase(1, 5, 9)[:3] == [6, 7, 20], "a longer one that begins alike stays"
    assert pool.phrase(1, 22, 4) == [5, 6, 50], "n-gram after n-gram"
    assert pool.ahead(1) == []
    pool.observe(1, [5], [99], held=0)
    assert pool.phrase(1, 5, 9) == [99], "the latest one"
    pool.clear()
    assert pool.phrase(1, 22, 3) == []


def test_a_lookahead_window_is_full() -> None:
    pool = GuessPool()
    drafter = LookaheadDrafter.around(pool)(None)  # type: ignore[arg-type]
    assert isinstance(drafter, LookaheadDrafter)
    assert len(drafter._window(1, [1, 2, 3], 4)) == 4
    pool.observe(1, [3, 8], [9, 7], held=0)
    pool.observe(1, [4, 6, 6, 6], [5, 10, 11, 12], held=0)
    assert drafter._window(1, [1, 2, 3], 4)[:2] == [9, 7], "an n-gram of the pool"
    assert drafter._window(1, [1, 2, 3], 4)[2:3] == [12], "then the latest iteration's guess for that place"


def test_answers_of_all_setups_are_plain_decodings(first: LLM) -> None:
    """In bfloat16, as people run it, and in a batch; one at a time is what the suite's own tests do."""
    entrants = Entrants(first)
    ids = [first.encode(prompt) for prompt in PROMPTS]
    setups = [plain(), *prompt_lookup(), *drafting(Windows(3, 4), prepares=True)]
    answers: dict[str, Any] = {}
    for setup in setups:
        measured = entrants.answer(at(setup, len(ids)), ids, TOKENS)
        answers[setup.name] = measured.outputs
        if setup.guesses:
            assert measured.anatomy is not None
            positions = measured.anatomy.positions
            window = 3 + PHRASE if setup.guesses == "phrases" else 8
            assert sum(position[1] for position in positions) > 3, "its guesses come true"
            assert len(positions) <= window
            if setup.guesses == "phrases":
                assert len(positions) > 3, "phrases are tested behind what was drafted"
    entrants.close()
    for name, outputs in answers.items():
        assert outputs == answers["autoregressive"], name


def test_the_draft_computes_phrases_too() -> None:
    """A draft that is the target is always right, if its KV is whole: only a phrase can be rejected."""
    target = str(bundled_path("target"))
    options = {"method": "speculative", "window": 3 + PHRASE, "prepared_windows": 0}
    with LLM(
        target=target, draft=target, device="cpu", dtype="float32", prefix_caching=False, max_num_seqs=1
    ) as llm:  # fmt: skip
        entrants = Entrants(llm)
        setup = Setup("phrases", options, guesses="phrases")
        measured = [entrants.answer(setup, [llm.encode(prompt)], TOKENS) for prompt in PROMPTS]
        entrants.close()
    assert all(m.anatomy is not None for m in measured)
    positions = [m.anatomy.positions for m in measured if m.anatomy]
    assert sum(p[3][1] for p in positions if len(p) > 3) > 1, "phrases held"
    assert all(counts[0][0] == counts[0][1] for counts in positions), "whatever stands before it"


def test_short_windows_keep_a_token_of_the_draft() -> None:
    drafter = PhraseDrafter(None, GuessPool(), 4)  # type: ignore[arg-type]
    assert [drafter._own(count) for count in (0, 1, 3, 5, 9)] == [0, 1, 1, 1, 5]


def test_the_second_baseline_has_what_pearl_leaves(monkeypatch: pytest.MonkeyPatch, first: LLM) -> None:
    for cores, expected in ((2, 1), (8, 6)):
        monkeypatch.setattr("pearl.config.cpu_cores", lambda cores=cores: cores)
        monkeypatch.setattr("bench.evaluation.entrants.cpu_cores", lambda cores=cores: cores)
        assert share_of_target(first) == {"method": "autoregressive", "target_threads": expected}
    monkeypatch.setattr("pearl.config.cpu_cores", lambda: 1)
    monkeypatch.setattr("bench.evaluation.entrants.cpu_cores", lambda: 1)
    assert "as many cores" in str(share_of_target(first))


def test_another_draft_has_an_engine_of_its_own(first: LLM, tmp_path: Path) -> None:
    judge = AutoModelForCausalLM.from_pretrained(bundled_path("target"))
    TrainedLayers(judge, 1, range(0, 4096, 2)).save(tmp_path / "small")
    assert assistant(str(tmp_path / "small")) is None, "transformers would find no embeddings"
    assert assistant(str(bundled_path("draft"))) is not None
    entrants, ids = Entrants(first), [first.encode(PROMPTS[0])]
    expected = entrants.answer(plain(), ids, TOKENS).outputs
    setups = other_drafts([str(bundled_path("draft"))])
    assert [setup.name for setup in setups] == ["draft speculative", "draft pearl"]
    for setup in setups:
        measured = entrants.answer(setup, ids, TOKENS)
        assert measured.outputs == expected
        assert any(record.proposal.steps for record in measured.rounds)
    entrants.close()


def test_llama_cpp_where_it_is_installed(first: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (setup,) = [one for one in others() if one.engine == "llama.cpp"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(ConfigurationError, match="unset it"):
        Entrants(first).answer(setup, [[5, 6]], 3)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)  # type: ignore[arg-type]  # makes its import fail
    with pytest.raises(ConfigurationError, match="not installed"):
        Entrants(first).answer(setup, [[5, 6]], 3)
    told: list[int] = []

    def contenders(stack: object, llm: LLM, target: str, threads: list[int]) -> list[Contender]:
        told.extend(threads)
        fake = lambda prompts, count: Generated([[7] * count for _ in prompts])  # noqa: E731
        return [Contender("llama.cpp", "generate", threads[0], fake, "bfloat16")]

    monkeypatch.setattr("bench.evaluation.entrants.llama_cpp_contenders", contenders)
    measured = Entrants(first).answer(setup, [[5, 6]], 3)
    assert measured.outputs == [[7, 7, 7]]
    assert measured.seconds > 0
    assert len(told) == 1
