"""What cannot work is refused before a weight of either model is read, whichever of the two it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pearl.config import EngineConfig
from pearl.engine import model_loading
from pearl.engine.model_loading import load_models
from pearl.engine.model_pair import check_pair
from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.models import Decoder, bundled_path
from pearl.models.model_folder import ModelFolder

UP = "model.layers.0.mlp.up_proj.weight"
PLACES: list[dict[str, Any]] = [
    {"role": "target"},
    {"role": "target", "method": "autoregressive"},
    {"role": "target", "target_parallel": 2},
    {"role": "draft"},
    {"role": "draft", "target_parallel": 2},
]


def unread(*arguments: object, **_: object) -> Decoder:
    raise AssertionError(f"weights were read: {arguments}")


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loading, "load_model", unread)
    monkeypatch.setattr(model_loading, "make_parallel_runner", unread)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled draft, which may stand in for either model."""
    return Path(shutil.copytree(bundled_path("draft"), tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    save_file({**load_file(folder / "model.safetensors"), **changes}, folder / "model.safetensors")


def load(folder: Path, role: str, **options: Any) -> None:
    load_models(EngineConfig(device="cpu", **{role: str(folder)}, **options))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_quantised_model_by_its_configuration(place: dict[str, Any], folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match=r"quantised with bitsandbytes \(4 bits\)"):
        load(folder, **place)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_quantised_model_by_a_dtype(place: dict[str, Any], folder: Path) -> None:
    edit_tensors(folder, **{UP: load_file(folder / "model.safetensors")[UP].to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedModelError, match=rf"'{UP}' is stored as F8_E4M3"):
        load(folder, **place)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_tensor_that_nothing_reads(place: dict[str, Any], folder: Path) -> None:
    edit_tensors(folder, **{UP.replace("weight", "bias"): torch.zeros(3)})
    with pytest.raises(ModelLoadError, match=r"holds 'model\.layers\.0\.mlp\.up_proj\.bias'"):
        load(folder, **place)


@pytest.mark.parametrize("options", [{}, {"method": "autoregressive"}, {"target_parallel": 2}], ids=str)
def test_a_default_kv_cache_that_a_model_on_cpu_outgrows(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are even fetched. The sum that would do is named."""
    monkeypatch.setattr(ModelFolder, "fetch_weights", unread)
    edit_config(folder, max_position_embeddings=1 << 22)
    with pytest.raises(
        ConfigurationError, match=r"one sequence of 4194304 .* the default on cpu is 1024\.0 MiB"
    ) as error:
        load(folder, "target", draft=str(folder), **options)
    remedy = int(str(error.value).split("give kv_cache_memory=")[1].split(" ")[0])
    with pytest.raises(AssertionError, match="were read"):
        load(folder, "target", draft=str(folder), kv_cache_memory=remedy, **options)
    with pytest.raises(ConfigurationError, match="kv_cache_memory allows"):
        load(folder, "target", draft=str(folder), kv_cache_memory=remedy - 1, **options)


def test_tokens_that_a_draft_has_no_row_for_may_be_others(tmp_path: Path) -> None:
    """Its tokenizer names them, behind its head: it can neither read nor draft them."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        values = json.loads((bundled_path("draft") / name).read_text("utf-8"))
        if name == "config.json":
            values["vocab_size"] = 4090
        if name == "tokenizer.json":
            words, values["model"]["merges"] = values["model"]["vocab"], []
            values["model"]["vocab"] = {word if i < 4090 else f"<other {i}>": i for word, i in words.items()}
        (tmp_path / name).write_text(json.dumps(values), "utf-8")
    pair = check_pair(EngineConfig(), str(bundled_path("target")), str(tmp_path))
    assert pair.draft is not None
    assert (pair.vocab_size, pair.draft.vocab_size) == (4096, 4090)
