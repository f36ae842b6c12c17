"""What transformers' own module cannot compute exactly on our pages is refused with a sentence, most of it before any
weight is read, and nothing loads as garbage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, edit_config, rewrite
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers_families import build, config_of

from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.models.backend import describe_model
from pearl.models.transformers_backend import describe, load
from pearl.models.transformers_backend.interface import _window
from pearl_kernels import Situation, select

_TINY: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, r"a layer of type 'linear_attention' carries a state .* cannot be rolled back"),
    "mamba2": ({"num_heads": 8, "head_dim": 8}, "carries a state"),
    "rwkv": ({}, r"RwkvForCausalLM carries a state .* cannot be rolled back"),
    "xlstm": ({"num_heads": 4}, "carries a state"),
    "recurrent_gemma": ({}, "carries a state"),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1}, "carries a state"),
    "qwen3_next": ({"head_dim": 8}, "a layer of type 'linear_attention' carries a state"),
    "lfm2": ({"full_attn_idxs": [1]}, "a layer of type 'conv' carries a state"),
    "bamba": ({"mamba_n_heads": 8, "mamba_d_head": 8}, "carries a state"),
    "bloom": ({"n_layer": 2, "n_head": 4}, r"BloomForCausalLM cannot run on KV pages: its attention, or its mask"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, r"MptForCausalLM cannot run on KV pages"),
    "falcon": ({"alibi": True}, r"'falcon' cannot run on KV pages: its attention does not go through"),
    "gpt_neo": ({"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}, "gpt_neo"),
    "xglm": ({"attention_heads": 4, "num_layers": 2, "d_model": 32, "ffn_dim": 48}, "XGLMForCausalLM cannot run"),
    "gemma2": ({"head_dim": 8, "num_key_value_heads": 2, "use_bidirectional_attention": True}, "is not causal"),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, r"it has 2 layers, of which 0 attend through"),
    "bert": ({"is_decoder": False}, "neither causal attention nor a sliding window|is not causal"),
    "t5": ({}, r"an encoder|cannot run on KV pages"),
    "bart": ({"d_model": 32, "decoder_layers": 2}, "an encoder"),
    "diffllama": ({"num_key_value_heads": 2}, r"self_attn attends more than once in a forward"),
    "deepseek_v2": (_MLA, r"keys of \[4, 5, 16\] and values of \[4, 5, 8\]"),
    "deepseek_v3": (_MLA, r"keys of \[4, 5, 16\] and values of \[4, 5, 8\]"),
    "gpt_oss": ({"head_dim": 8, "num_key_value_heads": 2, **_EXPERTS}, "gives attention s_aux"),
    "gemma4_text": (
        {"head_dim": 8, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"],
         "hidden_size_per_layer_input": 0},
        r"all layers' pages must be of one size",
    ),
    "llama4_text": (
        {"head_dim": 8, "num_key_value_heads": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 48, **_EXPERTS},
        r"neither causal attention nor a sliding window|cannot run on KV pages",
    ),
    "gemma3": ({}, "a model of more than text"),
}  # fmt: skip


def configured(folder: Path, model_type: str, changes: dict[str, Any]) -> str:
    tiny = {} if model_type in ("gemma3", "t5") else _TINY
    config = CONFIG_MAPPING[model_type](**{**tiny, **changes})
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_without_weights(model_type: str, tmp_path: Path) -> None:
    changes, sentence = REFUSED[model_type]
    with pytest.raises((UnsupportedModelError, ModelLoadError), match=sentence):
        describe(configured(tmp_path, model_type, changes), torch.float32)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "code.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    maps = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": maps}))
    with pytest.raises(UnsupportedModelError, match=r"Python code in the model's folder \(auto_map\), and this engine"):
        describe(str(tmp_path))
    config_of("phi").save_pretrained(tmp_path)
    edit_config(tmp_path, auto_map=maps)
    assert describe(str(tmp_path), torch.float32).architecture == "PhiForCausalLM"
    assert not trace.exists()


def test_a_family_that_nobody_knows_has_both_reasons(tmp_path: Path) -> None:
    folder = configured(tmp_path, *("bloom", REFUSED["bloom"][0]))
    with pytest.raises(UnsupportedModelError, match=r"model_type 'bloom' is not supported; .* own module: .* KV pages"):
        describe_model(folder, "auto")
    with pytest.raises(UnsupportedModelError, match=r"^[^;]*'bloom' is not supported; the decoder knows [^;]*$"):
        describe_model(folder, "native")
    with pytest.raises(UnsupportedModelError, match=r"^[^;]*BloomForCausalLM cannot run on KV pages"):
        describe_model(folder, "transformers")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": "wide"}, r"config\.json: transformers refuses it: Field 'hidden_size' expected int, got str"),
        ({"layer_types": ["x", "y"]}, r"refuses it: The `layer_types` entries are not all known: \['x', 'y'\]"),
    ],
)
def test_what_a_validation_of_several_lines_says(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    config_of("phi").save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=sentence):
        describe(str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("gpt_neox-partial-rotary").save_pretrained(tmp_path)
    return tmp_path


def open_model(folder: Path) -> object:
    config = describe(str(folder), torch.float32)
    kernels = select(Situation("cpu", torch.float32, config.head_dim))
    return load(folder, config, device=torch.device("cpu"), kernels=kernels, page_size=16)


QUERY_BIAS = "gpt_neox.layers.1.attention.query_key_value.bias"


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({QUERY_BIAS: None}, ModelLoadError, rf"lacks '{QUERY_BIAS}'"),
        ({QUERY_BIAS: torch.zeros(7)}, ModelLoadError, r"cannot load these weights|in another shape"),
        ({"gpt_neox.layers.1.attention.out.bias": torch.zeros(48)}, ModelLoadError, "holds .*makes no use"),
        ({QUERY_BIAS: torch.zeros(144, dtype=torch.int8)}, UnsupportedModelError, "is quantised: .* stored as I8"),
        ({QUERY_BIAS: torch.full((144,), torch.nan)}, UnsupportedModelError, "its weights are no numbers"),
    ],
)
def test_tensors_that_are_not_the_models(
    folder: Path, changes: dict[str, Tensor | None], error: type[Exception], sentence: str
) -> None:
    assert QUERY_BIAS in load_file(folder / SINGLE)
    rewrite(folder, changes)
    with pytest.raises(error, match=sentence):
        open_model(folder)


def test_masks_and_frequencies_that_old_checkpoints_hold_are_left_out(folder: Path) -> None:
    rewrite(
        folder,
        {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    open_model(folder)


def test_quantised_and_pickled_checkpoints(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    with pytest.raises(UnsupportedModelError, match="quantised with gptq"):
        describe(str(folder))
    edit_config(folder, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(UnsupportedModelError) as neither:
        describe_model(str(folder), "auto")
    assert str(neither.value).count("quantised with aqlm") == 1
    edit_config(folder, quantization_config=None)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="its weights are pickled"):
        open_model(folder)


def shifted(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A feed-forward network that mixes in the token before: a state that attention knows nothing of."""
    return lambda self, x: own(self, x) + 0.5 * x.roll(1, dims=1)


