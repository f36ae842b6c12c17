"""GGUF files against transformers' classes with the same numbers: the same logits, or a sentence that says why not."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="writes files with the package gguf")

from checkpoints import assert_logits
from families import CONTEXT, SHAPE, build, load, randomised
from gguf_files import GgufFile, gguf_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_rope_utils

from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.models import ModelConfig
from pearl.models.gguf.names import TensorNames
from pearl.models.gguf.parts import part_names

FAMILIES = [
    "llama", "llama-tied", "llama-biases", "llama-wide-heads", "llama-one-kv-head", "llama-left-over-window",
    "llama-linear", "llama-yarn", "llama-llama3", "mistral-window", "mistral-full", "qwen2", "qwen3",
]  # fmt: skip


def written(family: str, folder: Path) -> tuple[GgufFile, PreTrainedModel]:
    file, judge = gguf_of(build(family))
    file.write(folder / "model.gguf")
    return file, judge


def gemma(model_type: str, **changes: Any) -> PreTrainedModel:
    """With the numbers that are no fields of a file as llama.cpp takes them."""
    shape = {
        **SHAPE,
        "head_dim": 16,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        **changes,
    }
    return randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)))


def gemma3(**changes: Any) -> PreTrainedModel:
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 777.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 55.0}}  # fmt: skip
    return gemma("gemma3_text", rope_parameters=ropes, **changes)


GEMMAS = {
    "gemma": lambda: build("gemma"),
    "gemma2": lambda: gemma("gemma2", attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
    "gemma2-27b": lambda: gemma("gemma2", num_hidden_layers=46, query_pre_attn_scalar=8),
    "gemma3": gemma3,
    "gemma3-cap": lambda: gemma3(final_logit_softcapping=5.0),
    "gemma3-27b": lambda: gemma3(num_hidden_layers=62, query_pre_attn_scalar=8),
}


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma_logits(name: str, tmp_path: Path) -> None:
    file, judge = gguf_of(GEMMAS[name]())
    file.write(tmp_path / "model.gguf")
    assert_logits(tmp_path / "model.gguf", judge)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, tmp_path: Path) -> None:
    _, judge = written(family, tmp_path)
    assert_logits(tmp_path / "model.gguf", judge)


def with_config(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The same weights under another configuration."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    changed = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    changed.load_state_dict(model.state_dict())
    return changed


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Fields that change what is computed, or nothing: to the same as transformers' with the configuration changed.
MEANT: dict[str, tuple[str, Mapping[str, Any], dict[str, Any]]] = {
    "another base": ("llama", {"llama.rope.freq_base": 777.0}, {"rope_parameters": {**ROPE, "rope_theta": 777.0}}),
    "no base": ("llama", {"llama.rope.freq_base": None}, {"rope_parameters": ROPE}),
    "another epsilon": ("llama", {"llama.attention.layer_norm_rms_epsilon": 0.25}, {"rms_norm_eps": 0.25}),
    "an old linear factor": (
        "llama",
        {"llama.rope.scale_linear": 3.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "a factor without a type": (
        "qwen3",
        {"qwen3.rope.scaling.factor": 3.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "a factor that is off": (
        "llama",
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 3.0},
        {},
    ),
    "yarn's ramp": (
        "llama-yarn",
        {"llama.rope.scaling.yarn_beta_fast": 8.0, "llama.rope.scaling.yarn_beta_slow": 2.0},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
            }
        },
    ),
    "heads that follow from the width": (
        "llama",
        {f"llama.{name}": None for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")},
        {},
    ),
    "the usual values": (
        "llama",
        {"llama.vocab_size": 131, "llama.expert_count": 0, "llama.rope.scaling.attn_factor": 1.0},
        {},
    ),
    "what says nothing of the model": (
        "qwen2",
        {
            "general.name": "x",
            "general.file_type": 7,
            "quantize.imatrix.file": "y",
            "qwen2.rope.scaling.finetuned": True,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", MEANT)
def test_what_a_field_means(case: str, tmp_path: Path) -> None:
    family, fields, config = MEANT[case]
    file, judge = written(family, tmp_path)
    file.changed(fields).write(tmp_path / "changed.gguf")
    assert_logits(tmp_path / "changed.gguf", with_config(judge, **config) if config else judge)


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


def test_factors_of_lanes_are_nothing_that_transformers_warns_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have users of any Llama 3 file set a field that no GGUF file has."""
    warnings: list[str] = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(modeling_rope_utils.logger, name, lambda text, *_: warnings.append(text))
    written("llama-llama3", tmp_path)
    assert ModelConfig.from_pretrained(str(tmp_path / "model.gguf")).rope["rope_type"] == "longrope"
    assert not warnings


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


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (["F32"], torch.float32),
        (["F16"], torch.float16),
        (["BF16"], torch.bfloat16),
        (["F16", "F32"], torch.bfloat16),
        (["Q8_0"], torch.bfloat16),
    ],
)
def test_the_dtype_where_none_is_asked_for(kinds: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**SHAPE, "hidden_size": 96, "intermediate_size": 64})
    )
    file, _ = gguf_of(model, lambda name: kinds[len(name) % len(kinds)])
    assert ModelConfig.from_pretrained(file.write(tmp_path / "model.gguf")).dtype == dtype


