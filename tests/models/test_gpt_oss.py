"""gpt-oss's checkpoints: experts in interleaved stacks, plain and in MXFP4; against transformers' own code."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, assert_as_transformers, assert_logits, edit_config, rewrite, save, write
from families import build, load
from quantized_checkpoints import in_mxfp4, random_blocks
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models import ModelConfig
from pearl.models.checkpoint import stored_config
from pearl.models.model_features import features
from pearl.models.mxfp4_storage import Mxfp4Storage
from pearl.models.stored_experts import each_expert
from pearl_kernels.reference import dequantize

EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture
def published(tmp_path: Path) -> Path:
    build("gpt-oss-32").save_pretrained(tmp_path / "source")
    return in_mxfp4(tmp_path / "source", tmp_path / "published")


def decoded(folder: Path, plain: Path) -> Path:
    """The checkpoint that transformers' function makes of it."""
    plain.mkdir()
    tensors = load_file(folder / SINGLE)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        stack, blocks = name.removesuffix("_blocks"), tensors.pop(name)
        tensors[stack] = convert_moe_packed_tensors(blocks, tensors.pop(f"{stack}_scales"), dtype=torch.float32)
    write(plain, tensors)
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_config(plain, quantization_config=None)
    return plain


def test_mxfp4_means_what_transformers_decodes() -> None:
    blocks, scales = random_blocks(3, 7, 96)
    scales[0, :, 0] = torch.arange(1, 8) * 30  # far smaller and larger ones
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    for index in range(3):
        tensors = {"weight_blocks": blocks[index], "weight_scales": scales[index]}
        assert torch.equal(dequantize(Mxfp4Storage().read(tensors, 7, 96)), wanted[index])
    assert len(wanted[1].unique()) > 30
    assert torch.equal(wanted.bfloat16().float(), wanted)  # nothing is rounded in bf16


def test_a_published_checkpoint(published: Path, tmp_path: Path) -> None:
    """Logits are those of transformers' class, which decodes it itself, and of the decoded one."""
    assert_as_transformers(published, decoded(published, tmp_path / "plain"))
    itself = {"dtype": torch.float32, "quantization_config": Mxfp4Config(dequantize=True)}
    assert_logits(published, GptOssForCausalLM.from_pretrained(published, **itself).eval())
    model = load(published)
    for layer in model.weights.layers:
        assert layer.mixture is not None
        assert layer.mixture.experts.gate_up.bits == layer.mixture.experts.down.bits == 8
    stored = stored_config(published, model.config)
    assert stored.quantization is not None
    assert len(stored.quantization.matrices or ()) == 3 * 5 * 3


def test_what_is_recognised(published: Path) -> None:
    config = ModelConfig.from_pretrained(str(published))
    assert config.architecture == "GptOssForCausalLM"
    told = "; ".join(features(config))
    for feature in ("attention sinks", "a window of 9 tokens in 2 of 3 layers", "biases: routers, experts",
                    "gates and ups clamped at 1, gain 1.702", "2 of 5 experts of width 32", "RoPE yarn"):  # fmt: skip
        assert feature in told


def test_a_stack_is_read_in_parts(tmp_path: Path) -> None:
    """Of rows and inputs: what ranks and merged matrices ask for."""

    class Stored:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def get_shape(self) -> list[int]:
            return list(self.tensor.shape)

        def get_dtype(self) -> str:
            return "F32"

        def __getitem__(self, part: Any) -> Tensor:
            spans = part if isinstance(part, tuple) else (part,)
            assert all(span in (..., slice(None)) or span.step is None for span in spans)  # as files take them
            return self.tensor[part]

    tensor = torch.randn(2, 6, 10)
    for interleaved, gates, ups in ((True, tensor[1, :, ::2].T, tensor[1, :, 1::2].T), (False, *tensor[1].chunk(2))):
        parts = dict(each_expert("model.layers.0.mlp.experts.gate_up_proj", Stored(tensor), interleaved))
        for name, whole in (("gate_proj", gates), ("up_proj", ups)):
            part = parts[f"model.layers.0.mlp.experts.1.{name}.weight"]
            assert tuple(part.get_shape()) == whole.shape
            assert torch.equal(part[...], whole)
            assert torch.equal(part[1:3, 2:4], whole[1:3, 2:4])
            assert torch.equal(part[slice(0, 2)], whole[:2])


Change = Callable[[Path, Mapping[str, Tensor]], None]
STACK = f"{EXPERTS}gate_up_proj"


def changed(name: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    return lambda folder, tensors: rewrite(folder, {name: change(tensors[name])})


REFUSED: dict[str, tuple[Change, str]] = {
    "no scales": (changed(f"{STACK}_scales", lambda _: None), "weight_scales', which mxfp4 stores"),
    "no blocks": (changed(f"{EXPERTS}down_proj_blocks", lambda _: None), "weight_blocks', which mxfp4 stores"),
    "an expert less": (changed(f"{STACK}_blocks", lambda t: t[:-1]), "weight_blocks', which mxfp4 stores"),
    "a row less": (changed(f"{STACK}_blocks", lambda t: t[:, :-1]), r"has shape \(31, 2, 16\), mxfp4 calls"),
    "a group less": (changed(f"{STACK}_scales", lambda t: t[..., :-1]), r"has shape \(32, 1\), mxfp4 calls"),
    "wide scales": (changed(f"{STACK}_scales", lambda t: t.int()), "is stored as I32, mxfp4 calls for U8"),
    "flat": (changed(f"{STACK}_blocks", lambda t: t.flatten(1)), "has no tensor"),
    "no biases": (changed(f"{STACK}_bias", lambda t: t[:, :-2]), r"has shape \(31,\)"),
    "sinks of fewer heads": (changed("model.layers.0.self_attn.sinks", lambda t: t[:-1]), r"has shape \(5,\)"),
    "no sinks": (changed("model.layers.0.self_attn.sinks", lambda _: None), "has no tensor '.*self_attn.sinks'"),
    "no bias of a router": (changed("model.layers.0.mlp.router.bias", lambda _: None), "no tensor '.*mlp.gate.bias'"),
    "no settings": (lambda folder, _: edit_config(folder, quantization_config=None), "belongs to a quantised matrix"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_changed_one_is_refused_with_a_sentence(case: str, published: Path) -> None:
    change, sentence = REFUSED[case]
    change(published, load_file(published / SINGLE))
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=sentence):
        load(published)


def test_stacks_that_lie_otherwise_are_refused(tmp_path: Path) -> None:
    tensors = save("gpt-oss", tmp_path)
    name = f"{EXPERTS}gate_up_proj"
    for wrong in (tensors[name].transpose(1, 2), tensors[name][..., :-1], tensors[name][:, :-1]):
        write(tmp_path, {**tensors, name: wrong})
        with pytest.raises(ModelLoadError, match="has shape"):
            load(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_other_numbers_are_another_model(published: Path, tmp_path: Path) -> None:
    """Shuffled bytes of one tensor; and a tensor of biases that is missing is one of zeros, as for transformers."""
    rng = random.Random(5)
    tensors = load_file(published / SINGLE)
    for number, name in enumerate((f"{STACK}_blocks", f"{EXPERTS}down_proj_scales", f"{EXPERTS}down_proj_bias")):
        flat = tensors[name].flatten()
        order = rng.sample(range(len(flat)), len(flat))
        rewrite(published, {name: flat[order].view(tensors[name].shape) if number < 2 else None})
        assert_as_transformers(published, decoded(published, tmp_path / str(number)))
