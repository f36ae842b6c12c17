"""int8 weights: the target is another model, whose own output every method returns; the draft's change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e_support import Pair, acceptance, greedy_reference, prompts, token_ids
from torch import nn
from transformers import PreTrainedModel

from pearl import LLM, SamplingParams

OpenLLM = Callable[..., LLM]
LENGTHS, TOKENS = (1, 3, 16, 40), 16
SETTINGS: dict[str, dict[str, Any]] = {
    "autoregressive": {"method": "autoregressive"},
    "speculative-3": {"method": "speculative", "window": 3},
    "pearl-3": {"window": 3},
    "pearl-threads": {"window": 3, "target_threads": 2, "draft_threads": 2},
}


def rounded(judge: PreTrainedModel) -> PreTrainedModel:
    """A copy whose matrices are the nearest that have 255 levels in each row; the embedding, if tied, stays."""
    model = copy.deepcopy(judge)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            module.weight = nn.Parameter((module.weight.detach() / scale).round() * scale)
    return model


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_int8_target_s_own_output(pairs: dict[str, Pair], open_llm: OpenLLM, family: str, setting: str) -> None:
    pair, batch = pairs[family], prompts(LENGTHS)
    judge = rounded(pair.judge)
    references = [greedy_reference(judge, prompt, TOKENS) for prompt in batch]
    llm = open_llm(pair, **SETTINGS[setting], target_weights="int8")
    outputs = token_ids(llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
    sure = [min(reference.decisive, TOKENS) for reference in references]
    assert sum(sure) > len(batch) * TOKENS // 2
    for tokens, reference, count in zip(outputs, references, sure, strict=True):
        assert tokens[:count] == reference.tokens[:count]


def test_an_int8_draft_leaves_the_output_as_it_is(llama: Pair, open_llm: OpenLLM) -> None:
    batch, params = prompts(LENGTHS), SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    llm = open_llm(llama, window=3, draft_weights="int8")
    outputs = llm.generate(batch, params)
    assert token_ids(outputs) == [llama.greedy(prompt, TOKENS) for prompt in batch]
    assert 0.2 < acceptance(outputs) < 0.98
    assert llm.models.draft is not None
    assert llm.models.draft.model.weights.head.data.dtype == torch.int8
    assert llm.models.target.model.weights.head.data.dtype == torch.float32
