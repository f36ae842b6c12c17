"""Checkpoints that are sharded, incomplete, damaged or of an unknown family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import edit_config, rewrite
from families import build, load

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models import ModelConfig


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def test_shards_give_the_same_weights_as_one_file(checkpoint: Path, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, many = load(checkpoint).weights, load(tmp_path / "shards").weights
    assert torch.equal(one.head.data, many.head.data)
    assert all(torch.equal(a.qkv.data, b.qkv.data) and torch.equal(a.down.data, b.down.data)
               for a, b in zip(one.layers, many.layers, strict=True))  # fmt: skip


def test_dtype_is_converted_at_load(checkpoint: Path) -> None:
    weights = load(checkpoint, torch.bfloat16).weights
    assert {weights.head.data.dtype, weights.layers[0].gate_up.data.dtype, weights.norm.dtype} == {torch.bfloat16}


def test_missing_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, {"model.layers.1.mlp.down_proj.weight": None})
    with pytest.raises(ModelLoadError, match=r"no tensor 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        load(checkpoint)


def test_wrong_shape_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, {"model.norm.weight": torch.ones(7)})
    with pytest.raises(ModelLoadError, match=r"'model\.norm\.weight' has shape \(7,\).*calls for \(48,\)"):
        load(checkpoint)


def test_damaged_file(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelLoadError, match="missing or damaged"):
        load(checkpoint)


def test_missing_path_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(tmp_path)


def test_unknown_activation_and_rope_are_refused(checkpoint: Path) -> None:
    edit_config(checkpoint, hidden_act="gelu")
    with pytest.raises(UnsupportedModelError, match="activation 'gelu'"):
        load(checkpoint)


@pytest.mark.parametrize("old", [{"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}])
def test_configurations_written_before_transformers_5(checkpoint: Path, old: dict[str, object]) -> None:
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    path.write_text(json.dumps({**values, "rope_theta": 7000.0, "rope_scaling": old}))
    rope = ModelConfig.from_pretrained(str(checkpoint)).rope
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 7000.0, 4.0)
