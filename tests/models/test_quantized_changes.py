"""A quantised checkpoint of which one thing is changed is the model that it then describes, or an error sentence.

The judge reads the changed folder by itself (``quantized_meaning``), in the words of the methods' documentation.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, assert_as_transformers, edit_config, rewrite, write
from families import llama, load, randomised
from quantized_checkpoints import FORMATS, quantize
from quantized_meaning import meant_tensors
from safetensors.torch import load_file
from torch import Tensor

from pearl.errors import ModelLoadError, UnsupportedModelError

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}
SETTINGS = (
    "bits", "group_size", "num_bits", "symmetric", "sym", "desc_act", "zero_point", "checkpoint_format", "format",
    "strategy", "version", "weight_block_size", "quant_method", "quant_algo", "type", "ignore", "actorder", "fmt",
    "block_structure",
)  # fmt: skip
VALUES = (
    1, 3, 4, 8, 32, 48, 64, 128, -1, True, False, None, "gptq", "gptq_v2", "gemv", "channel", "group", "tensor", "int",
    "float", "pack-quantized", "int-quantized", "fp8", "awq", "FP8", "NVFP4", [128, 128], [64, 64], [],
    ["mlp.down_proj"], "group", "static", "e5m2",
)  # fmt: skip
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.int8, torch.uint8,
    torch.float8_e4m3fn,
)  # fmt: skip
TRIES = 3  # of each format


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(5)
    randomised(llama(**SHAPE)).save_pretrained(folder)
    return folder


Change = Callable[[Path, random.Random], str]


def of_tensors(folder: Path) -> dict[str, Tensor]:
    """The quantised matrices' tensors."""
    stored = load_file(folder / SINGLE)
    return {name: stored[name] for name in sorted(stored) if "proj" in name}


def drop(folder: Path, rng: random.Random) -> str:
    name = rng.choice(list(of_tensors(folder)))
    rewrite(folder, {name: None})
    return f"without {name}"


def rename(folder: Path, rng: random.Random) -> str:
    tensors = of_tensors(folder)
    name = rng.choice(list(tensors))
    last = rng.choice(
        ["weight", "qweight", "weight_packed", "weight_scale", "weight_scale_inv", "scales", "g_idx", "bias"]
    )
    new = f"{name.rpartition('.')[0]}.{last}"
    rewrite(folder, {name: None, new: tensors[name]})
    return f"{name} as {new}"


def recast(folder: Path, rng: random.Random) -> str:
    tensors = of_tensors(folder)
    name, dtype = rng.choice(list(tensors)), rng.choice(DTYPES)
    rewrite(folder, {name: tensors[name].to(dtype)})
    return f"{name} as {dtype}"


def reshape(folder: Path, rng: random.Random) -> str:
    tensors = of_tensors(folder)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    flat = tensor.reshape(-1)
    changed = rng.choice([tensor[:-1] if tensor.dim() else tensor[None], torch.cat([flat, flat]), flat])
    rewrite(folder, {name: changed.contiguous()})
    return f"{name} of shape {tuple(changed.shape)}"


def renumber(folder: Path, rng: random.Random) -> str:
    """Other numbers of the same dtype: another model."""
    tensors = of_tensors(folder)
    name = rng.choice([name for name, tensor in tensors.items() if tensor.numel() > 1])
    flat = tensors[name].flatten()
    order = list(range(len(flat)))
    rng.shuffle(order)
    rewrite(folder, {name: flat[order].reshape(tensors[name].shape)})
    return f"{name} in another order"


def reset(folder: Path, rng: random.Random) -> str:
    """A field of the description."""
    file = folder / "config.json"
    key = "quantization_config"
    if key not in json.loads(file.read_text()):
        file, key = folder / "hf_quant_config.json", "quantization"
    values = json.loads(file.read_text())
    holders = [values[key]]
    for group in values[key].get("config_groups", {}).values():
        holders.append(group["weights"])
    holder = rng.choice(holders)
    name, value = rng.choice([name for name in SETTINGS if name in holder]), rng.choice(VALUES)
    holder[name] = value
    file.write_text(json.dumps(values))
    return f"{name}={value!r}"


