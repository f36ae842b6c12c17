"""Synthetic acceptance: the asked rate, the same run whatever the batch, and every cost of a real verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from pearl import LLM, SamplingParams
from pearl.bench.options import check_rate, rate_label
from pearl.bench.scripted_verdicts import ScriptedVerifier, scripted
from pearl.bench.shapes import load_shapes, random_prompts
from pearl.choices import MethodName
from pearl.config import EngineConfig
from pearl.engine.judge import Judge
from pearl.engine.model_loading import LoadedModels
from pearl.errors import ConfigurationError
from pearl.messages import (
    Decision,
    Drafted,
    DraftPlan,
    DraftProposal,
    ForwardWork,
    SchedulerOutput,
    SequenceState,
    TargetOutput,
    TargetPlan,
    VerifyResult,
    VerifyWork,
)
from pearl.outputs import RequestOutput

RATE, BATCH, TOKENS, VOCABULARY = 0.8, 8, 400, 512
CONFIG = EngineConfig(
    device="cpu", max_model_len=TOKENS + 32, max_num_seqs=BATCH, draft_threads=1, target_threads=1,
    prefix_caching=False, window=4,
)  # fmt: skip
PROMPTS = random_prompts([12] * BATCH, VOCABULARY)  # so that equal tokens of two outputs have equal positions


@dataclass
class Spy:
    """A verifier around the real one, inside the script."""

    verifier: Judge
    results: list[VerifyResult] = field(default_factory=list)

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        assert target.logits is not None or not plan.verify
        self.results.append(self.verifier.verify(plan, proposal, target))
        return self.results[-1]


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return load_shapes(CONFIG, "tiny-target", "tiny-draft")


@pytest.fixture(scope="module")
def llm(models: LoadedModels) -> Iterator[LLM]:
    with LLM.from_models(models, CONFIG, wrap_verifier=scripted(RATE, models.vocab_size)) as llm:
        yield llm


def run(llm: LLM, requests: range = range(BATCH), tokens: int = TOKENS, **changes: object) -> list[RequestOutput]:
    """One request for each number, which is its prompt's and its seed."""
    with llm.variant(**changes) as variant:
        params = [SamplingParams(max_tokens=tokens, seed=number) for number in requests]
        return variant.generate([PROMPTS[number] for number in requests], params)


@pytest.mark.parametrize("method", ["pearl", "speculative"])
def test_tokens_hold_at_the_asked_rate(llm: LLM, method: MethodName) -> None:
    metrics = [output.outputs[0].metrics for output in run(llm, method=method)]
    tested, accepted, runs = (sum(getattr(m, name) for m in metrics) for name in ("tested", "accepted", "runs"))
    assert tested > 2000
    assert abs(accepted / tested - RATE) < 4 * math.sqrt(RATE * (1 - RATE) / tested)
    assert all(0.6 < m.acceptance_rate < 0.95 for m in metrics)
    # PEARL's runs end with a rejection alone; the other's also with their window of 4.
    mean = RATE / (1 - RATE) if method == "pearl" else sum(RATE**i for i in range(1, 5))
    assert accepted / runs == pytest.approx(mean, rel=0.12)


def test_certain_acceptance_never_rejects(llm: LLM, models: LoadedModels) -> None:
    with LLM.from_models(models, CONFIG, wrap_verifier=scripted(1, models.vocab_size)) as certain:
        metrics = [output.outputs[0].metrics for output in run(certain)]
    assert all(m.accepted == m.tested == TOKENS for m in metrics)


def test_a_run_is_the_same_twice_and_whatever_the_batch_and_the_window(llm: LLM) -> None:
    """Which tokens hold is a matter of seed and position alone: PEARL tests every position."""
    together, again = run(llm, tokens=100), run(llm, tokens=100)
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in again]
    for number in (0, 5):
        for window in (4, 7):
            (alone,) = run(llm, range(number, number + 1), tokens=100, window=window)
            assert alone.outputs[0].drafted == together[number].outputs[0].drafted


def test_requests_of_different_seeds_have_different_luck(llm: LLM) -> None:
    held = [output.outputs[0].drafted for output in run(llm, range(4))]
    agreements = [sum(map(bool.__eq__, held[0], other)) / TOKENS for other in held[1:]]
    independent = RATE**2 + (1 - RATE) ** 2
    assert all(abs(agreement - independent) < 0.1 for agreement in agreements)


def test_methods_meet_the_same_luck(llm: LLM) -> None:
    """A token that speculative decoding tests holds exactly if PEARL's holds there; its bonus tokens are not tested."""
    pearl, turns = run(llm, range(2), 200), run(llm, range(2), 200, method="speculative")
    for one, other in zip(pearl, turns, strict=True):
        luck, drafted = one.outputs[0].drafted, other.outputs[0].drafted
        assert all(held for held, accepted in zip(luck, drafted, strict=True) if accepted)
        rejected = [i for i, held in enumerate(luck) if not held]
        assert not any(drafted[i] for i in rejected)


