"""What of a GGUF file cannot be loaded ends in a sentence that names the field or the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="writes files with the package gguf")

from families import build, load
from gguf_files import GgufFile, gguf_of
from gguf_support import in_parts, written

from pearl.errors import ModelLoadError, UnsupportedModelError


def f32(*shape: int) -> tuple[np.ndarray[Any, Any], str]:
    return np.ones(shape, np.float32), "F32"


HEADS = ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count")
UP, Q = "blk.1.ffn_up.weight", "blk.0.attn_q.weight"
# (family, fields, tensors, the sentence)
REFUSED: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any], str]] = {
    "no layers": ("llama", {"llama.block_count": None}, {}, r"the metadata has no llama\.block_count"),
    "a layer less": ("llama", {"llama.block_count": 2}, {}, r"holds 'blk\.2\.\w+\.weight' .*with this metadata"),
    "a layer more": ("llama", {"llama.block_count": 4}, {}, r"has no tensor 'blk\.3\..*which metadata calls for"),
    "endless layers": (
        "llama",
        {"llama.block_count": 2_000_000},
        {},
        r"llama\.block_count must be an integer from 1 to",
    ),
    "a text for a number": ("llama", {"llama.block_count": "3"}, {}, r"llama\.block_count must be an integer.*not '3'"),
    "layers that differ": (
        "llama",
        {"llama.feed_forward_length": [80, 80, 64]},
        {},
        r"llama\.feed_forward_length must be an integer.*a list of 3; layers that differ are not supported",
    ),
    "another width": (
        "qwen3",
        {"qwen3.embedding_length": 96},
        {},
        r"has shape \(131, 48\), metadata calls for \(131, 96\)",
    ),
    "uneven heads": (
        "llama",
        {"llama.attention.head_count_kv": 4},
        {},
        r"llama\.attention\.head_count=6 is not a multiple of llama\.attention\.head_count_kv=4",
    ),
    "odd heads": ("llama", dict.fromkeys(HEADS, 7), {}, r"even rotary dimension.*llama\.attention\.key_length"),
    "other values": (
        "llama",
        {"llama.attention.value_length": 16},
        {},
        r"llama\.attention\.value_length is 16: only 8",
    ),
    "half a rotation": ("llama", {"llama.rope.dimension_count": 4}, {}, r"llama\.rope\.dimension_count is 4: only 8"),
    "experts": ("llama", {"llama.expert_count": 8}, {}, r"llama\.expert_count is 8: only 0.*experts"),
    "no finite epsilon": (
        "llama",
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        {},
        r"llama\.attention\.layer_norm_rms_epsilon must be a finite floating-point number, not nan",
    ),
    "no base to turn by": (
        "llama",
        {"llama.rope.freq_base": 0.0},
        {},
        r"llama\.rope\.freq_base of llama\.rope\.scaling must",
    ),
    "scaling to come": (
        "llama",
        {"llama.rope.scaling.type": "longrope"},
        {},
        r"rope\.scaling\.type is 'longrope': known",
    ),
    "another yarn": (
        "llama-yarn",
        {"llama.rope.scaling.yarn_ext_factor": 0.5},
        {},
        r"yarn_ext_factor is 0\.5: only 1\.0",
    ),
    "a window of Qwen's": (
        "qwen2",
        {"qwen2.attention.sliding_window": 9},
        {},
        r"the metadata has qwen2\.attention\.sliding_window, of which nothing is known for qwen2",
    ),
    "what is not known": (
        "llama",
        {"llama.logit_scale": 0.5},
        {},
        r"the metadata has llama\.logit_scale, of which nothing",
    ),
    "fewer ids": (
        "llama",
        {"llama.vocab_size": 130},
        {},
        r"'token_embd\.weight' has shape \(131, 48\), metadata calls",
    ),
    "no embedding": ("llama", {}, {"token_embd.weight": None}, r"it has no tensor 'token_embd\.weight'"),
    "no matrix": ("llama", {}, {UP: None}, rf"has no tensor '{UP}', which metadata calls for"),
    "a turned matrix": ("llama", {}, {UP: f32(48, 80)}, rf"'{UP}' has shape \(48, 80\), metadata calls for \(80, 48\)"),
    "a row too many": ("llama", {}, {Q: f32(49, 48)}, rf"'{Q}' has shape \(49, 48\)"),
    "a bias too many": ("qwen2", {}, {"blk.1.ffn_up.bias": f32(80)}, r"holds 'blk\.1\.ffn_up\.bias'.*makes no use"),
    "a norm too many": ("llama", {}, {"blk.0.attn_q_norm.weight": f32(8)}, r"holds 'blk\.0\.attn_q_norm\.weight'"),
    "no norm of Qwen's": ("llama", {}, {"blk.0.post_ffw_norm.weight": f32(48)}, r"holds tensor 'blk\.0\.post_ffw_norm"),
    "sinks": ("llama", {}, {"blk.0.attn_sinks.weight": f32(6)}, r"holds tensor 'blk\.0\.attn_sinks\.weight'"),
    "integers": ("llama", {}, {UP: (np.ones((80, 48), np.int32), "I32")}, rf"'{UP}' is stored as I32, which cannot"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_named(case: str, tmp_path: Path) -> None:
    family, fields, tensors, message = REFUSED[case]
    file, _ = written(family, tmp_path)
    file.changed(fields, **tensors).write(tmp_path / "changed.gguf")
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message) as error:
        load(tmp_path / "changed.gguf")
    assert "changed.gguf" in str(error.value)


def test_factors_of_lanes_that_there_are_not(tmp_path: Path) -> None:
    file, _ = written("llama-llama3", tmp_path)
    name = "rope_freqs.weight"
    changes: list[tuple[Mapping[str, Any], Any, str]] = [
        ({}, f32(5), rf"tensor '{name}' must be \(4,\) numbers, not \(5,\)"),
        ({}, (-np.ones(4, np.float32), "F32"), rf"tensor '{name}' must be 4 numbers above 0"),
        ({"llama.rope.scaling.factor": 2.0}, f32(4), rf"it has '{name}' and linear scaling of RoPE too"),
    ]
    for fields, tensor, message in changes:
        file.changed(fields, **{name: tensor}).write(tmp_path / "changed.gguf")
        with pytest.raises((ModelLoadError, UnsupportedModelError), match=message):
            load(tmp_path / "changed.gguf")


def test_no_architecture(tmp_path: Path) -> None:
    written("llama", tmp_path)
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "changed.gguf").write_bytes(content.replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(ModelLoadError, match=r"changed\.gguf: the metadata has no general\.architecture"):
        load(tmp_path / "changed.gguf")


def test_another_architecture(tmp_path: Path) -> None:
    file, _ = written("llama", tmp_path)
    GgufFile("mamba", file.fields, file.tensors).write(tmp_path / "changed.gguf")
    with pytest.raises(
        UnsupportedModelError, match=r"general\.architecture is 'mamba', which is not supported as GGUF"
    ):
        load(tmp_path / "changed.gguf")


def test_parts_that_are_not_those_of_one_model(tmp_path: Path) -> None:
    file, _ = written("llama", tmp_path)
    first, second, third = in_parts(file, tmp_path, 3)
    with pytest.raises(
        ModelLoadError, match=r"00002-of-00003\.gguf is a later part of a model; give the first, m-00001"
    ):
        load(second)
    first.rename(tmp_path / "model.gguf")
    with pytest.raises(ModelLoadError, match=r"the first of 3 parts \(split\.count\), which are found by their names"):
        load(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").rename(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelLoadError, match=r"00002-of-00003\.gguf calls itself part 2 of 3"):
        load(first)
    second.unlink()
    with pytest.raises(ModelLoadError, match=r"m-00002-of-00003\.gguf is missing, one of the model's 3 parts"):
        load(first)


def test_tensors_that_no_part_holds_or_two(tmp_path: Path) -> None:
    file, _ = written("llama", tmp_path)
    paths = in_parts(file, tmp_path, 2)
    other, _ = gguf_of(build("llama"))
    for change, message in (
        (None, r"hold \d+ tensors, not \d+ \(split\.tensors\.count\)"),
        ("twice", "as an earlier part"),
    ):
        part = other.changed({"split.no": np.uint16(1), "split.count": np.uint16(2)})
        part.tensors = {} if change is None else {"token_embd.weight": file.tensors["token_embd.weight"]}
        part.write(paths[1])
        with pytest.raises(ModelLoadError, match=message):
            load(paths[0])
