"""Each config.json either gives the shape that transformers' class has, or an error that names the field and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from config_support import ABSENT, FIELDS, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from pearl.errors import ModelLoadError, PearlError, UnsupportedModelError
from pearl.models import ModelConfig
from pearl.models.rope import frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
PER_LAYER = ["full_attention", "sliding_attention"]


def rope(kind: Any, **parameters: Any) -> dict[str, Any]:
    return {"rope_scaling": {"type": kind, **parameters}}


def windowed(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, "head_dim": 8, **changes}


LOADED: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": None},
    {"head_dim": None},
    {"head_dim": 16},
    {"num_key_value_heads": ABSENT},
    {"attention_bias": True, "mlp_bias": True},
    {"hidden_act": "swish"},
    {"rms_norm_eps": 0.0},
    {"eos_token_id": [1, 2]},
    {"bos_token_id": -1},
    {"model_type": "qwen2", "num_key_value_heads": None},
    {"model_type": "qwen2", "head_dim": 16},
    {"model_type": "qwen3", "hidden_size": 30, "attention_bias": True},
    {"model_type": "qwen3", "head_dim": ABSENT},
    {"model_type": "mistral", "mlp_bias": True, "attention_bias": True},  # keys of another family
    {"model_type": "qwen2", "mlp_bias": True, "attention_bias": True},
    {"sliding_window": 5},  # left over in a Llama
    windowed("mistral", sliding_window=5),
    windowed("mistral", sliding_window=None),
    windowed("mistral", sliding_window=5, layer_types=PER_LAYER),  # to transformers this is Ministral
    windowed("ministral", sliding_window=5),
    windowed("qwen2", sliding_window=5),
    windowed("qwen2", sliding_window=0),
    windowed("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1),
    windowed("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=-1),
    windowed("qwen3", sliding_window=None, use_sliding_window=True, max_window_layers=1),
    windowed("qwen3", sliding_window=5, use_sliding_window=True, layer_types=PER_LAYER),
    {"head_dim": 32, **rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)},
    {"head_dim": 32, **rope("yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=4.0)},
    {"rope_theta": 500.0},
    {"rope_parameters": {"rope_theta": 500.0}},
    {"rope_parameters": None},
    {"partial_rotary_factor": 0.5},  # Llama rotates the whole head all the same
    rope("default", factor="4"),
    rope("linear", factor=0.5),
    rope("linear", factor=4),
    rope("dynamic", factor=2.0),
    rope("llama3", factor=8.0, **LLAMA3),
    rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    rope("yarn", factor=4.0),
    rope("yarn", factor=None, original_max_position_embeddings=16),
    rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=0),
    rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=1, beta_slow=32),
    rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
    rope("yarn", factor=4.0, attention_factor=-1),
    {**rope("yarn", factor=4.0), "original_max_position_embeddings": 16},  # beside the parameters, as in Phi-3
    {**rope("llama3", factor=8.0, **LLAMA3), "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("changes", LOADED, ids=repr)
def test_what_transformers_loads_has_its_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    shape = ModelConfig.from_pretrained(write_config(tmp_path, **changes))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    layers, rotary = model.model.layers, model.model.rotary_emb
    attention, mlp = layers[0].self_attn, layers[0].mlp
    assert shape.architecture == type(model).__name__
    assert (shape.vocab_size, shape.hidden) == tuple(model.lm_head.weight.shape)
    assert (shape.layers, shape.head_dim, shape.ffn) == (len(layers), attention.head_dim, mlp.up_proj.out_features)
    assert shape.heads * shape.head_dim == attention.q_proj.out_features == attention.o_proj.in_features
    assert shape.kv_heads * shape.head_dim == attention.k_proj.out_features
    assert shape.eps == model.model.norm.variance_epsilon
    biased = (attention.q_proj, attention.o_proj, mlp.up_proj)
    assert (shape.qkv_bias, shape.output_bias, shape.mlp_bias) == tuple(p.bias is not None for p in biased)
    assert (shape.qk_norm == "head") == hasattr(attention, "q_norm")
    mistral = model.config.model_type == "mistral"  # whose layers ask the configuration
    windows = [model.config if mistral else layer.self_attn for layer in layers]
    assert shape.windows == tuple(getattr(each, "sliding_window", None) or 0 for each in windows)
    assert shape.max_position_embeddings == model.config.max_position_embeddings
    lanes, scale = frequencies(shape.rope, shape.head_dim, shape.max_position_embeddings)
    torch.testing.assert_close(lanes, rotary.inv_freq)
    assert scale == pytest.approx(rotary.attention_scaling)


GEMMA3 = {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
PHI3 = {"model_type": "phi3", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GRANITE = {"model_type": "granite"}
SMOLLM3 = {"model_type": "smollm3", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
OF_FAMILIES: list[tuple[dict[str, Any], str]] = [
    ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported in a Gemma3"),
    ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported in a Gemma3"),
    ({**GEMMA3, "final_logit_softcapping": 0.0}, "final_logit_softcapping must be a finite number above 0, not 0.0"),
    ({**GEMMA3, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a finite number above 0, not 0"),
    ({**GEMMA3, "hidden_activation": "gelu"}, r"activation 'gelu' \(hidden_activation\)"),
    ({**GEMMA3, "sliding_window": None}, "sliding_window must be at least 1 where a layer uses it, not None"),
    ({**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor of rope_parameters .*, not -1.0"),
    ({**GRANITE, "residual_multiplier": 0.0}, "residual_multiplier must be a finite number above 0, not 0.0"),
    ({**GRANITE, "residual_multiplier": -1.0}, "residual_multiplier must be a finite number above 0, not -1.0"),
    ({**GRANITE, "logits_scaling": 0}, "logits_scaling must be a finite number above 0, not 0"),
    ({**SMOLLM3, "no_rope_layers": [1]}, r"no_rope_layers must have a 0 or 1 for each of the 2 layers, not \[1\]"),
    ({**PHI3, "partial_rotary_factor": 0.4}, "partial_rotary_factor must leave an even number .*, not 0.4"),
    ({**PHI3, "rope_scaling": {**LONG, "short_factor": [1.0] * 3}}, "short_factor"),
    ({**PHI3, "rope_scaling": {**LONG, "short_factor": [0.0] * 4}}, "short_factor of rope_parameters must be a list"),
    ({**PHI3, "rope_scaling": {"type": "linear", "factor": 2.0}}, r"must be one of \['longrope'\], got linear"),
]


@pytest.mark.parametrize(("fields", "message"), OF_FAMILIES, ids=repr)
def test_what_a_family_cannot_run_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message):
        ModelConfig.from_pretrained(write_config(tmp_path, **fields))


def test_a_field_that_its_class_has_and_the_decoder_does_not_know_is_refused_unless_it_has_its_default() -> None:
    """As a later transformers may add one."""

    class Newer(LlamaConfig):
        model_type = "llama"
        attention_twist: float = 0.0

    assert ModelConfig.from_transformers(Newer(**FIELDS)).layers == 2
    with pytest.raises(UnsupportedModelError, match=r"attention_twist=0.5 is a field of LlamaForCausalLM's config"):
        ModelConfig.from_transformers(Newer(**FIELDS, attention_twist=0.5))


SIZES = [name for name in FIELDS if name != "model_type"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, rf"{name} must be an integer from 1 to \d+, not {value!r}$")
      for name in SIZES for value in (4096.0, "32", True, 0, -4, {}, 2**31)),
    *(({name: [32]}, rf"{name} must be an integer from 1 to \d+, not \[32\]$") for name in ("head_dim", "vocab_size")),
    *(({name: None}, rf"'{name}' expected int, got null") for name in SIZES if name != "num_key_value_heads"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers .*, not 1000000000"),
    ({"model_type": "mistral", "num_key_value_heads": None}, "'num_key_value_heads' expected int, got null"),
    ({"model_type": "qwen3", "head_dim": None}, "'head_dim' expected int, got null"),
    ({"model_type": "qwen2", "head_dim": "x"}, "head_dim .*, not 'x'"),
    ({"hidden_size": 30}, r"hidden size \(30\) is not a multiple of .* heads \(4\)"),
    ({"hidden_size": 30, "model_type": "qwen2"}, "head_dim .*must be even .*, not 7"),
    ({"hidden_size": 2, "model_type": "qwen2"}, "head_dim .*, not 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ({"num_key_value_heads": 8}, "num_attention_heads=4 is not a multiple of num_key_value_heads=8"),
    ({"head_dim": 7}, "head_dim.*7"),
    ({"head_dim": 3}, "head_dim .*must be even .*, not 3"),
    ({"head_dim": 2**20}, "head_dim .*at most|head_dim .*, not 1048576"),
    ({"rms_norm_eps": 1}, "'rms_norm_eps' expected float, got int .value: 1"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps must be .*, not -1.0"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be .*, not inf"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be .*, not nan"),
    ({"tie_word_embeddings": 0}, "'tie_word_embeddings' expected bool, got int .value: 0"),
    ({"attention_bias": None}, "'attention_bias' expected bool, got null"),
    ({"mlp_bias": "no"}, "'mlp_bias' expected bool, got str .value: 'no'"),
    ({"hidden_act": "gelu"}, r"activation 'gelu' \(hidden_act\)"),
    ({"hidden_act": ["silu"]}, r"'hidden_act' expected str, got list .value: \['silu'\]"),
    ({"bos_token_id": [1]}, r"'bos_token_id' with value \[1\] doesn't match any type in \(int, null\)$"),
    ({"eos_token_id": "</s>"}, "'eos_token_id' with value '</s>'"),
    ({"eos_token_id": ["</s>"]}, r"'eos_token_id' with value \['</s>'\]"),
    (windowed("mistral", sliding_window=0), "sliding_window must be at least 1 where a layer uses it, not 0"),
    (windowed("mistral", sliding_window="5"), "'sliding_window' with value '5'"),
    (windowed("qwen2", layer_types=PER_LAYER), "sliding_window must be at least 1 where a layer uses it, not None"),
    (windowed("qwen2", layer_types=["x", "full_attention"]), r"`layer_types` entries are not all known: \['x', 'full"),
    (windowed("qwen2", layer_types=["chunked_attention"] * 2), "layer_types has 'chunked_attention'"),
    (windowed("qwen3", layer_types=["full_attention"]), r"`num_hidden_layers` \(2\) .* `layer_types` \(1\)"),
    (windowed("qwen3", use_sliding_window="yes"), "'use_sliding_window' expected bool, got str"),
    (windowed("qwen3", max_window_layers=None), "'max_window_layers' expected int, got null"),
    ({"layer_types": 5}, "layer_types must be a list .*, not 5"),
    ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, r"layers that differ \(per_layer_config\) are not"),
    ({"rope_theta": 0}, "rope_theta .*, not 0 "),
    ({"rope_theta": None}, "rope_theta .*, not None"),
    ({"rope_theta": 10**400}, "rope_theta .*, not 10000"),
    ({"rope_theta": float("inf")}, "rope_theta .*, not inf"),
    ({"rope_scaling": "linear"}, "'rope_parameters' with value 'linear'"),
    (rope("linear", factor="4"), "factor of rope_parameters .*, not '4'"),
    (rope("linear", factor=-2.0), "factor of rope_parameters .*, not -2.0"),
    (rope("linear", factor=None), "factor of rope_parameters .*, not None"),
    (rope("linear"), "Missing required keys in `rope_parameters` for 'rope_type'='linear': {'factor'}"),
    (rope("dynamic", factor=[2]), r"factor of rope_parameters .*, not \[2\]"),
    (rope("llama3", factor=8.0), "Missing required keys .*'llama3'"),
    (rope("llama3", factor=8.0, **{**LLAMA3, "low_freq_factor": "1"}), "low_freq_factor .*, not '1'"),
    (rope("llama3", factor=8.0, **{**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor .*, not 4.0 and 4.0"),
    (rope("yarn"), "Missing required keys .*'yarn': {'factor'}"),
    (rope("yarn", factor=4.0, original_max_position_embeddings=0), "original_max_position_embeddings .*, not 0"),
    (rope("yarn", factor=4.0, beta_fast="x"), "beta_fast .*, not 'x'"),
    (rope("yarn", factor=4.0, beta_fast=-1), "'beta_fast': -1.* give no finite frequencies"),
    (rope("yarn", factor=4.0, rope_theta=1.0), "'rope_theta': 1.0.* give no finite frequencies"),
    ({**rope("yarn", factor=4.0), "original_max_position_embeddings": "16"}, "original_max_.*, not '16'"),
    ({**rope("linear", factor=2.0), "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    *((rope(kind, factor=2.0), "RoPE scaling .* is not supported; known are default, linear")
      for kind in ("su", "mrope", None, 5, ["linear"])),
    ({"rope_parameters": {"rope_type": ["linear"], "rope_theta": 1e4}}, r"RoPE scaling \['linear'\] is not supported"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"] * 2,
      "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
     r"of their own for some layers \(full_att"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=repr)
def test_what_cannot_run_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_config(tmp_path, **changes)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message) as raised:
        ModelConfig.from_pretrained(folder)
    assert str(raised.value).startswith(f"{folder}/config.json: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON in UTF-8: Expecting property name .*line 1"),
        (b"", "is not JSON in UTF-8"),
        (b'{"model_type": "\xff"}', "is not JSON in UTF-8: 'utf-8' codec"),
        (b"[" * 100_000, "is not JSON in UTF-8"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer.*git lfs pull"),
        (b"{}", "has no model_type.*knows gemma, .*llama, ministral, .*qwen3"),
        (b'{"configuration_files": 5, "model_type": "llama"}', "transformers refuses it"),
    ],
)
def test_a_config_that_is_there_but_bad_is_not_asked_for(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message) as raised:
        ModelConfig.from_pretrained(str(tmp_path))
    assert f"{tmp_path}/config.json" in str(raised.value)
    assert "give a folder" not in str(raised.value)


def test_a_config_that_cannot_be_read_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json: give a folder"):
        ModelConfig.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read: Is a directory"):
        ModelConfig.from_pretrained(str(tmp_path))


def test_a_configuration_that_is_given_stays_as_it_is(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_config(tmp_path))
    config.rope_parameters = {"rope_theta": 500.0}
    assert ModelConfig.from_transformers(config).rope["rope_type"] == "default"
    assert config.rope_parameters == {"rope_theta": 500.0}


def test_a_hub_id_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no network each question takes the hub's client half a minute."""
    asked = []

    def hub(model_id: str, **_: object) -> str:
        asked.append(model_id)
        if len(asked) > 1:
            raise OSError("no network\nand more")
        return str(tmp_path)

    write_config(tmp_path, dtype="bfloat16")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert ModelConfig.from_pretrained("some/model").dtype == torch.bfloat16
    assert asked == ["some/model"]
    with pytest.raises(
        ModelLoadError, match=r"'some/model' is no folder.* give a folder with .* cached \(no network\)$"
    ):
        ModelConfig.from_pretrained("some/model")


