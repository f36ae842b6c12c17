"""InternLM2, whose class is code that is never run: transformers' Llama with the same numbers, packed here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, edit_config, rewrite, write
from families import CONTEXT, llama, load, randomised, rope
from paged_harness import check_chunks_decoding_and_a_rolled_back_window, check_prefill_of_ragged_sequences
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel

from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.models import ModelConfig, Tokenizer

NAMES = {
    "model.embed_tokens.": "model.tok_embeddings.", "lm_head.": "output.", "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
CODE = {"AutoConfig": "configuration_internlm2.C", "AutoModelForCausalLM": "modeling_internlm2.M"}
VARIANTS: dict[str, tuple[Callable[[], PreTrainedModel], Mapping[str, Any]]] = {
    "2.5": (
        lambda: llama(**rope("dynamic", factor=2.0)),
        {"rope_theta": 5000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "bias": False},
    ),
    "biases": (lambda: llama(attention_bias=True, num_key_value_heads=6), {"rope_theta": 10000.0}),  # by default
    "one kv head": (lambda: llama(num_key_value_heads=1, tie_word_embeddings=True), {"bias": False}),
}


def in_groups(tensors: Mapping[str, Tensor], prefix: str, last: str, kv_heads: int) -> Tensor:
    """q, k and v of a layer as ``wqkv`` has them."""
    q, k, v = (tensors[f"{prefix}self_attn.{name}_proj.{last}"] for name in "qkv")
    rows = []
    for head in range(kv_heads):
        rows += [part[len(part) // kv_heads * head : len(part) // kv_heads * (head + 1)] for part in (q, k, v)]
    return torch.cat(rows)


def as_internlm2(model: PreTrainedModel, folder: Path, changes: Mapping[str, Any]) -> None:
    tensors, stored = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, {}
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if not re.search(r"self_attn\.[qkv]_proj", name):
            stored[name] = tensor
        elif match := re.fullmatch(r"(.*)self_attn\.q_proj\.(.*)", name):
            packed = in_groups(tensors, match[1], match[2], model.config.num_key_value_heads)
            stored[f"{match[1]}attention.wqkv.{match[2]}"] = packed
    if model.config.tie_word_embeddings:
        del stored["output.weight"]
    fields = {name: getattr(model.config, name) for name in SAME}
    fields |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "auto_map": CODE, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({**fields, "torch_dtype": "float32", "attn_implementation": "eager"})
    )
    write(folder, stored)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with biases in groups of 3."""
    torch.manual_seed(3)
    as_internlm2(randomised(llama(attention_bias=True)), tmp_path / "model", {"bias": True})
    return tmp_path / "model"


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_llama_s(name: str, tmp_path: Path) -> None:
    build, changes = VARIANTS[name]
    torch.manual_seed(5)
    model = randomised(build())
    as_internlm2(model, tmp_path, changes)
    decoder = load(tmp_path)
    check_prefill_of_ragged_sequences(model, decoder)
    check_chunks_decoding_and_a_rolled_back_window(model, decoder)


def test_what_is_recognised(folder: Path) -> None:
    config = ModelConfig.from_pretrained(str(folder))
    assert config.architecture == "InternLM2ForCausalLM"
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, False)
    assert config.dtype is torch.float32


def test_dynamic_rope_is_run_up_to_the_model_s_length(folder: Path) -> None:
    edit_config(folder, rope_scaling={"type": "dynamic", "factor": 2.0})
    load(folder)
    with pytest.raises(ConfigurationError, match=rf"above the {CONTEXT} positions .* dynamic RoPE scaling"):
        load(folder, max_model_len=CONTEXT + 1)


WQKV = "model.layers.1.attention.wqkv"
REFUSED: dict[str, tuple[Callable[[Path, dict[str, Tensor]], None], str]] = {
    "rows": (lambda f, t: rewrite(f, {f"{WQKV}.weight": t[f"{WQKV}.weight"][:-1]}), r"wqkv.weight' has shape \(79,"),
    "inputs": (lambda f, t: rewrite(f, {f"{WQKV}.weight": t[f"{WQKV}.weight"][:, :-1]}), r"q_proj.weight' has shape"),
    "missing": (lambda f, t: rewrite(f, {f"{WQKV}.weight": None}), "has no tensor 'model.layers.1.self_attn.q_proj.w"),
    "surplus": (lambda f, t: rewrite(f, {"model.layers.1.attention.wo.x": t["output.weight"]}), "makes no use"),
    "twice": (lambda f, t: rewrite(f, {"lm_head.weight": t["output.weight"].clone()}), "which are the same tensor"),
    "heads": (lambda f, t: edit_config(f, num_key_value_heads=3), r"config.json calls for 96 rows: 6 query and 3 KV"),
    "layers": (lambda f, t: edit_config(f, num_hidden_layers=2), "makes no use"),
    "biases": (lambda f, t: edit_config(f, bias=False), "makes no use"),
    "scaling": (lambda f, t: edit_config(f, rope_scaling={"type": "x", "factor": 2.0}), "RoPE scaling 'x' is not"),
    "activation": (lambda f, t: edit_config(f, hidden_act="relu"), "activation 'relu'"),
    "no size": (lambda f, t: edit_config(f, hidden_size="48"), "hidden_size must be an integer"),
    "quantised": (
        lambda f, t: edit_config(f, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128}),
        r"a quantised InternLM2ForCausalLM \(awq \(4 bits\)\) is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_change_is_refused_with_a_sentence(case: str, folder: Path) -> None:
    change, sentence = REFUSED[case]
    change(folder, load_file(folder / SINGLE))
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=sentence):
        load(folder)


def test_its_tokenizer_is_read_where_there_is_a_tokenizer_json(folder: Path) -> None:
    """Its classes are code, in place of which transformers reads that file; without it a sentence says what to give."""
    settings: dict[str, Any] = {
        "tokenizer_class": "InternLM2Tokenizer", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.Slow", "tokenization_internlm2_fast.Fast"]},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelLoadError, match=r"it has none of tokenizer\.json, .*give a folder with a tokenizer\.json"):
        Tokenizer.from_pretrained(str(folder))
    words = {"</s>": 0, "<unk>": 1, "good": 2, "day": 3}
    Backend(WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(str(folder))
    assert tokenizer.encode("day") == [3]
    assert tokenizer.eos_ids == {0}
    assert tokenizer.chat_text([{"role": "user", "content": "good"}]) == "good"
