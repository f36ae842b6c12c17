"""Quantised checkpoints of every method: logits are those of transformers' class with the numbers that are meant."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from checkpoints import SINGLE, assert_as_transformers, edit_config, rewrite, write
from families import build, llama, load, randomised
from quantized_checkpoints import FORMATS, quantize
from safetensors.torch import load_file
from torch import Tensor

from pearl.models import Decoder, ModelConfig, load_model
from pearl.models.checkpoint import Checkpoint, stored_config
from pearl.models.quantization_methods import method_of
from pearl.models.sharding import shard
from pearl.models.weight_size import weight_bytes
from pearl_kernels import LinearWeight, QuantizedMatrix, Situation, select
from pearl_kernels.reference import dequantize
from pearl_kernels.triton import interpreting

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
KEPT = {  # bits that a decoder keeps of a layer's matrices on a CPU; 0: they are decoded
    name: 0 if "fp8" in name or name == "modelopt" or "order" in name else 8 if "8" in name.replace("128", "") else 4
    for name in FORMATS
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(7)
    randomised(llama(**SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(source: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A checkpoint in a format, and the plain one that it means."""

    def make(name: str, leave: tuple[str, ...] = ("lm_head",)) -> tuple[Path, Path]:
        folder, plain = tmp_path / name, tmp_path / f"{name}-plain"
        meant = quantize(source, folder, name, leave)
        plain.mkdir()
        (plain / "config.json").write_text((source / "config.json").read_text())
        write(plain, meant)
        return folder, plain

    return make


def kept_bits(decoder: Decoder) -> set[int]:
    found = set()
    for layer in decoder.weights.layers:
        for weight in (layer.qkv, layer.output, layer.gate_up, layer.down):
            found.add(weight.bits if weight.group else 0)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_means_its_numbers(name: str, quantized: Callable[..., tuple[Path, Path]]) -> None:
    folder, plain = quantized(name)
    assert_as_transformers(folder, plain)
    assert kept_bits(load(folder)) == {KEPT[name]}


@pytest.mark.parametrize(
    ("family", "form"),
    [("qwen2", "gptq-4-all"), ("gemma2", "ct-int8-zeros"), ("olmo2", "ct-w4a16"), ("phi3-window", "ct-int8"),
     ("phi3-partial", "gptq-4-all")],
)  # fmt: skip
def test_other_families(family: str, form: str, tmp_path: Path) -> None:
    """Merged projections as they are stored, rotated lanes in another order, biases, tied heads."""
    source, plain = tmp_path / "source", tmp_path / "plain"
    build(family).save_pretrained(source)
    meant = quantize(source, tmp_path / "quantized", form)
    plain.mkdir()
    (plain / "config.json").write_text((source / "config.json").read_text())
    write(plain, meant)
    assert_as_transformers(tmp_path / "quantized", plain)
    assert kept_bits(load(tmp_path / "quantized")) == {KEPT[form]}


def test_experts(tmp_path: Path) -> None:
    """Each expert's matrices are kept, on GPUs too."""
    source, plain, folder = tmp_path / "source", tmp_path / "plain", tmp_path / "quantized"
    build("qwen3-moe").save_pretrained(source)
    routers = [f"layers.{index}.mlp.gate" for index in range(9)]
    meant = quantize(source, folder, "ct-int8", ("lm_head", *routers))
    edit_config(folder, quantization_config={**FORMATS["ct-int8"].settings, "ignore": ["lm_head", "re:.*mlp.gate$"]})
    plain.mkdir()
    (plain / "config.json").write_text((source / "config.json").read_text())
    write(plain, meant)
    assert_as_transformers(folder, plain)
    mixtures = [layer.mixture for layer in load(folder).weights.layers]
    assert {matrix.bits for m in mixtures if m for matrix in (m.experts.gate_up, m.experts.down)} == {8}
    stored = stored_config(folder, ModelConfig.from_pretrained(str(folder)))
    on_cpu, on_gpu = (weight_bytes(stored, torch.float32, device=device) for device in ("cpu", "cuda"))
    experts = sum(t.numel() for n, t in meant.items() if ".experts." in n)
    everything = sum(4 * t.numel() for t in meant.values())
    assert on_gpu == on_cpu < everything - 2.5 * experts


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_of_few_outputs(name: str) -> None:
    """A router's, or a gate's: fewer outputs than a word holds numbers."""
    form = FORMATS[name]
    storage = method_of({"quant_method": "modelopt", **form.settings}, "here").storage
    for outputs in (1, 7, 8, 9):
        parts, meant = form.store(torch.randn(outputs, 128, generator=torch.Generator().manual_seed(outputs)))
        read = storage.read(parts, outputs, 128)
        assert torch.equal(dequantize(read) if isinstance(read, QuantizedMatrix) else read, meant)


# Triton's kernels take CPU tensors in the interpreter alone.
@pytest.mark.parametrize("provider", ["reference", *(["triton"] if interpreting() else [])])
@pytest.mark.parametrize("name", ["gptq-4-32-zeros", "fp8-blocks", "ct-int8"])
def test_with_the_other_providers(name: str, provider: str, quantized: Callable[..., tuple[Path, Path]]) -> None:
    """Which keep fp8 too, as it is."""
    folder, plain = quantized(name)
    assert_as_transformers(folder, plain, {"linear": provider})
    assert kept_bits(load(folder, prefer={"linear": provider})) == {4 if "4" in name else 8}


