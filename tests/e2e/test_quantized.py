"""Quantised checkpoints: what every method returns is what transformers makes of the numbers that are meant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_support import Pair, acceptance, greedy_reference, prompts, token_ids
from quantized_checkpoints import quantize

from pearl import LLM, SamplingParams
from pearl.errors import ConfigurationError

OpenLLM = Callable[..., LLM]
LENGTHS, TOKENS = (1, 3, 16, 40), 12
METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {"method": "autoregressive"},
    "speculative": {"method": "speculative", "window": 3},
    "pearl": {"window": 3},
    "pearl-threads": {"window": 3, "target_threads": 2, "prepared_windows": 3},
}
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def quantized(llama: Pair, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The llama pair with a target in a format; its judge has the numbers that are meant."""
    built: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            meant = quantize(Path(llama.target), folder, name)
            judge = copy.deepcopy(llama.judge)
            judge.load_state_dict(meant)
            built[name] = replace(llama, target=str(folder), judge=judge, _known={})
        return built[name]

    return make


def check(pair: Pair, llm: LLM) -> float:
    """Acceptance, if the output is the judge's."""
    batch = prompts(LENGTHS)
    references = [greedy_reference(pair.judge, prompt, TOKENS) for prompt in batch]
    outputs = llm.generate(batch, PARAMS)
    sure = [min(reference.decisive, TOKENS) for reference in references]
    assert sum(sure) > len(batch) * TOKENS // 2
    for tokens, reference, count in zip(token_ids(outputs), references, sure, strict=True):
        assert tokens[:count] == reference.tokens[:count]
    return acceptance(outputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ct-w4a16-zeros-32", "awq-32", "gptq-8-64", "fp8-blocks"])
def test_the_quantised_target_s_own_output(
    quantized: Callable[[str], Pair], open_llm: OpenLLM, name: str, method: str
) -> None:
    pair = quantized(name)
    llm = open_llm(pair, **METHODS[method])
    accepted = check(pair, llm)
    assert method == "autoregressive" or 0.1 < accepted < 0.98
    target = llm.models.target
    assert target.fused is not None
    kept = {"fp8-blocks": None, "gptq-8-64": torch.int8}.get(name, torch.uint8)
    down = target.model.weights.layers[0].down
    assert (down.data.dtype if down.group else None) == kept


@pytest.mark.parametrize("name", ["gptq-4-128", "modelopt", "gptq-act-order", "ct-int8"])
def test_under_pearl(quantized: Callable[[str], Pair], open_llm: OpenLLM, name: str) -> None:
    pair = quantized(name)
    check(pair, open_llm(pair, window=4))


@pytest.mark.parametrize("name", ["awq-128", "ct-fp8-channel"])
def test_a_quantised_draft_leaves_a_plain_target_s_output_as_it_is(
    quantized: Callable[[str], Pair], llama: Pair, open_llm: OpenLLM, name: str
) -> None:
    pair = replace(llama, draft=quantized(name).target)
    llm = open_llm(pair, window=3)
    outputs = llm.generate(prompts(LENGTHS), PARAMS)
    assert token_ids(outputs) == [llama.greedy(prompt, TOKENS) for prompt in prompts(LENGTHS)]
    assert 0.2 < acceptance(outputs) <= 1


@pytest.mark.parametrize("role", ["target", "draft"])
def test_what_is_quantised_is_not_rounded_again(
    quantized: Callable[[str], Pair], llama: Pair, open_llm: OpenLLM, role: str
) -> None:
    pair = replace(llama, **{role: quantized("awq-32").target})
    with pytest.raises(ConfigurationError, match=rf"{role}_weights='int8' .* quantised already, with awq \(4 bits\)"):
        open_llm(pair, **{f"{role}_weights": "int8"})
