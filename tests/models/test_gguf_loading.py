"""GGUF files against transformers' classes with the same numbers: the same logits, and the dtype that they call for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="writes files with the package gguf")

from checkpoints import assert_logits
from families import SHAPE, build, randomised
from gguf_files import gguf_of
from gguf_support import in_parts, written
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_rope_utils

from pearl.models import ModelConfig

FAMILIES = [
    "llama", "llama-tied", "llama-biases", "llama-wide-heads", "llama-one-kv-head", "llama-left-over-window",
    "llama-linear", "llama-yarn", "llama-llama3", "mistral-window", "mistral-full", "qwen2", "qwen3",
]  # fmt: skip


def gemma(model_type: str, **changes: Any) -> PreTrainedModel:
    """With the numbers that are no fields of a file as llama.cpp takes them."""
    shape = {
        **SHAPE,
        "head_dim": 16,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        **changes,
    }
    return randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)))


def gemma3(**changes: Any) -> PreTrainedModel:
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 777.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 55.0}}  # fmt: skip
    return gemma("gemma3_text", rope_parameters=ropes, **changes)


GEMMAS = {
    "gemma": lambda: build("gemma"),
    "gemma2": lambda: gemma("gemma2", attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
    "gemma2-27b": lambda: gemma("gemma2", num_hidden_layers=46, query_pre_attn_scalar=8),
    "gemma3": gemma3,
    "gemma3-cap": lambda: gemma3(final_logit_softcapping=5.0),
    "gemma3-27b": lambda: gemma3(num_hidden_layers=62, query_pre_attn_scalar=8),
}


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma_logits(name: str, tmp_path: Path) -> None:
    file, judge = gguf_of(GEMMAS[name]())
    file.write(tmp_path / "model.gguf")
    assert_logits(tmp_path / "model.gguf", judge)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, tmp_path: Path) -> None:
    _, judge = written(family, tmp_path)
    assert_logits(tmp_path / "model.gguf", judge)


def with_config(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The same weights under another configuration."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    changed = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    changed.load_state_dict(model.state_dict())
    return changed


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Fields that change what is computed, or nothing: to the same as transformers' with the configuration changed.
MEANT: dict[str, tuple[str, Mapping[str, Any], dict[str, Any]]] = {
    "another base": ("llama", {"llama.rope.freq_base": 777.0}, {"rope_parameters": {**ROPE, "rope_theta": 777.0}}),
    "no base": ("llama", {"llama.rope.freq_base": None}, {"rope_parameters": ROPE}),
    "another epsilon": ("llama", {"llama.attention.layer_norm_rms_epsilon": 0.25}, {"rms_norm_eps": 0.25}),
    "an old linear factor": (
        "llama",
        {"llama.rope.scale_linear": 3.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "a factor without a type": (
        "qwen3",
        {"qwen3.rope.scaling.factor": 3.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "a factor that is off": (
        "llama",
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 3.0},
        {},
    ),
    "yarn's ramp": (
        "llama-yarn",
        {"llama.rope.scaling.yarn_beta_fast": 8.0, "llama.rope.scaling.yarn_beta_slow": 2.0},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
            }
        },
    ),
    "heads that follow from the width": (
        "llama",
        {f"llama.{name}": None for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")},
        {},
    ),
    "the usual values": (
        "llama",
        {"llama.vocab_size": 131, "llama.expert_count": 0, "llama.rope.scaling.attn_factor": 1.0},
        {},
    ),
    "what says nothing of the model": (
        "qwen2",
        {
            "general.name": "x",
            "general.file_type": 7,
            "quantize.imatrix.file": "y",
            "qwen2.rope.scaling.finetuned": True,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", MEANT)
def test_what_a_field_means(case: str, tmp_path: Path) -> None:
    family, fields, config = MEANT[case]
    file, judge = written(family, tmp_path)
    file.changed(fields).write(tmp_path / "changed.gguf")
    assert_logits(tmp_path / "changed.gguf", with_config(judge, **config) if config else judge)


def test_factors_of_lanes_are_nothing_that_transformers_warns_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have users of any Llama 3 file set a field that no GGUF file has."""
    warnings: list[str] = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(modeling_rope_utils.logger, name, lambda text, *_: warnings.append(text))
    written("llama-llama3", tmp_path)
    assert ModelConfig.from_pretrained(str(tmp_path / "model.gguf")).rope["rope_type"] == "longrope"
    assert not warnings


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (["F32"], torch.float32),
        (["F16"], torch.float16),
        (["BF16"], torch.bfloat16),
        (["F16", "F32"], torch.bfloat16),
        (["Q8_0"], torch.bfloat16),
    ],
)
def test_the_dtype_where_none_is_asked_for(kinds: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**SHAPE, "hidden_size": 96, "intermediate_size": 64})
    )
    file, _ = gguf_of(model, lambda name: kinds[len(name) % len(kinds)])
    assert ModelConfig.from_pretrained(file.write(tmp_path / "model.gguf")).dtype == dtype


def test_a_file_in_parts(tmp_path: Path) -> None:
    file, judge = written("qwen3", tmp_path)
    assert_logits(in_parts(file, tmp_path, 3)[0], judge)
