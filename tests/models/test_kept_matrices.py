"""Which quantised matrices stay in their few bits: what is promised is what the loader holds, with each packer."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, edit_config, rewrite
from families import build, llama, randomised
from quantized_checkpoints import FORMATS, Format, compressed, gptq, in_mxfp4, packed, quantize
from safetensors.torch import load_file
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models import Decoder, ModelConfig, load_model
from pearl.models.checkpoint import stored_config
from pearl.models.kept_matrices import kept_matrices, packer_on
from pearl.models.weight_size import weight_bytes
from pearl_kernels import KernelSet, LinearWeight, Situation, select
from pearl_kernels.cpu import _core
from pearl_kernels.triton import linear as triton_linear

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}


def in_groups(bits: int, group: int) -> Format:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group"}
    return Format(compressed("pack-quantized", {**weights, "group_size": group}), packed(bits, group))


# By the groups that kernels take: on a CPU whole runs of 8 inputs of 4 bits, or 2 of 8 bits; on a GPU of 32.
GROUPS = {f"{bits} bits, {group}": in_groups(bits, group) for bits, group in ((4, 4), (4, 8), (4, 48), (8, 3), (8, 10))}
ORDERED = FORMATS["gptq-act-order"].settings
# g_idx has the last word: act-order that moved nothing, and that the settings do not speak of; one group for all.
ORDERS = {
    "in order": Format(ORDERED, gptq(4, 32)),
    "not as it says": Format({**ORDERED, "desc_act": False}, gptq(4, 32, shuffled=True)),
    "one group": Format({**ORDERED, "group_size": -1}, gptq(4, -1)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(7)
    randomised(llama(**SHAPE)).save_pretrained(folder)
    return folder


def dtype_of(device: str) -> torch.dtype:
    return torch.float16 if device == "cpu-fp16" else torch.float32


def kernels(device: str) -> KernelSet:
    """What packs matrices on such a device, here for tensors on a CPU."""
    if device == "cpu":
        return select(Situation("cpu", torch.float32))
    plain = select(
        Situation("cpu", dtype_of(device)), {"linear": "reference"}
    )  # in tests Triton's interpreter is first
    if device == "cpu-fp16":
        return plain
    providers = {**plain.providers, "pack_quantized": packer_on("cuda", torch.float32)}
    return replace(plain, pack_quantized=triton_linear.pack_quantized, providers=providers)


def loaded(folder: Path, device: str) -> Decoder:
    return load_model(
        folder, device=torch.device("cpu"), dtype=dtype_of(device), max_model_len=16, kernels=kernels(device)
    )


def held_bytes(owner: Any, device: str) -> int:
    """Of all weights, without what pads the last panel of outputs."""
    if isinstance(owner, tuple):
        return sum(held_bytes(part, device) for part in owner)
    if isinstance(owner, LinearWeight):
        panel = _core.PANEL_COLUMNS if device == "cpu" else 1
        parts = [part.nbytes for part in (owner.data, owner.scale, owner.offset) if part is not None]
        padded = -(-owner.out_features // panel) * panel
        assert sum(parts) * owner.out_features % padded == 0
        return sum(parts) * owner.out_features // padded
    if isinstance(owner, Tensor):
        return owner.nbytes
    own = [getattr(owner, field.name) for field in fields(owner)] if hasattr(owner, "__dataclass_fields__") else []
    return sum(held_bytes(part, device) for part in own)


def assert_promised(folder: Path, device: str) -> int:
    """Returns how many matrices are kept."""
    dtype, kind = dtype_of(device), device.removesuffix("-fp16")
    config = stored_config(folder, ModelConfig.from_pretrained(str(folder), dtype))
    assert weight_bytes(config, dtype, device=kind) == held_bytes(loaded(folder, device).weights, device)
    return len(kept_matrices(config, packer_on(kind, dtype)))


every_device = pytest.mark.parametrize("device", ["cpu", "cpu-fp16", "cuda"])


@every_device
@pytest.mark.parametrize("name", [*FORMATS, *GROUPS, *ORDERS])
def test_of_every_format(name: str, device: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantized_checkpoints.FORMATS", FORMATS | GROUPS | ORDERS)
    quantize(source, tmp_path / "quantized", name)
    keeps = {"cpu": ("4 bits, 8", "4 bits, 48", "8 bits, 10"), "cpu-fp16": tuple(GROUPS), "cuda": ()}[device]
    decoded = name in ("ct-w4a16-actorder", "gptq-act-order", "not as it says") or (name in GROUPS.keys() - {*keeps})
    decoded |= device == "cpu" and ("fp8" in name or name == "modelopt")
    kept = assert_promised(tmp_path / "quantized", device)
    assert kept == (0 if decoded else 14)


@every_device
@pytest.mark.parametrize(("left", "kept"), [("q_proj", 8), ("layers.1.self_attn.v_proj", 11), ("up_proj", 10)])
def test_what_is_merged_but_not_stored_alike(left: str, kept: int, device: str, source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "quantized", "awq-32", ("lm_head", left))
    assert assert_promised(tmp_path / "quantized", device) == kept


@every_device
@pytest.mark.parametrize("left", ["none", "experts.3.up_proj"])
def test_experts_and_routers(left: str, device: str, tmp_path: Path) -> None:
    """Routers are computed in full however they are stored; one plain expert among others makes all of them plain."""
    build("qwen2-moe").save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "quantized", "ct-int8", ("lm_head", left))
    gate_up, down = 2 * 7, 7
    per_layer = 4 + 3 + down + (gate_up if left == "none" else 0)
    assert assert_promised(tmp_path / "quantized", device) == 3 * per_layer


@every_device
def test_experts_in_mxfp4(device: str, tmp_path: Path) -> None:
    """As integers of 8 bits; whatever holds biases and sinks."""
    build("gpt-oss-32").save_pretrained(tmp_path / "source")
    folder = in_mxfp4(tmp_path / "source", tmp_path / "published")
    assert assert_promised(folder, device) == 3 * 3 * 5


def test_groups_that_one_matrix_has_in_another_order(source: Path, tmp_path: Path) -> None:
    """The matrices that it is merged with are decoded with it."""
    folder = tmp_path / "quantized"
    quantize(source, folder, "gptq-4-32-zeros")
    module = "model.layers.1.self_attn.k_proj"
    rewrite(folder, {f"{module}.g_idx": load_file(folder / SINGLE)[f"{module}.g_idx"].flip(0)})
    assert assert_promised(folder, "cpu") == 11
    edit_config(folder, quantization_config={**FORMATS["gptq-4-32-zeros"].settings, "desc_act": True})
    assert assert_promised(folder, "cpu") == 11
    unread = ModelConfig.from_pretrained(str(folder), torch.float32)
    assert not kept_matrices(unread, "cpu")  # settings alone promise nothing of them


def test_offsets_that_are_needless(source: Path, tmp_path: Path) -> None:
    """Are held as promised: what zero points are is not known before they are read."""
    folder = tmp_path / "quantized"
    quantize(source, folder, "gptq-4-32-zeros")
    name = "model.layers.1.self_attn.o_proj.qzeros"
    rewrite(folder, {name: torch.full_like(load_file(folder / SINGLE)[name], 0x77777777)})
    assert assert_promised(folder, "cpu") == 14


@pytest.mark.parametrize("expert", [0, 3])
def test_an_expert_whose_zero_points_are_all_in_the_middle(expert: int, tmp_path: Path) -> None:
    """It needs no offsets, but has them, of 0, beside those of others. Refused where the settings know of none."""
    folder, source = tmp_path / "quantized", tmp_path / "source"
    build("qwen2-moe").save_pretrained(source)
    quantize(source, folder, "gptq-4-32-zeros")
    name = f"model.layers.1.mlp.experts.{expert}.down_proj.qzeros"
    rewrite(folder, {name: torch.full_like(load_file(folder / SINGLE)[name], 0x77777777)})  # 8, stored less 1
    mixture = loaded(folder, "cpu").weights.layers[1].mixture
    assert mixture is not None
    offset = mixture.experts.down.offset
    assert offset is not None
    assert [bool(of_expert.any()) for of_expert in offset] == [index != expert for index in range(7)]
    edit_config(folder, quantization_config={**FORMATS["gptq-4-32-zeros"].settings, "sym": True})
    with pytest.raises(ModelLoadError, match=r"some experts of a layer have zero points and others none.*sym"):
        loaded(folder, "cpu")