@pytest.mark.parametrize("name", ["gptq-4-32-zeros", "ct-w4a16-128", "fp8-blocks"])
def test_some_matrices_plain_and_a_quantised_head(name: str, quantized: Callable[..., tuple[Path, Path]]) -> None:
    """Projections that are merged but not stored alike are decoded; the head may be quantised as well."""
    folder, plain = quantized(name, ("q_proj", "layers.1.mlp"))
    settings = {"lm_head": True} if name.startswith("gptq") else {"ignore": []}
    edit_config(folder, quantization_config={**FORMATS[name].settings, **settings})
    assert_as_transformers(folder, plain)
    decoder = load(folder)
    kept = 0 if "fp8" in name else 4
    layers, head = decoder.weights.layers, decoder.weights.head
    weights = layers[0].qkv, layers[0].gate_up, layers[1].down, head
    assert [weight.bits if weight.group else 0 for weight in weights] == [0, kept, 0, kept]


def test_zero_points_beside_none(quantized: Callable[..., tuple[Path, Path]]) -> None:
    """One of three merged projections has no offset: the others' must not become its own."""
    folder, plain = quantized("gptq-4-128")
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    stored, meant = load_file(folder / SINGLE), load_file(plain / SINGLE)
    for module in (q, k):
        zeros = stored[f"{module}.qzeros"]
        moved = zeros + 0x11111111 * (1 if module == q else 2)  # each nibble, 7, becomes 8 or 9
        scale = stored[f"{module}.scales"].float().T.repeat_interleave(128, 1)
        rewrite(folder, {f"{module}.qzeros": moved})
        rewrite(plain, {f"{module}.weight": meant[f"{module}.weight"] - (1 if module == q else 2) * scale})
    assert_as_transformers(folder, plain)
    assert load(folder).weights.layers[0].qkv.offset is not None
    assert load(folder).weights.layers[1].qkv.offset is None


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("ct-") and "order" not in name])
def test_as_the_package_of_compressed_tensors_reads_it(name: str, quantized: Callable[..., tuple[Path, Path]]) -> None:
    package = pytest.importorskip("compressed_tensors", reason="compares with the format's own package")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert package
    folder, _ = quantized(name)
    scheme = QuantizationConfig.model_validate(FORMATS[name].settings).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(FORMATS[name].settings["format"])
    stored = load_file(folder / SINGLE)
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, ModelConfig.from_pretrained(str(folder)), stack)
        for module in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
            parts = {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(module)}
            parts["weight_scale"] = parts["weight_scale"].float()
            theirs = compressor.decompress(parts, scheme)["weight"].float()
            ours = checkpoint.read(f"{module}.weight")
            assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_what_is_left_out_is_told(
    quantized: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    for name, wanted in [
        ("modelopt", ["activations were to be quantised to fp8", "scales of its KV cache are not used"]),
        ("ct-int8", ["activations were to be quantised to int8"]),
        ("gptq-8-64", []),
    ]:
        folder, _ = quantized(name)
        caplog.clear()
        load(folder)
        told = [record.getMessage() for record in caplog.records if record.name == "pearl.models.loader"]
        assert len(told) == len(wanted)
        for message, part in zip(told, wanted, strict=True):
            assert part in message
            assert str(folder) in message


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["awq-32", "ct-w8a16-64", "autofp8", "gptq-act-order"])
def test_a_rank_decodes_its_part(name: str, ranks: int, quantized: Callable[..., tuple[Path, Path]]) -> None:
    folder, plain = quantized(name)
    for rank in range(ranks):
        ours, meant = (part_of(path, rank, ranks) for path in (folder, plain))
        for one, other in zip(ours.weights.layers, meant.weights.layers, strict=True):
            for field in ("qkv", "output", "gate_up", "down"):
                assert torch.equal(getattr(one, field).data, getattr(other, field).data)


def part_of(path: Path, rank: int, ranks: int) -> Decoder:
    kernels = select(Situation("cpu", torch.float32))
    sharding = shard(ModelConfig.from_pretrained(str(path)), rank, ranks)
    return load_model(
        path, device=torch.device("cpu"), dtype=torch.float32, max_model_len=16, kernels=kernels, sharding=sharding
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ct-w4a16-128", "awq-32", "gptq-8-64", "ct-fp8-channel", "gptq-act-order"])
def test_the_bytes_that_are_promised_are_held(
    name: str, dtype: torch.dtype, quantized: Callable[..., tuple[Path, Path]]
) -> None:
    folder, _ = quantized(name, ("lm_head", "up_proj") if dtype == torch.float32 else ("lm_head",))
    config = ModelConfig.from_pretrained(str(folder), dtype)
    before = weight_bytes(config, dtype, device="cpu")
    found = stored_config(folder, config)
    held = 0
    weights = load(folder, dtype).weights
    for owner in (weights, *weights.layers):
        for field in fields(owner):
            value = getattr(owner, field.name)
            if isinstance(value, Tensor):
                held += value.nbytes
            elif isinstance(value, LinearWeight):
                panels = -(-value.out_features // 48) * 48
                tensors = (value.data, value.scale, value.offset)
                held += sum(t.nbytes for t in tensors if t is not None) * value.out_features // panels
    promised = weight_bytes(found, dtype, device="cpu")
    if dtype == torch.float32:  # gate and up, one of them plain, are merged and so decoded: promised is a little less
        assert before < promised <= held if KEPT[name] else before == promised == held
    else:
        assert before == promised == held
    saved = weight_bytes(replace(config, quantization=None), dtype) - weight_bytes(config, dtype, device="cuda")
    assert (saved > 0) == (name != "gptq-act-order")
    assert weight_bytes(config, dtype, 0, 2) == weight_bytes(replace(config, quantization=None), dtype, 0, 2)