@pytest.mark.parametrize("architectures", [ABSENT, None, [], ["MistralForCausalLM"], ["LlamaModel"]], ids=repr)
def test_the_family_is_the_model_types(tmp_path: Path, architectures: Any) -> None:
    """Also beside another family's name, or a class without a head: transformers goes by model_type."""
    llama = write_config(tmp_path, architectures=architectures, attention_bias=True)
    assert ModelConfig.from_pretrained(llama).architecture == "LlamaForCausalLM"
    qwen = ModelConfig.from_pretrained(write_config(tmp_path, architectures=architectures, model_type="qwen2"))
    assert (qwen.architecture, qwen.qkv_bias, qwen.output_bias) == ("Qwen2ForCausalLM", True, False)


@pytest.mark.parametrize("model_type", ["mamba", "Llama", "", 5, ["llama"], {}], ids=repr)
def test_an_unknown_model_type_is_named_with_the_known_ones(tmp_path: Path, model_type: Any) -> None:
    folder = write_config(tmp_path, model_type=model_type, architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError) as raised:
        ModelConfig.from_pretrained(folder)
    assert f"model_type {model_type!r} is not supported; the decoder knows gemma, " in str(raised.value)


WORDS = ["full_attention", "sliding_attention", "linear", "dynamic", "yarn", "llama3", "bfloat16", "auto"]
KEYS = ["rope_type", "type", "factor", "rope_theta", *LLAMA3, "0", ""]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 70), st.sampled_from([2**31, 10**400]), st.floats(),
    st.text(max_size=3), st.sampled_from(WORDS),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)
READ = [
    *FIELDS, "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "dtype", "torch_dtype",
    "eos_token_id", "bos_token_id", "architectures", "auto_map", "per_layer_config",
]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(family=st.sampled_from(["llama", "mistral", "ministral", "qwen2", "qwen3"]),
       changes=st.dictionaries(st.sampled_from(READ), VALUES, min_size=1, max_size=3))  # fmt: skip
def test_any_value_of_any_field_is_read_or_refused(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    folder = write_config(tmp_path, **{"model_type": family, **changes})
    try:
        shape = ModelConfig.from_pretrained(folder)
    except PearlError:
        return
    assert len(shape.windows) == shape.layers
    assert shape.heads % shape.kv_heads == 0
    assert frequencies(shape.rope, shape.head_dim, shape.max_position_embeddings)[0].isfinite().all()
