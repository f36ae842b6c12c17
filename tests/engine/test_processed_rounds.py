"""Whole rounds of bf16 models whose logits are changed: penalties count in fp32, and nobody else notices."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engine_toy import VOCAB, Toy
from transformers import RepetitionPenaltyLogitsProcessor

from pearl.engine.rounds import RoundRecord
from pearl.sampling_batch import sampling_arrays
from pearl.sampling_params import SamplingParams
from pearl_kernels import SamplingTensors, select
from pearl_kernels.reference.sampling import log_probabilities

BF16 = torch.bfloat16
PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [1, 2, 9])
SMALL: list[dict[str, Any]] = [
    {"presence_penalty": 0.05},
    {"frequency_penalty": 0.03},
    {"repetition_penalty": 1.002},
    {"logit_bias": {token: 0.04 * (token % 3) for token in range(VOCAB)}},
]


def greedy(prompt: list[int], params: SamplingParams) -> list[int]:
    """With transformers' processor and the other formulas, on fp32 copies of the target's bf16 rows."""
    target, tokens = Toy(dtype=BF16).target, list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        row = target.logits(tokens)[:VOCAB].float()
        if params.repetition_penalty != 1:
            row = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([tokens]), row[None])[0]
        for token, count in Counter(tokens[len(prompt) :]).items():
            row[token] -= params.presence_penalty + params.frequency_penalty * count
        for token, bias in (params.logit_bias or {}).items():
            row[token] += bias
        tokens.append(int(row.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("method", ["autoregressive", "pearl"])
@pytest.mark.parametrize("small", SMALL, ids=lambda small: next(iter(small)))
def test_small_changes_of_bf16_logits_are_not_lost(method: str, small: dict[str, Any]) -> None:
    plain, params = SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, **small)
    expected = [greedy(prompt, params) for prompt in PROMPTS]
    assert expected != [greedy(prompt, plain) for prompt in PROMPTS]
    assert Toy(method, dtype=BF16, kernels=select()).run(PROMPTS, [params] * 4)[0] == expected


@pytest.mark.parametrize("method", ["autoregressive", "pearl", "speculative"])
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_a_request_that_changes_logits_changes_no_others_tokens(method: str, rule: Any) -> None:
    plain = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.95, min_p=0.02)
    changing = SamplingParams(max_tokens=20, temperature=0.9, presence_penalty=0.05)
    alone = Toy(method, rule, dtype=BF16, kernels=select()).run(PROMPTS, [plain] * 4)[0]
    mixed = Toy(method, rule, dtype=BF16, kernels=select()).run(PROMPTS, [plain, changing, plain, changing])[0]
    assert [mixed[0], mixed[2]] == [alone[0], alone[2]]
    assert [mixed[1], mixed[3]] != [alone[1], alone[3]]


def test_the_q_that_is_kept_is_the_q_that_was_drawn_from() -> None:
    """Else the rejection rule's outputs would follow another distribution than the target's."""
    every = [
        SamplingParams(max_tokens=20, temperature=0.9, presence_penalty=0.05, logit_bias={3: 0.03}),
        SamplingParams(max_tokens=20, temperature=0.9, draft_temperature=1.2, repetition_penalty=1.01),
        SamplingParams(max_tokens=20, temperature=0.9),
    ]
    toy, seen = Toy("pearl", dtype=BF16), 0

    def check(record: RoundRecord) -> None:
        nonlocal seen
        states = {work.forward.state.request_id: work.forward.state for work in record.plan.draft.work}
        for request_id, window in record.proposal.windows.items():
            arrays = sampling_arrays([states[request_id]], for_draft=True)
            params = SamplingTensors(**{name: torch.from_numpy(a) for name, a in arrays.items()})
            for token, logprob, row, _ in window:
                assert record.proposal.logits is not None
                kept = log_probabilities(record.proposal.logits[row][None], params, VOCAB)[0, token]
                assert logprob == pytest.approx(kept.item(), abs=1e-5)
                seen += 1

    toy.engine.observer = check
    toy.run(PROMPTS[:3], every)
    assert seen > 60
