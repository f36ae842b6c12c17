"""Models in GGUF files: greedy tokens of every method are transformers', in fp32, of the numbers that are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="writes files with the package gguf")

from e2e_support import EOS, VOCAB, Pair, acceptance, byte_tokenizer, perturbed, prompts, random_model, save, token_ids
from gguf_files import byte_level_fields, gguf_of
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from pearl import LLM, SamplingParams

OpenLLM = Callable[..., LLM]
LENGTHS = (1, 3, 17, 40)
TOKENS = 20
METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {"method": "autoregressive"},
    "speculative": {"method": "speculative", "window": 3},
    "pearl": {"window": 3},
}

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "tie_word_embeddings": False,
}
_BLOCKS_OF_256 = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32,
}  # fmt: skip


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **parameters}}


MODELS: dict[str, tuple[Any, str]] = {
    "llama F32": (LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True), "F32"),
    "llama tied F16": (LlamaConfig(**{**_SHAPE, "tie_word_embeddings": True}), "F16"),
    "llama linear BF16": (LlamaConfig(**{**_SHAPE, "head_dim": 24}, **rope("linear", factor=2.0)), "BF16"),
    "llama yarn Q8_0": (LlamaConfig(**_SHAPE, **rope("yarn", factor=4.0, original_max_position_embeddings=64)), "Q8_0"),
    "llama Q4_K": (LlamaConfig(**{**_SHAPE, **_BLOCKS_OF_256, "num_key_value_heads": 1}), "Q4_K"),
    "mistral window Q4_0": (MistralConfig(**{**_SHAPE, "vocab_size": VOCAB + 20}, sliding_window=24), "Q4_0"),
    "qwen2 Q4_1": (Qwen2Config(**{**_SHAPE, "tie_word_embeddings": True}), "Q4_1"),
    "gemma3 Q4_1": (
        Gemma3TextConfig(
            **{**_SHAPE, "num_hidden_layers": 6, "tie_word_embeddings": True},
            sliding_window=24,
            query_pre_attn_scalar=16,
        ),
        "Q4_1",
    ),
    "qwen3 Q6_K": (Qwen3Config(**{**_SHAPE, **_BLOCKS_OF_256, "vocab_size": VOCAB + 12}), "Q6_K"),
    "qwen3 Q5_K": (Qwen3Config(**{**_SHAPE, **_BLOCKS_OF_256, "tie_word_embeddings": True}), "Q5_K"),
}


@dataclass(frozen=True)
class Files:
    """A pair in GGUF files, and the same numbers in folders."""

    pair: Pair
    folder: str
    draft_folder: str


def make(name: str, root: Path) -> Files:
    config, kind = MODELS[name]
    tokenizer = byte_tokenizer()
    vocabulary = byte_level_fields(tokenizer, config.vocab_size)
    model = random_model(config, seed=0)
    file, judge = gguf_of(model, kind, vocabulary)
    draft_file, draft = gguf_of(perturbed(model, 0.03), "F32", vocabulary)
    if kind.endswith("_K"):  # random blocks: a draft that agrees is made of what they decode to
        draft_file, draft = gguf_of(perturbed(judge, 0.03), "F32", vocabulary)
    pair = Pair(name, file.write(root / "target.gguf"), draft_file.write(root / "draft.gguf"), judge, tokenizer)
    return Files(pair, save(judge, tokenizer, root / "target"), save(draft, tokenizer, root / "draft"))


@pytest.fixture(scope="module", params=MODELS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make(request.param, tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_are_those_of_the_stored_numbers(files: Files, open_llm: OpenLLM, method: str) -> None:
    batch = prompts(LENGTHS)
    llm = open_llm(files.pair, **METHODS[method], max_num_seqs=3, max_num_batched_tokens=32)
    outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [files.pair.greedy(prompt, TOKENS) for prompt in batch]
    if method != "autoregressive":
        assert 0.2 < acceptance(outputs) < 0.98


@pytest.mark.parametrize("gguf_role", ["target", "draft"])
def test_a_file_beside_a_folder(gguf_role: str, open_llm: OpenLLM, tmp_path: Path) -> None:
    files = make("llama yarn Q8_0", tmp_path)
    pair = files.pair
    mixed = replace(pair, draft=files.draft_folder) if gguf_role == "target" else replace(pair, target=files.folder)
    batch, params = prompts(LENGTHS, seed=1), SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    outputs, whole = (open_llm(each, window=3).generate(batch, params) for each in (mixed, pair))
    assert token_ids(outputs) == token_ids(whole) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert acceptance(outputs) == acceptance(whole)
