"""Temperature 0 over the families whose features Llama lacks: every method returns what transformers generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_support import (
    ALL_SETTINGS,
    SHAPE,
    Pair,
    acceptance,
    assert_at_rest,
    byte_tokenizer,
    perturbed,
    prompts,
    random_model,
    save,
    token_ids,
)
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from pearl import LLM, SamplingParams
from pearl.errors import ConfigurationError

LENGTHS, TOKENS = (1, 17, 40, 70), 20
SETTINGS = ("autoregressive", "speculative-3", "pearl-3", "prepared-2", "pearl-neither-4")
_PARTIAL = {"rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.5, 2.5, 4.0], "long_factor": [9.0] * 6}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
         "truncate": False, "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "gemma2": Gemma2Config(
        **{**SHAPE, "tie_word_embeddings": True}, query_pre_attn_scalar=24, attn_logit_softcapping=20.0,
        final_logit_softcapping=30.0, sliding_window=24,
    ),
    "gemma3": Gemma3TextConfig(
        **{**SHAPE, "tie_word_embeddings": True}, query_pre_attn_scalar=24, sliding_window=24,
        sliding_window_pattern=2, rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_local_base_freq=500.0,
    ),
    "granite": GraniteConfig(
        **SHAPE, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1, logits_scaling=4.0
    ),
    "gpt-oss": GptOssConfig(
        **SHAPE, num_local_experts=6, num_experts_per_tok=3, sliding_window=24, swiglu_limit=1.5,
        rope_parameters=_YARN,
    ),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": Qwen2MoeConfig(
        **SHAPE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **SHAPE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48, norm_topk_prob=True
    ),
    "olmo2": Olmo2Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"}),
    "phi3": Phi3Config(
        **{name: value for name, value in SHAPE.items() if name != "head_dim"}, sliding_window=60,
        original_max_position_embeddings=256, rope_parameters=_PARTIAL,
    ),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layer_interval=2),
}  # fmt: skip


def pair_of(family: str, root: Path) -> Pair:
    """transformers adds 1 to Gemma's norms."""
    judge = random_model(FAMILIES[family], seed=0)
    for name, weight in judge.named_parameters():
        if family.startswith("gemma") and "norm" in name:
            weight.data -= 1.0
    tokenizer = byte_tokenizer()
    target, draft = save(judge, tokenizer, root / "target"), save(perturbed(judge, 0.03), tokenizer, root / "draft")
    return Pair(family, target, draft, judge, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_equal_transformers(family: str, open_llm: Callable[..., LLM], tmp_path: Path) -> None:
    pair, batch = pair_of(family, tmp_path), prompts(LENGTHS)
    expected = [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert len(set(map(tuple, expected))) == len(expected)  # prompts matter
    for setting in SETTINGS:
        # Fewer places than prompts and a small token budget: late joiners, and chunks that are longer than windows.
        llm = open_llm(pair, **ALL_SETTINGS[setting], max_num_seqs=3, max_num_batched_tokens=32)
        outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
        assert token_ids(outputs) == expected, setting
        if setting != "autoregressive":
            assert 0.1 < acceptance(outputs) < 0.99, setting
        assert_at_rest(llm)


def test_longrope_is_run_up_to_its_original_length_and_refused_beyond(
    open_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    pair = pair_of("phi3", tmp_path)
    assert open_llm(pair, method="autoregressive").models.max_model_len == 256
    with pytest.raises(ConfigurationError, match=r"max_model_len=257 is above the 256 positions .*longrope"):
        open_llm(pair, method="autoregressive", max_model_len=257)
