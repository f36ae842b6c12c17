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
from pearl.models.packed_storage import AwqStorage
from pearl.models.quantization import Quantization, read_quantization, refuse_quantized_tensors
from pearl.models.quantization_methods import Method

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def compressed(weights: dict[str, Any], form: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, **more}


REFUSED: list[tuple[Any, str]] = [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, r"bitsandbytes \(8 bits\)"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, r"bitsandbytes \(nf4, 4 bits\)"),
    ({"quant_method": "aqlm", "nbits_per_codebook": 8}, "aqlm"),
    ({"quant_method": "eetq"}, "eetq"),
    ({"quant_method": "hqq"}, "hqq"),
    ({"quant_method": "torchao"}, "torchao"),
    ({"quant_method": "a-method-of-next-year"}, "a-method-of-next-year"),
    ({"bits": 8}, "a method that has no name"),
    ("fp8", "'fp8'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\): quant_algo 'NVFP4'"),
    (compressed({**W4, "type": "float"}, "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' with float weights"),
    (compressed({**W4, "num_bits": 3}), "format 'pack-quantized' with int weights of 3 bits"),
    (compressed({**W4, "strategy": "tensor"}), "with a scale for each tensor"),
    (compressed({**W4, "strategy": "attn_head"}), "strategy 'attn_head'"),
    (compressed({**W4, "dynamic": True}), "while it runs"),
    (compressed({**W4, "type": "float", "num_bits": 8, "symmetric": False}, "float-quantized"), "float-quantized"),
    (compressed(W4, sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
    (compressed(W4, transform_config={"u": {}}), "transformed"),
    (compressed(W4, quantization_status="calibration"), "quantization_status is 'calibration'"),
    (
        {**compressed(W4), "config_groups": {"a": {"weights": W4}, "b": {"weights": {**W4, "group_size": 64}}}},
        "config_groups quantise weights in different ways",
    ),
    ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"),
    ({**FP8, "scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
    ({**AWQ, "bits": 8}, r"awq \(8 bits\): 8 bits"),
    ({**AWQ, "version": "gemv"}, "version 'gemv'"),
    ({**AWQ, "zero_point": False}, "no zero points"),
    ({**GPTQ, "bits": 3}, r"gptq \(3 bits\): 3 bits"),
    ({**GPTQ, "dynamic": {"-:.*down.*": {}}}, "settings of their own"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
]
MALFORMED: list[tuple[dict[str, Any], str]] = [
    (
        {**GPTQ, "group_size": "128"},
        r"gptq \(4 bits\), cannot be read: group_size must be a positive integer, not '128'",
    ),
    ({**GPTQ, "group_size": 0}, "group_size must be a positive integer, not 0"),
    ({**GPTQ, "desc_act": "yes"}, "desc_act must be true or false, not 'yes'"),
    ({**AWQ, "group_size": None}, "group_size must be a positive integer, not None"),
    ({**AWQ, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list"),
    ({**FP8, "weight_block_size": [128]}, r"weight_block_size must be a block's rows and columns, not \[128\]"),
    ({**FP8, "weight_block_size": [128, True]}, "weight_block_size must be a positive integer, not True"),
    ({"quant_method": "compressed-tensors"}, "config_groups must say"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "config_groups must say of each group"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": [W4]}}, "config_groups must say of each group how"),
    (compressed({"num_bits": 8, "type": "float", "strategy": "block"}, "float-quantized"), "block_structure must be"),
    (compressed(W4, ignore=["re:("]), r"ignore holds 're:\(', which is no regular expression"),
    (compressed({**W4, "group_size": None}), "group_size must be a positive integer, not None"),
]


@pytest.mark.parametrize("key", ["compression_config", "quantization_config"])
@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_method_is_refused_by_its_name(settings: Any, reason: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: settings}))
    wanted = rf"{key} of .*config\.json says that it is quantised with .*{reason}.*supported are compressed-tensors"
    with pytest.raises(UnsupportedModelError, match=wanted):
        read_quantization(tmp_path)


@pytest.mark.parametrize(("settings", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_settings_that_make_no_sense(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(ModelLoadError, match=reason):
        read_quantization(tmp_path)


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    save("llama", tmp_path)
    for quantization in ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "NVFP4"):
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
        with pytest.raises(UnsupportedModelError, match=r"hf_quant_config\.json says .* modelopt \(NVFP4\)"):
            load(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"hf_quant_config\.json must hold a JSON object, not a list"):
        load(tmp_path)


def test_a_description_without_a_quantised_tensor(tmp_path: Path) -> None:
    save("llama", tmp_path)
    edit_config(tmp_path, quantization_config=GPTQ)
    with pytest.raises(ModelLoadError, match=r"gptq \(4 bits\) by its description, but no tensor of it is"):
        load(tmp_path)


def test_modules_that_are_left_out() -> None:
    patterns = ("lm_head", "re:.*layers\\.0\\..*", "model.layers.1*", "k_proj", "self_attn.v_proj")
    quantization = Quantization(Method("any", AwqStorage(32), patterns))
    ignored = [
        "lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.2.self_attn.k_proj",
        "model.layers.2.self_attn.v_proj", "model.layers.10.mlp.up_proj",
    ]  # fmt: skip
    for module in ignored:
        assert quantization.ignores(module)
        assert not quantization.holds(module)
    for module in ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.20.mlp.k_proj_two"):
        assert not quantization.ignores(module)
        assert quantization.holds(module)
    assert not Quantization(Method("any", AwqStorage(32))).holds("lm_head")  # unless the files have it so


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
        "weight_blocks", "weight_scales", "gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks",
        "down_proj_scales",
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
