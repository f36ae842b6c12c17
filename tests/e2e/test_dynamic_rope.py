"""Dynamic NTK scaling: transformers' tokens up to the original length, and a sentence beyond it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from e2e_support import FAMILIES, Pair, byte_tokenizer, perturbed, prompts, random_model, save, token_ids
from transformers import LlamaConfig

from pearl import LLM, SamplingParams
from pearl.engine import model_loading
from pearl.errors import ConfigurationError

OpenLLM = Callable[..., LLM]
LENGTH = 48


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root, tokenizer = tmp_path_factory.mktemp("dynamic"), byte_tokenizer()
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    shape = {**FAMILIES["llama"].to_dict(), "max_position_embeddings": LENGTH, "rope_parameters": rope}
    judge = random_model(LlamaConfig(**shape), seed=0)
    draft = save(perturbed(judge, 0.03), tokenizer, root / "draft")
    return Pair("dynamic", save(judge, tokenizer, root / "target"), draft, judge, tokenizer)


@pytest.mark.parametrize("options", [{}, {"max_model_len": LENGTH}, {"max_model_len": 40}], ids=repr)
def test_the_tokens_are_transformers(dynamic: Pair, open_llm: OpenLLM, options: dict[str, Any]) -> None:
    llm = open_llm(dynamic, window=3, **options)
    longest = options.get("max_model_len", LENGTH)
    texts = prompts([5, 20], seed=7)
    outputs = llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True))
    assert token_ids(outputs) == [dynamic.greedy(text, longest - len(text)) for text in texts]


@pytest.mark.parametrize("role", ["target", "draft"])
def test_more_is_refused_before_weights_are_read(
    dynamic: Pair, llama: Pair, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr(model_loading, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    both = {"target": llama.target, "draft": llama.draft, role: getattr(dynamic, role)}
    with pytest.raises(ConfigurationError, match=rf"max_model_len=49 .* give max_model_len={LENGTH} or less"):
        LLM(**both, device="cpu", max_model_len=LENGTH + 1)
