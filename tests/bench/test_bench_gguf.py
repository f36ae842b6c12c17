"""The conversion for llama.cpp: names, types, and queries and keys that its rotation turns as ours does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.roofline.gguf_export import write_gguf
from pearl import ConfigurationError
from pearl.models import bundled_path

GGUFReader = pytest.importorskip("gguf", reason="reads what was written with the package gguf").GGUFReader
DRAFT = Path(bundled_path("draft"))


class Writer:
    """gguf.GGUFWriter: every add_NAME(value) is kept as NAME."""

    def __init__(self, path: str, architecture: str) -> None:
        self.values: dict[str, Any] = {"architecture": architecture}
        self.tensors: dict[str, tuple[np.ndarray[Any, Any], str]] = {}
        self.written: list[str] = []

    def add_tensor(self, name: str, data: np.ndarray[Any, Any], raw_dtype: str) -> None:
        self.tensors[name] = data, raw_dtype

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("add_"):
            return lambda *value: self.values.update({name.removeprefix("add_"): value[-1]})
        return lambda: self.written.append(name)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    made: list[Writer] = []

    def writer(path: str, architecture: str) -> Writer:
        made.append(Writer(path, architecture))
        return made[-1]

    types = SimpleNamespace(F32="F32", F16="F16", BF16="BF16")
    kinds = SimpleNamespace(NORMAL=1, CONTROL=3)
    fake = SimpleNamespace(GGUFWriter=writer, GGMLQuantizationType=types, TokenType=kinds)
    monkeypatch.setitem(sys.modules, "gguf", fake)  # type: ignore[arg-type]
    return made


def test_everything_of_the_checkpoint_is_written(writers: list[Writer], tmp_path: Path) -> None:
    write_gguf(DRAFT, tmp_path / "draft.gguf", torch.bfloat16)
    ((writer,), stored) = writers, load_file(DRAFT / "model.safetensors")
    assert len(writer.tensors) == len(stored)
    assert writer.written == ["write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"]
    assert writer.values["architecture"] == "llama"
    assert (writer.values["block_count"], writer.values["head_count"], writer.values["head_count_kv"]) == (2, 3, 1)
    assert len(writer.values["token_list"]) == writer.values["vocab_size"] == 4096
    up, kind = writer.tensors["blk.1.ffn_up.weight"]
    assert kind == "BF16"
    expected = stored["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(torch.from_numpy(up).view(torch.bfloat16), expected)
    norm, kind = writer.tensors["blk.0.attn_norm.weight"]
    assert (kind, norm.dtype) == ("F32", np.float32)


def test_neighbouring_lanes_rotate_as_halves_do(writers: list[Writer], tmp_path: Path) -> None:
    write_gguf(DRAFT, tmp_path / "draft.gguf", torch.float32)
    stored = load_file(DRAFT / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    written = torch.from_numpy(writers[0].tensors["blk.0.attn_q.weight"][0])
    x, angles = torch.randn(stored.shape[1]), torch.rand(32)
    ours, theirs = ((w @ x).view(3, 64) for w in (stored, written))
    left, right = ours[:, :32], ours[:, 32:]
    even, odd = theirs[:, ::2], theirs[:, 1::2]
    torch.testing.assert_close(even, left)
    torch.testing.assert_close(odd, right)
    torch.testing.assert_close(even * angles.cos() - odd * angles.sin(), left * angles.cos() - right * angles.sin())


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as error:
        write_gguf(folder, folder / "out.gguf", torch.float32)
    return str(error.value)


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"model_type": "mistral"}], ids=str)
@pytest.mark.usefixtures("writers")
def test_another_kind_of_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    config = json.loads((DRAFT / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "not a plain Llama model" in refusal(tmp_path)


@pytest.mark.usefixtures("writers")
def test_a_model_without_its_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DRAFT / "config.json").read_text())
    assert "no single model.safetensors" in refusal(tmp_path)


def test_the_real_package_reads_it_back(tmp_path: Path) -> None:
    path = tmp_path / "draft.gguf"
    write_gguf(DRAFT, path, torch.float16)
    read = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    stored = load_file(DRAFT / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].half()
    assert torch.equal(torch.from_numpy(np.array(read["blk.1.ffn_down.weight"].data)), stored)
