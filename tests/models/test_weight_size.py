"""The bytes that a configuration promises are those that the loader holds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, build
from torch import Tensor

from pearl.models import Decoder, ModelConfig, bundled_path, load_model
from pearl.models.decoder import MixtureWeights
from pearl.models.sharding import shard
from pearl.models.weight_size import read_bytes, weight_bytes
from pearl_kernels import LinearWeight, Situation, select
from pearl_kernels.registry import OPERATORS

BUNDLED = [bundled_path("target"), bundled_path("draft")]


def load_plain(path: Path, dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> Decoder:
    """With the reference's matrices, which are what GPUs hold: as stored, not packed."""
    kernels = select(Situation("cpu", dtype), dict.fromkeys(OPERATORS, "reference"))
    sharding = shard(ModelConfig.from_pretrained(str(path)), rank, ranks)
    return load_model(
        path, device=torch.device("cpu"), dtype=dtype, max_model_len=16, kernels=kernels, sharding=sharding
    )


def held_bytes(model: Decoder) -> int:
    """Each storage once: a tied head is the embedding."""
    weights: list[Any] = [model.weights.embedding, model.weights.norm, model.weights.head]
    parts: list[Any] = [part for layer in model.weights.layers for part in (layer, layer.mixture) if part is not None]
    parts += [part.experts for part in parts if isinstance(part, MixtureWeights)]
    weights += [getattr(part, field.name) for part in parts for field in fields(part)]
    tensors = [weight.data if isinstance(weight, LinearWeight) else weight for weight in weights]
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", sorted(FAMILIES.keys() - {"llama-linear", "llama-dynamic", "llama-llama3", "llama-yarn"})
)
def test_of_every_family(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = build(name)
    reference.save_pretrained(tmp_path)
    promised = weight_bytes(ModelConfig.from_pretrained(str(tmp_path)), dtype)
    sizes = {name: 4 if name.endswith("sinks") else dtype.itemsize for name, _ in reference.named_parameters()}
    assert promised == sum(parameter.numel() * sizes[name] for name, parameter in reference.named_parameters())
    assert promised == held_bytes(load_plain(tmp_path, dtype))


@pytest.mark.parametrize("path", BUNDLED, ids=["target", "draft"])
def test_of_the_bundled_pair(path: Path) -> None:
    config = ModelConfig.from_pretrained(str(path))
    assert weight_bytes(config, config.dtype) == held_bytes(load_plain(path, config.dtype))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "qwen2", "qwen3"])
def test_of_each_rank(name: str, ranks: int, tmp_path: Path) -> None:
    """What is padded, whole on every rank, or the first rank's alone is counted where it lies."""
    build(name).save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(str(tmp_path))
    promised = [weight_bytes(config, torch.float32, rank, ranks) for rank in range(ranks)]
    assert promised == [held_bytes(load_plain(tmp_path, torch.float32, rank, ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_row_reads_the_experts_that_it_meets(name: str, tmp_path: Path) -> None:
    """All of a layer's experts but as many as it meets are left out, and embeddings that are not the head; many rows
    meet all of them.
    """
    reference = build(name)
    reference.save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(str(tmp_path))
    mixture = config.mixture
    assert mixture is not None
    embedding = 0 if config.tied else reference.get_input_embeddings().weight.nbytes
    held = weight_bytes(config, torch.float32) - embedding
    experts = {n: p for n, p in reference.named_parameters() if ".mlp.experts." in n}
    assert len({n.rsplit(".", 1)[0] for n in experts}) == mixture.layers
    left_out = sum(p.numel() * 4 * (mixture.experts - mixture.top_k) // mixture.experts for p in experts.values())
    assert read_bytes(config, torch.float32) == held - left_out
    assert read_bytes(config, torch.float32, 200) == held
    two = read_bytes(config, torch.float32, 2)
    assert held - left_out < two < held or left_out == 0


def test_a_dense_model_is_read_whole_but_for_embeddings(tmp_path: Path) -> None:
    config = ModelConfig.from_pretrained(str(BUNDLED[0]))
    assert config.tied
    assert read_bytes(config, torch.bfloat16) == weight_bytes(config, torch.bfloat16)
    build("llama").save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(str(tmp_path))
    embedding = 2 * config.vocab_size * config.hidden
    assert read_bytes(config, torch.bfloat16) == weight_bytes(config, torch.bfloat16) - embedding
