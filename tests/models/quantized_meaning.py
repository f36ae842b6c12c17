"""What the tensors of a quantised folder mean, decoded number by number: a judge that shares nothing with ``pearl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def meant_tensors(folder: Path) -> dict[str, Tensor]:
    """The plain tensors. What contradicts itself may raise anything."""
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if settings is None:
        settings = {
            **json.loads((folder / "hf_quant_config.json").read_text())["quantization"],
            "quant_method": "modelopt",
        }
    stored = load_file(folder / "model.safetensors")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = tensor
    meant: dict[str, Tensor] = {}
    for module, parts in modules.items():
        if set(parts) <= {"weight", "bias"} and all(part.is_floating_point() for part in parts.values()):
            meant |= {f"{module}.{last}": part for last, part in parts.items()}
        else:
            meant[f"{module}.weight"] = _matrix(settings, parts)
    return meant


def _matrix(settings: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    method = settings["quant_method"]
    if method == "gptq":
        return _gptq(settings, parts)
    if method == "awq":
        return _awq(settings, parts)
    if method == "compressed-tensors" and "weight_packed" in parts:
        return _packed(settings, parts)
    scale = next(part for last, part in parts.items() if last.startswith("weight_scale")).float()
    weight = parts["weight"].float()
    if "weight_zero_point" in parts:
        weight = weight - parts["weight_zero_point"].float()
    block = settings.get("weight_block_size")
    for group in settings.get("config_groups", {}).values():
        block = group["weights"].get("block_structure")
    if block is not None and scale.dim() == 2:
        scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    return weight * scale.reshape(-1, 1) if scale.dim() == 1 else weight * scale


def _numbers(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Along the last dimension."""
    count = 32 // bits
    columns = [(words.long() >> bits * place) & (2**bits - 1) for place in range(count)]
    by_column = columns if order is None else [columns[order.index(i)] for i in range(count)]
    return torch.stack(by_column, -1).flatten(-2)


def _gptq(settings: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    bits = settings["bits"]
    integers = _numbers(parts["qweight"].T, bits).T  # [K, M]
    zeros = _numbers(parts["qzeros"], bits)
    if settings["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) % 2**bits
    rows = []
    size = settings["group_size"] if settings["group_size"] > 0 else integers.shape[0]
    for k in range(integers.shape[0]):
        group = int(parts["g_idx"][k]) if "g_idx" in parts else k // size
        rows.append((integers[k] - zeros[group]).float() * parts["scales"][group].float())
    return torch.stack(rows).T


def _awq(settings: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    integers, zeros = _numbers(parts["qweight"], 4, order), _numbers(parts["qzeros"], 4, order)
    size = settings["group_size"] if settings["group_size"] > 0 else integers.shape[0]
    rows = [
        (integers[k] - zeros[k // size]).float() * parts["scales"][k // size].float() for k in range(integers.shape[0])
    ]
    return torch.stack(rows).T


def _packed(settings: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    (group,) = settings["config_groups"].values()
    bits, size = group["weights"]["num_bits"], group["weights"].get("group_size") or -1
    outputs, inputs = parts["weight_shape"].tolist()
    integers = _numbers(parts["weight_packed"], bits)[:, :inputs] - 2 ** (bits - 1)
    scale = parts["weight_scale"].float().reshape(outputs, -1)
    columns = []
    for k in range(inputs):
        index = int(parts["weight_g_idx"][k]) if "weight_g_idx" in parts else 0 if size < 0 else k // size
        zero = torch.zeros(outputs)
        if "weight_zero_point" in parts:
            zero = (_numbers(parts["weight_zero_point"].T, bits).T[:outputs, index] - 2 ** (bits - 1)).float()
        columns.append((integers[:, k].float() - zero) * scale[:, index])
    return torch.stack(columns, 1)