def from_zero(own: Callable[..., Any]) -> Callable[..., Any]:
    """Rotations that count tokens of the batch instead of reading their positions."""
    return lambda self, x, position_ids: own(self, x, torch.arange(x.shape[1], device=x.device)[None])


@pytest.mark.parametrize(
    ("owner", "change"),
    [(modeling_gpt_neox.GPTNeoXMLP, shifted), (modeling_gpt_neox.GPTNeoXRotaryEmbedding, from_zero)],
)
def test_what_bypasses_attention_is_found_with_the_first_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, change: Callable[..., Any]
) -> None:
    """Its shapes are those of a model that runs, and a text computed at once has the same logits as with pages."""
    open_model(folder)
    monkeypatch.setattr(owner, "forward", change(owner.forward))
    with pytest.raises(UnsupportedModelError, match="computes other logits on KV pages than with its own attention"):
        open_model(folder)


def test_attention_of_ours_is_not_for_others(folder: Path) -> None:
    open_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="pearl_paged")
    with pytest.raises(UnsupportedModelError, match="is for models that pearl has loaded, not for this GPTNeoX"):
        theirs(torch.tensor([[1, 2, 3]]))


_LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("kind", "rope", "longest"), [("default", {}, 128), ("dynamic", {}, 128), ("longrope", _LONGROPE, 32)]
)
def test_positions_that_every_batch_computes_alike(
    tmp_path: Path, kind: str, rope: dict[str, Any], longest: int
) -> None:
    """Where these two scalings go beyond, a token's rotation depends on the longest text beside it."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **rope}
    config_of("olmo-clipped", rope_parameters=rope, original_max_position_embeddings=32).save_pretrained(tmp_path)
    config = describe(str(tmp_path), torch.float32)
    config.require_length(longest)
    with pytest.raises(ConfigurationError, match=f"more than the {longest} positions"):
        config.require_length(longest + 1)


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (lambda b, h, q, k: k <= q, 0),
        (lambda b, h, q, k: (k <= q) & (k > q - 9), 9),
        (lambda b, h, q, k: (k <= q) & (k > q - 63), 63),
        (lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), None),  # chunks
        (lambda b, h, q, k: (k <= q) | (k < 4), None),  # a prefix that sees itself
        (lambda b, h, q, k: (k > q - 9) & (k < q + 9), None),  # both sides
        (lambda b, h, q, k: k < q, None),
    ],
)
def test_windows_are_read_from_masks(mask: Callable[..., Tensor], window: int | None) -> None:
    assert _window(mask, 64) == window