CHANGES: tuple[Change, ...] = (drop, rename, recast, reshape, renumber, reset, reset)


@pytest.mark.parametrize("name", FORMATS)
def test_one_change_is_seen_or_refused(name: str, source: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    quantize(source, original, name)
    for seed in range(TRIES):
        rng = random.Random(f"{name} {seed}")
        folder, plain = tmp_path / str(seed), tmp_path / f"{seed}-plain"
        shutil.copytree(original, folder)
        what = rng.choice(CHANGES)(folder, rng)
        if (reason := refusal(folder)) is not None:
            assert str(folder) in reason, what
            continue
        plain.mkdir()
        (plain / "config.json").write_text((source / "config.json").read_text())
        write(plain, meant_tensors(folder))
        assert differs(folder, plain) is None, f"{name}: {what}"


def refusal(folder: Path) -> str | None:
    try:
        load(folder)
    except (ModelLoadError, UnsupportedModelError) as error:
        return str(error)
    return None


def differs(folder: Path, plain: Path) -> AssertionError | None:
    try:
        assert_as_transformers(folder, plain)
    except AssertionError as error:
        return error
    return None


DOWN = "model.layers.0.mlp.down_proj"


def without_zeros(folder: Path) -> None:
    reset_weights(folder, symmetric=True)


def reset_weights(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings["config_groups"]["group_0"]["weights"].update(fields)
    edit_config(folder, quantization_config=settings)


def cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])


def spoilt_groups(folder: Path) -> None:
    name = f"{DOWN}.g_idx"
    rewrite(folder, {name: load_file(folder / SINGLE)[name] + 1})


def left_out(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**settings, "modules_to_not_convert": ["mlp.down_proj"]})


SENTENCES: list[tuple[str, Callable[[Path], None], str]] = [
    ("ct-w4a16-zeros-32", without_zeros, r"weight_zero_point', which compressed-tensors \(pack-quantized\) .* not use"),
    ("ct-w4a16-128", lambda f: reset_weights(f, symmetric=False), r"no tensor '.*weight_zero_point', which compressed"),
    ("ct-w4a16-128", lambda f: rewrite(f, {f"{DOWN}.weight_shape": torch.tensor([96, 64])}), "weight_shape says"),
    ("fp8-blocks", lambda f: rewrite(f, {f"{DOWN}.weight_scale_inv": None}), rf"no tensor '{DOWN}.weight_scale_inv'"),
    ("autofp8", lambda f: rewrite(f, {f"{DOWN}.weight_scale": torch.ones(64, 1)}), r"has shape \(64, 1\), fp8 calls"),
    (
        "awq-32",
        lambda f: rewrite(f, {f"{DOWN}.scales": torch.ones(3, 64).double()}),
        "is stored as F64, awq",
    ),
    ("awq-32", left_out, rf"awq \(4 bits\) leaves '{DOWN}' unquantised by its description, but it is stored quantised"),
    ("gptq-act-order", spoilt_groups, rf"'{DOWN}', of gptq \(4 bits\): an input's group \(g_idx\) is not from 0 to 2"),
    ("gptq-act-order", lambda f: rewrite(f, {f"{DOWN}.g_idx": None}), rf"no tensor '{DOWN}.g_idx', which gptq"),
    ("gptq-4-128", cut, "model.safetensors is missing or damaged .* download it again"),
    ("gptq-4-128", lambda f: rewrite(f, {"model.embed_tokens.qweight": torch.ones(3).int()}), "not how gptq"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), SENTENCES, ids=[sentence for *_, sentence in SENTENCES])
def test_what_a_change_is_told_with(
    name: str, change: Callable[[Path], None], sentence: str, source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "model", name)
    change(tmp_path / "model")
    assert re.search(sentence, refusal(tmp_path / "model") or "read")
