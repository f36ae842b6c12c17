"""Quantised checkpoints are refused by the name of their method, or by the tensor that gives them away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_as_transformers, edit_config, rewrite, save
from families import load

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.quantization import refuse_quantized, refuse_quantized_tensors

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
METHODS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, r"compressed-tensors \(float-quantized\)"),
    ({"quant_method": "compressed-tensors", "format": "int-quantized"}, r"compressed-tensors \(int-quantized\)"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),  # AutoFP8
    ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, r"fp8 \(e4m3\)"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\)"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, r"bitsandbytes \(8 bits\)"),
    ({"load_in_4bit": True}, r"bitsandbytes \(4 bits\)"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"gptq \(4 bits\)"),
    ({"quant_method": "a-method-of-next-year"}, "a-method-of-next-year"),
    ({"bits": 8}, "a method that has no name"),
]


@pytest.mark.parametrize(("settings", "name"), METHODS, ids=[name for _, name in METHODS])
def test_the_method_is_named(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(UnsupportedModelError, match=rf"is quantised with .*{name}.*use the unquantised one"):
        refuse_quantized(tmp_path)


@pytest.mark.parametrize("key", ["compression_config", "quantization_config"])
def test_older_keys_and_odd_values(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: "fp8"}))
    with pytest.raises(UnsupportedModelError, match=rf"quantised with 'fp8' \({key}"):
        refuse_quantized(tmp_path)


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    save("llama", tmp_path)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    with pytest.raises(UnsupportedModelError, match=r"ModelOpt's FP8 \(hf_quant_config\.json\)"):
        load(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": "FP8"}))
    with pytest.raises(UnsupportedModelError, match=r"ModelOpt's FP8 \(hf_quant_config\.json\)"):
        refuse_quantized(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"hf_quant_config\.json must hold a JSON object, not a list"):
        load(tmp_path)


def test_what_says_that_nothing_is_quantised(tmp_path: Path) -> None:
    save("llama", tmp_path)
    edit_config(tmp_path, quantization_config=None)
    scales = ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale", "k_proj.output_scale", "v_proj.output_scale")
    rewrite(tmp_path, {f"model.layers.1.self_attn.{name}": torch.full((1,), 2.0) for name in scales})
    kv_only = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": kv_only}))
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int16, "I16"),
        (torch.int32, "I32"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
    ],
)
def test_a_matrix_in_another_dtype_gives_it_away(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    tensors = save("llama", tmp_path)
    rewrite(tmp_path, {Q_PROJ: tensors[Q_PROJ].to(dtype)})
    with pytest.raises(UnsupportedModelError, match=rf"'{Q_PROJ}' is stored as {stored}"):
        load(tmp_path)


@pytest.mark.parametrize("companion", ["weight_scale", "weight_scale_inv", "qweight", "SCB", "weight_packed", "absmax"])
def test_what_lies_beside_a_matrix_gives_it_away(companion: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    name = Q_PROJ.replace("weight", companion)
    rewrite(tmp_path, {Q_PROJ: None, name: torch.ones(48, 1)})
    with pytest.raises(UnsupportedModelError, match=rf"'{name}' belongs to a quantised matrix"):
        load(tmp_path)


@pytest.mark.parametrize(
    "companion",
    [
        "weight_scale_2", "weight_zero_point", "weight_shape", "input_scale", "activation_scale", "qzeros", "scales",
        "g_idx", "weight_format", "quant_map", "nested_absmax", "nested_quant_map", "codebooks", "codes",
    ],
)  # fmt: skip
def test_so_do_the_companions_of_other_methods(companion: str, tmp_path: Path) -> None:
    name = Q_PROJ.replace("weight", companion)
    with pytest.raises(UnsupportedModelError, match=rf"'{name}' belongs to a quantised matrix"):
        refuse_quantized_tensors(tmp_path, {}, [name])


def test_numbers_that_the_decoder_does_not_read_may_be_of_any_dtype(tmp_path: Path) -> None:
    save("llama", tmp_path)
    rewrite(tmp_path, {"vision_tower.position_ids": torch.arange(9), "vision_tower.fc.weight_scale": torch.ones(1)})
    assert_as_transformers(tmp_path)
