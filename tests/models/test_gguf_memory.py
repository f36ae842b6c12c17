"""Matrices of GGUF files that stay in their few bits: which ones, and what they take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="writes files with the package gguf")

from checkpoints import assert_logits
from families import load
from gguf_files import gguf_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pearl.config import EngineConfig
from pearl.engine.model_loading import load_models
from pearl.errors import ConfigurationError
from pearl.models import Decoder, ModelConfig
from pearl.models.weight_size import weight_bytes
from pearl_kernels import LinearWeight
from pearl_kernels.cpu import _core

SHAPE = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "attn_implementation": "eager",
}  # fmt: skip


def model(**changes: object) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **{**SHAPE, "tie_word_embeddings": False, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def weights_of(decoder: Decoder) -> list[LinearWeight]:
    layers = [weight for w in decoder.weights.layers for weight in (w.qkv, w.output, w.gate_up, w.down)]
    return [*layers, decoder.weights.head]


def nbytes(decoder: Decoder) -> int:
    """Of linear layers, without what pads the last panel of outputs."""
    total = 0
    for weight in weights_of(decoder):
        parts = [part for part in (weight.data, weight.scale, weight.offset) if part is not None]
        padded = weight.data.shape[0] * _core.PANEL_COLUMNS
        total += sum(part.nbytes for part in parts) * weight.out_features // padded
    return total


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4), ("Q4_K", 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_matrix_is_kept(kind: str, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    file, judge = gguf_of(model(), kind)
    path = Path(file.write(tmp_path / "model.gguf"))
    decoder = load(path, dtype)
    assert [weight.bits for weight in weights_of(decoder)] == [bits] * 9
    config = ModelConfig.from_pretrained(str(path), dtype)
    plain, kept = (weight_bytes(shape, dtype, device="cpu") for shape in (replace(config, quantization=None), config))
    elements = sum(weight.out_features * weight.in_features for weight in weights_of(decoder))
    assert plain - kept == elements * dtype.itemsize - nbytes(decoder)
    if dtype == torch.float32:
        assert_logits(path, judge)


def test_matrices_that_are_loaded_as_one_are_kept_together(tmp_path: Path) -> None:
    """As in llama.cpp's mixtures: values in more bits than queries and keys. A tied head stays the embedding."""
    kinds = {"blk.0.attn_v.weight": "Q6_K", "blk.1.ffn_gate.weight": "Q8_0", "token_embd.weight": "Q8_0"}
    file, judge = gguf_of(model(tie_word_embeddings=True), lambda name: kinds.get(name, "Q4_K"))
    path = Path(file.write(tmp_path / "model.gguf"))
    decoder = load(path)
    assert [weight.bits if weight.scale is not None else 0 for weight in weights_of(decoder)] == [
        0, 4, 4, 4,
        4, 4, 0, 4,
        0,
    ]  # fmt: skip
    config = ModelConfig.from_pretrained(str(path), torch.float32)
    plain, kept = (
        weight_bytes(each, torch.float32, device="cpu") for each in (replace(config, quantization=None), config)
    )
    elements = sum(weight.out_features * weight.in_features for weight in weights_of(decoder))
    assert plain - kept == elements * 4 - nbytes(decoder)
    assert_logits(path, judge)


def test_offsets_of_one_are_held_for_all_that_it_is_merged_with(tmp_path: Path) -> None:
    """Q4_0 and Q4_1 are groups of the same bits; the one's matrix has offsets of 0 in the other's."""
    kinds = {"blk.0.attn_k.weight": "Q4_1", "blk.1.ffn_up.weight": "Q4_1"}
    file, judge = gguf_of(model(), lambda name: kinds.get(name, "Q4_0"))
    path = Path(file.write(tmp_path / "model.gguf"))
    decoder = load(path)
    assert [weight.offset is not None for weight in weights_of(decoder)] == [True, *[False] * 5, True, False, False]
    config = ModelConfig.from_pretrained(str(path), torch.float32)
    plain, kept = (
        weight_bytes(each, torch.float32, device="cpu") for each in (replace(config, quantization=None), config)
    )
    elements = sum(weight.out_features * weight.in_features for weight in weights_of(decoder))
    assert plain - kept == elements * 4 - nbytes(decoder)
    assert_logits(path, judge)


def test_files_without_few_bits_are_plain(tmp_path: Path) -> None:
    for kind in ("F16", "Q6_K"):
        file, _ = gguf_of(model(), kind)
        path = file.write(tmp_path / "model.gguf")
        assert ModelConfig.from_pretrained(path).quantization is None


def test_few_bits_are_not_rounded_again(tmp_path: Path) -> None:
    vocabulary = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    file, _ = gguf_of(model(), "Q4_0", {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()})
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(
        ConfigurationError, match=r"the target is quantised already, with GGUF \(Q4_0\); leave target_w"
    ):
        load_models(EngineConfig(target=path, method="autoregressive", device="cpu", target_weights="int8"))