def in_parts(file: GgufFile, folder: Path, count: int) -> list[Path]:
    paths = [folder / name for name in part_names(f"m-00001-of-{count:05}.gguf")]
    split = {"split.count": np.uint16(count), "split.tensors.count": np.int32(len(file.tensors))}
    names = list(file.tensors)
    for number, path in enumerate(paths):
        part = GgufFile(
            file.architecture, {**(file.fields if number == 0 else {}), "split.no": np.uint16(number), **split}
        )
        part.tensors = {name: file.tensors[name] for name in names[number::count]}
        part.write(path)
    return paths


def test_a_file_in_parts(tmp_path: Path) -> None:
    file, judge = written("qwen3", tmp_path)
    assert_logits(in_parts(file, tmp_path, 3)[0], judge)


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


def oracle(file: GgufFile) -> PreTrainedModel | None:
    """What plain reading makes of a file: transformers' class with the fields and tensors that there are; None if it
    cannot be built of them."""
    own = {name.removeprefix("llama."): value for name, value in file.fields.items()}
    tensors = {}
    try:
        heads = own["attention.head_count"]
        config = AutoConfig.for_model(
            "llama", vocab_size=own.get("vocab_size", 131), hidden_size=own["embedding_length"],
            intermediate_size=own["feed_forward_length"], num_hidden_layers=own["block_count"],
            num_attention_heads=heads, num_key_value_heads=own.get("attention.head_count_kv", heads),
            head_dim=own.get("attention.key_length", 8), rms_norm_eps=own["attention.layer_norm_rms_epsilon"],
            max_position_embeddings=own["context_length"], tie_word_embeddings="output.weight" not in file.tensors,
            rope_parameters={"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)},
            attn_implementation="eager",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, (data, kind) in file.tensors.items():
            theirs, count = TensorNames().theirs(name), {"attn_q": heads, "attn_k": config.num_key_value_heads}
            values = torch.from_numpy(data.view(np.float16 if kind == "F16" else np.float32)).float()
            if pairs := count.get(name.split(".")[2] if name.startswith("blk.") else ""):
                values = values.view(pairs, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
            tensors[theirs] = values
        found = model.load_state_dict(tensors, strict=False)
    except Exception:  # whatever a wrong value runs into
        return None
    missing = [name for name in found.missing_keys if name != "lm_head.weight"]
    return None if missing or found.unexpected_keys else model


NAMED = re.compile(r"llama\.\w+|tensor '\w|'(blk\.\d\.|token_embd|output)")
VALUES = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.integers(0, 100), st.floats(0.25, 1e6, width=32),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)  # fmt: skip


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_any_one_change_gives_transformers_logits_or_is_named(
    data: st.DataObject, base: GgufFile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    changed, name = base, ""
    if data.draw(st.booleans(), "of a field"):
        name = data.draw(st.sampled_from([key for key in base.fields if key.startswith("llama.")]))
        changed = base.changed({name: data.draw(VALUES)})
    else:
        name = data.draw(st.sampled_from(list(base.tensors)))
        values = base.tensors[name][0]
        kind = data.draw(st.sampled_from(["gone", "renamed", "F16", "cut", "turned"]))
        tensor = {"F16": (values.astype(np.float16), "F16"), "cut": (values[:-1], "F32"),
                  "turned": (np.ascontiguousarray(values.T), "F32")}.get(kind)  # fmt: skip
        changed = base.changed({}, **{name: tensor})
        if kind == "renamed":
            changed = changed.changed({}, **{name.replace("blk.1", "blk.7").replace("t", "u"): base.tensors[name]})
    changed.write(path)
    judge = oracle(changed)
    try:
        load(path, max_model_len=min(CONTEXT, 16))
    except ConfigurationError as error:
        assert NAMED.search(str(error)), error  # noqa: PT017
    else:
        assert judge is not None, f"{name} was loaded"
        assert_logits(path, judge)


@pytest.fixture(scope="module")
def base() -> GgufFile:
    return gguf_of(build("llama"))[0]
