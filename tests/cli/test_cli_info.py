"""``pearl --version`` and ``pearl info``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantized_checkpoints import quantize
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers_families import build
from typer.testing import CliRunner

from pearl.cli.app import application
from pearl.errors import PearlError
from pearl_kernels.registry import OPERATORS


def test_version() -> None:
    result = CliRunner().invoke(application(), ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("pearl ")


def test_info_names_every_operator_and_every_reason() -> None:
    result = CliRunner().invoke(application(), ["info", "--device", "cpu"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    for part in ("torch", "threads", "MB resident, without a model", "target on cpu", "reference", *OPERATORS):
        assert part in result.stdout


def test_a_model_is_described_by_what_was_recognised(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=7, sliding_window_pattern=2, query_pre_attn_scalar=16,
        final_logit_softcapping=30.0, max_position_embeddings=128,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    result = CliRunner().invoke(application(), ["info", "--model", str(tmp_path)], env={"COLUMNS": "600"})
    assert result.exit_code == 0, result.output
    for part in (
        "Gemma3ForCausalLM, by the native decoder", "3 layers of width 32", "norms before and after", "(1 + weight)",
        "normed by head", "a window of 7 tokens in 2 of 3 layers", "attention scores times 0.25",
        "RoPE default, theta 10000 in 2 of 3 layers", "RoPE default, theta 1e+06 in 1 of 3 layers", "GELU (tanh)",
        "embeddings times 5.65685", "logits capped at 30", "the head is the embedding", "128 tokens", "GiB in float32",
    ):  # fmt: skip
        assert part in result.stdout


def test_a_model_that_transformers_would_run(tmp_path: Path) -> None:
    build("cohere2-windows").save_pretrained(tmp_path)
    result = CliRunner().invoke(application(), ["info", "--model", str(tmp_path)], env={"COLUMNS": "600"})
    assert result.exit_code == 0, result.output
    for part in (
        "Cohere2ForCausalLM, by the transformers backend", "3 layers, 131 rows", "6 heads, 2 of keys and values, of 8",
        "a window of 9 tokens in 2 of 3 layers", "128 tokens", "GiB in float32",
    ):  # fmt: skip
        assert part in result.stdout


@pytest.mark.parametrize(
    ("form", "sentences"),
    [
        ("awq-32", ["with awq (4 bits); on cpu 7 matrices stay in 4 bits"]),
        ("autofp8", ["with fp8; on cpu matrices are decoded", "activations were to be quantised to fp8"]),
    ],
)
def test_a_quantised_model_is_described(form: str, sentences: list[str], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "model", form)
    arguments = ["info", "--device", "cpu", "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(application(), arguments, env={"COLUMNS": "600"})
    assert result.exit_code == 0, result.output
    for sentence in sentences:
        assert sentence in result.stdout


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, "an EAGLE-3 head"),
        ({"medusa_num_heads": 3}, "a set of Medusa heads"),
    ],
)
def test_a_head_is_no_model(fields: dict[str, object], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    result = CliRunner().invoke(application(), ["info", "--model", str(tmp_path)], env={"COLUMNS": "600"})
    assert result.exit_code == 0, result.output
    assert f"{name}: a draft, for the target that it was trained for" in result.stdout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma3"}, "of several modalities.*'gemma3_text'"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_a_model_that_cannot_be_run_is_an_error_that_says_why(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(PearlError, match=message):
        CliRunner().invoke(application(), ["info", "--model", str(tmp_path)], catch_exceptions=False)
