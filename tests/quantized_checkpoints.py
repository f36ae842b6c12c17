"""Checkpoints of every quantisation method, and the plain ones that they mean.

Written here by itself, element by element, as the methods' own documentation and code have it; nothing of ``pearl`` is
used, so that what ``pearl`` reads can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]  # what lies in the file by last name, and the fp32 matrix that it means
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Format:
    """``settings``: quantization_config; ``store``: a matrix ``[M, K]`` in this format."""

    settings: Mapping[str, Any]
    store: Callable[[Tensor], Stored]
    file: str = "config.json"


def quantize(source: Path, folder: Path, name: str, leave: tuple[str, ...] = ("lm_head",)) -> dict[str, Tensor]:
    """Write ``source``'s model to ``folder`` in a format; returns the plain tensors that it means.

    ``leave``: parts of names of matrices that stay plain.
    """
    form = FORMATS[name]
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for tensor_name, tensor in load_file(source / SINGLE).items():
        module, _, last = tensor_name.rpartition(".")
        if tensor.dim() < 2 or "embed" in module or any(part in module for part in leave):
            stored[tensor_name] = meant[tensor_name] = tensor
            continue
        parts, matrix = form.store(tensor.float())
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        meant[f"{module}.{last}"] = matrix
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name != SINGLE:
            (folder / file.name).write_bytes(file.read_bytes())
    describe(folder, form)
    save_file(stored, folder / SINGLE, {"format": "pt"})
    return meant


# As gpt-oss is published.
MXFP4: Mapping[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def random_blocks(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """MXFP4's of matrices ``[..., outputs, inputs]``: bytes of two numbers, and exponents of about 2^-5."""
    generator = torch.Generator().manual_seed(seed)
    *outer, inputs = shape
    blocks = torch.randint(256, (*outer, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(119, 125, (*outer, inputs // 32), dtype=torch.uint8, generator=generator)


def in_mxfp4(source: Path, folder: Path) -> Path:
    """``source``, a gpt-oss, with random numbers in MXFP4 for the matrices of its experts; returns ``folder``."""
    tensors = load_file(source / SINGLE)
    for index, name in enumerate(sorted(tensors)):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensors.pop(name).shape
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_blocks(experts, outputs, inputs, seed=index)
    folder.mkdir()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    describe(folder, Format(MXFP4, lambda matrix: ({}, matrix)))
    return folder


def describe(folder: Path, form: Format) -> None:
    path = folder / form.file
    values = json.loads(path.read_text()) if path.exists() else {}
    key = "quantization_config" if form.file == "config.json" else "quantization"
    path.write_text(json.dumps({**values, key: dict(form.settings)}))


def pack(numbers: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned numbers as int32 words along an axis, padded with zeros; ``order[i]``: which of a word's comes i-th."""
    count = 32 // bits
    numbers = np.moveaxis(numbers.astype(np.uint64), axis, 0)
    words = np.zeros((-(-len(numbers) // count), *numbers.shape[1:]), dtype=np.uint64)
    for word in range(len(words)):
        for place in range(count):
            index = word * count + (place if order is None else order[place])
            if index < len(numbers):
                words[word] |= numbers[index] << np.uint64(bits * place)
    return torch.from_numpy(np.moveaxis(words, 0, axis).astype(np.uint32).view(np.int32).copy())


def round_groups(
    weight: Tensor, bits: int, groups: Tensor, symmetric: bool, dtype: torch.dtype
) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Unsigned integers ``[M, K]``, scales ``[M, G]`` of a dtype and zero points ``[M, G]``; groups: of each input."""
    m, number = weight.shape[0], int(groups.max()) + 1
    most = 2**bits - 1
    integers = np.zeros(tuple(weight.shape), dtype=np.int64)
    scales, zeros = torch.zeros(m, number, dtype=dtype), np.zeros((m, number), dtype=np.int64)
    for group in range(number):
        part = weight[:, groups == group]
        low, high = part.min(1).values, part.max(1).values
        if symmetric:
            scale, zero = torch.maximum(high, -low) / (2 ** (bits - 1) - 0.5), torch.full((m,), 2.0 ** (bits - 1))
        else:
            scale = (high - low) / most
            zero = (-low / scale).round().clamp(0, most)
        scales[:, group] = scale.to(dtype)
        rounded = (part / scales[:, group].float()[:, None] + zero[:, None]).round().clamp(0, most)
        integers[:, (groups == group).numpy()] = rounded.numpy().astype(np.int64)
        zeros[:, group] = zero.numpy().astype(np.int64)
    return integers, scales, zeros


def meaning(integers: np.ndarray, scales: Tensor, zeros: np.ndarray, groups: Tensor) -> Tensor:
    """``(q - z) * s``, input by input."""
    columns = []
    for column in range(integers.shape[1]):
        group = int(groups[column])
        difference = torch.from_numpy(integers[:, column] - zeros[:, group]).float()
        columns.append(difference * scales[:, group].float())
    return torch.stack(columns, 1)


def in_order(inputs: int, group: int) -> Tensor:
    return torch.tensor([k // (inputs if group == -1 else group) for k in range(inputs)])


def gptq(
    bits: int, group: int, symmetric: bool = True, shift: int = 1, shuffled: bool = False
) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        inputs = weight.shape[1]
        groups = in_order(inputs, group)
        if shuffled:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        integers, scales, zeros = round_groups(weight, bits, groups, symmetric, torch.float16)
        stored_zeros = (zeros - shift) & (2**bits - 1)
        parts = {
            "qweight": pack(integers.T, bits, 0),
            "qzeros": pack(stored_zeros.T, bits, 1),
            "scales": scales.T,
            "g_idx": groups.int(),
        }
        return parts, meaning(integers, scales, zeros, groups)

    return store


def awq(group: int) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        groups = in_order(weight.shape[1], group)
        integers, scales, zeros = round_groups(weight, 4, groups, False, torch.float16)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {"qweight": pack(integers.T, 4, 1, order), "qzeros": pack(zeros.T, 4, 1, order), "scales": scales.T}
        return parts, meaning(integers, scales, zeros, groups)

    return store


def packed(bits: int, group: int, symmetric: bool = True, shuffled: bool = False) -> Callable[[Tensor], Stored]:
    """compressed-tensors' pack-quantized."""

    def store(weight: Tensor) -> Stored:
        groups = in_order(weight.shape[1], group)
        if shuffled:
            groups = groups[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))]
        integers, scales, zeros = round_groups(weight, bits, groups, symmetric, torch.bfloat16)
        parts = {
            "weight_packed": pack(integers, bits, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack(zeros, bits, 0)
        if shuffled:
            parts["weight_g_idx"] = groups.int()
        return parts, meaning(integers, scales, zeros, groups)

    return store


def int8(symmetric: bool) -> Callable[[Tensor], Stored]:
    """compressed-tensors' int-quantized, by channel."""

    def store(weight: Tensor) -> Stored:
        groups = in_order(weight.shape[1], -1)
        integers, scales, zeros = round_groups(weight, 8, groups, symmetric, torch.bfloat16)
        parts = {"weight": torch.from_numpy((integers - 128).astype(np.int8)), "weight_scale": scales}
        if not symmetric:
            parts["weight_zero_point"] = torch.from_numpy((zeros - 128).astype(np.int8))
        return parts, meaning(integers, scales, zeros, groups)

    return store


def fp8(
    kind: str, scale_name: str = "weight_scale", block: tuple[int, int] = (128, 128), static: bool = False
) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        m, k = weight.shape
        rows, columns = {"tensor": (m, k), "channel": (1, k), "block": block}[kind]
        scales = torch.zeros(-(-m // rows), -(-k // columns))
        values, meant = torch.zeros(m, k, dtype=torch.float8_e4m3fn), torch.zeros(m, k)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = weight[part].abs().max() / 448
                values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
                meant[part] = values[part].float() * scales[i, j]
        parts = {"weight": values, scale_name: scales.reshape(()) if kind == "tensor" else scales}
        return (parts | {"input_scale": torch.tensor(0.03)} if static else parts), meant

    return store


def compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _integers(bits: int, group: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    strategy = (
        {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    )
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy, **more}


def _gptq(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True,
            "checkpoint_format": "gptq", "lm_head": False, **more}  # fmt: skip


_AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
_FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_TOKEN_FP8 = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
_STATIC_FP8 = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}
_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
FORMATS: dict[str, Format] = {
    "ct-fp8-tensor": Format(
        compressed("float-quantized", {**_FLOAT, "strategy": "tensor"}, _STATIC_FP8), fp8("tensor", static=True)
    ),
    "ct-fp8-channel": Format(
        compressed("float-quantized", {**_FLOAT, "strategy": "channel"}, _TOKEN_FP8), fp8("channel")
    ),
    "ct-fp8-block": Format(
        compressed("float-quantized", {**_FLOAT, "strategy": "block", "block_structure": [64, 96]}),
        fp8("block", block=(64, 96)),
    ),
    "autofp8": Format({"quant_method": "fp8", "activation_scheme": "static"}, fp8("tensor", static=True)),
    "fp8-blocks": Format(_BLOCKS, fp8("block", "weight_scale_inv")),
    "modelopt": Format(
        {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        fp8("tensor", static=True),
        "hf_quant_config.json",
    ),
    "ct-int8": Format(
        compressed("int-quantized", _integers(8, -1), {"num_bits": 8, "type": "int", "dynamic": True}), int8(True)
    ),
    "ct-int8-zeros": Format(compressed("int-quantized", _integers(8, -1, symmetric=False)), int8(False)),
    "ct-w8a16": Format(compressed("pack-quantized", _integers(8, -1)), packed(8, -1)),
    "ct-w8a16-64": Format(compressed("pack-quantized", _integers(8, 64)), packed(8, 64)),
    "ct-w4a16": Format(compressed("pack-quantized", _integers(4, -1)), packed(4, -1)),
    "ct-w4a16-128": Format(compressed("pack-quantized", _integers(4, 128)), packed(4, 128)),
    "ct-w4a16-zeros-32": Format(compressed("pack-quantized", _integers(4, 32, False)), packed(4, 32, False)),
    "ct-w4a16-actorder": Format(
        compressed("pack-quantized", _integers(4, 64, actorder="group")), packed(4, 64, shuffled=True)
    ),
    "awq-32": Format({**_AWQ, "group_size": 32}, awq(32)),
    "awq-128": Format({**_AWQ, "group_size": 128}, awq(128)),
    "gptq-4-128": Format(_gptq(4, 128), gptq(4, 128)),
    "gptq-4-32-zeros": Format(_gptq(4, 32, sym=False), gptq(4, 32, False)),
    "gptq-4-all": Format(_gptq(4, -1), gptq(4, -1)),
    "gptq-8-64": Format(_gptq(8, 64), gptq(8, 64)),
    "gptq-v2-zeros": Format(_gptq(4, 64, sym=False, checkpoint_format="gptq_v2"), gptq(4, 64, False, shift=0)),
    "gptq-act-order": Format(_gptq(4, 32, desc_act=True), gptq(4, 32, shuffled=True)),
}  # fmt: skip
