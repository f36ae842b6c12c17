"""The dtype of a checkpoint where the user asks for none: transformers' own choice on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config_support import ABSENT
from families import llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pearl.errors import ModelLoadError
from pearl.models import ModelConfig
from pearl.models.model_dtype import checkpoint_dtype


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in float16, in shards; a shard's name says so, not its place in the folder."""
    folder = tmp_path_factory.mktemp("stored")
    llama().to(torch.float16).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def declare(folder: Path, name: str, value: Any) -> str:
    path = folder / "config.json"
    fields = {key: each for key, each in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(fields if value is ABSENT else {**fields, name: value}))
    return str(folder)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "value", [ABSENT, None, "bfloat16", "half", "float", {"": "bfloat16"}, {"vision": "bfloat16"}, {}], ids=repr
)
def test_the_dtype_is_transformers(stored: Path, name: str, value: Any) -> None:
    folder = declare(stored, name, value)
    assert ModelConfig.from_pretrained(folder).dtype == AutoModelForCausalLM.from_pretrained(folder).dtype


def test_auto_is_what_the_weights_are_stored_in(stored: Path, tmp_path: Path) -> None:
    assert ModelConfig.from_pretrained(declare(stored, "dtype", "auto")).dtype == torch.float16
    llama().to(torch.bfloat16).save_pretrained(tmp_path)  # one file
    assert ModelConfig.from_pretrained(declare(tmp_path, "torch_dtype", "auto")).dtype == torch.bfloat16
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 9)  # the loader's to complain about
    assert ModelConfig.from_pretrained(str(tmp_path)).dtype == torch.float32


def test_of_several_stored_dtypes_the_first_one_counts(tmp_path: Path) -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, first, second in zip(
        shards, (torch.bfloat16, torch.float64), (torch.float32, torch.float16), strict=True
    ):
        save_file({"a": torch.zeros(1, dtype=first), "b": torch.zeros(1, dtype=second)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
    assert checkpoint_dtype(str(tmp_path), {}) == torch.bfloat16
    (tmp_path / shards[1]).rename(tmp_path / "model.safetensors")
    assert checkpoint_dtype(str(tmp_path), {}) == torch.float32


def test_float64_is_computed_in_the_widest_that_the_kernels_have(stored: Path) -> None:
    assert ModelConfig.from_pretrained(declare(stored, "dtype", "float64")).dtype == torch.float32


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "value", ["bf16", "torch.bfloat16", "", "nn", "int8", "float8_e4m3fn", 5, True, ["float16"], {"": "bf16"}], ids=repr
)
def test_any_other_dtype_is_named_unless_the_user_gives_one(stored: Path, name: str, value: Any) -> None:
    folder = declare(stored, name, value)
    shown = value[""] if isinstance(value, dict) else value
    with pytest.raises(ModelLoadError) as raised:
        ModelConfig.from_pretrained(folder)
    assert f"dtype {shown!r} is not supported; known are float32, " in str(raised.value)
    assert ModelConfig.from_pretrained(folder, torch.bfloat16).dtype == torch.bfloat16