def test_every_real_verdict_is_still_made(models: LoadedModels) -> None:
    spies: list[Spy] = []

    def wrap(verifier: Judge) -> Judge:
        spies.append(Spy(verifier))
        return ScriptedVerifier(spies[-1], RATE, models.vocab_size)

    with LLM.from_models(models, CONFIG, wrap_verifier=wrap) as llm:
        rounds: list[VerifyResult] = []
        llm.engine.observer = lambda record: rounds.append(record.result)
        llm.generate(PROMPTS[:2], [SamplingParams(max_tokens=40, seed=i) for i in range(2)])
        (spy,) = spies
        assert len(rounds) == len(spy.results) > 0
        for real, shown in zip(spy.results, rounds, strict=True):
            assert shown.windows == real.windows
            assert {i: d.tested for i, d in shown.decisions.items()} == {i: d.tested for i, d in real.decisions.items()}
        real_rate, shown_rate = (
            sum(d.accepted for r in results for d in r.decisions.values()) for results in (spy.results, rounds)
        )
        assert real_rate < 10 < shown_rate
        llm.variant().close()
        assert len(spies) == 2, "a variant keeps the script"


def test_autoregressive_decoding_has_nothing_to_script(llm: LLM, models: LoadedModels) -> None:
    scripted_output = run(llm, range(2), 50, method="autoregressive")
    with LLM.from_models(models, CONFIG) as honest:
        assert [o.outputs[0].token_ids for o in run(honest, range(2), 50, method="autoregressive")] == [
            o.outputs[0].token_ids for o in scripted_output
        ]


@dataclass(frozen=True)
class Fixed:
    """A verifier that always says the same."""

    result: VerifyResult

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        return self.result


def decide(real: Decision, rate: float, rows: int, position: int = 10, seed: int = 3) -> Decision:
    """What becomes of a verdict about one request whose forward had ``rows`` rows."""
    state = SequenceState(1, 0, SamplingParams(), seed, 1, None)
    forward = ForwardWork(state, tuple(range(rows)), position - 1, rows, (0,))
    pending = tuple(Drafted(token, 0.0, -1) for token in real.tested)
    plan = SchedulerOutput(TargetPlan((forward,)), DraftPlan(()), (VerifyWork(1, pending, position),))
    windows = {1: (Drafted(5, 0.0, -1),)}
    verifier = ScriptedVerifier(Fixed(VerifyResult({1: real}, windows)), rate, VOCABULARY)
    result = verifier.verify(plan, DraftProposal(), TargetOutput(None))
    assert result.windows == windows
    return result.decisions[1]


NEVER = 1e-9


@pytest.mark.parametrize(
    ("real", "rate", "rows", "wanted"),
    [
        # All hold: the bonus row's token follows where there is a bonus row.
        (Decision((1, 2), 0, 9, None), 1.0, 3, Decision((1, 2), 2, 9, None)),
        (Decision((1, 2), 1, 9, None), 1.0, 2, Decision((1, 2), 2, None, None)),
        (Decision((1, 2), 2, None, None), 1.0, 2, Decision((1, 2), 2, None, None)),
        (Decision((1, 2), 2, 7, None), 1.0, 3, Decision((1, 2), 2, 7, None)),
        # None holds: the real correction, or where there was none another token.
        (Decision((1, 2), 1, 9, None), NEVER, 2, Decision((1, 2), 0, 9, None)),
        (Decision((1, 2), 2, None, None), NEVER, 2, Decision((1, 2), 0, 2, None)),
        (Decision((VOCABULARY - 1,), 1, None, None), NEVER, 1, Decision((VOCABULARY - 1,), 0, 0, None)),
        (Decision((), 0, 4, None), NEVER, 1, Decision((), 0, 4, None)),
    ],
)
def test_a_verdict_keeps_its_form(real: Decision, rate: float, rows: int, wanted: Decision) -> None:
    assert decide(real, rate, rows) == wanted


def test_a_verdict_that_needs_no_change_is_the_real_one() -> None:
    real = Decision((1, 2), 2, 7, ())
    assert decide(real, 1.0, 3) is real
    assert decide(real._replace(accepted=0), 1.0, 3).logprobs is None


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**64 - 1])
def test_any_seed_and_far_positions_have_draws(seed: int) -> None:
    held = [decide(Decision((1,), 0, 9, None), 0.5, 1, position, seed).accepted for position in range(500, 540)]
    assert 5 < sum(held) < 35


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_rate_must_be_one(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="--synthetic-acceptance must be above 0 and at most 1, not"):
        check_rate(rate)
    with pytest.raises(ConfigurationError, match="synthetic-acceptance"):
        scripted(rate, VOCABULARY)


def test_the_label_says_what_is_scripted() -> None:
    assert rate_label(0.8) == "synthetic acceptance 0.80: real forwards, scripted verdicts"
