"""Tensors that a checkpoint has too many or too few: loaded where transformers loads them, else refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import assert_as_transformers, edit_config, rewrite, save, write
from families import SHAPE, load
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models import ModelConfig, checkpoint, load_model
from pearl.models.checkpoint import stored_config
from pearl.models.sharding import shard
from pearl.models.weight_size import weight_bytes
from pearl_kernels import Situation, select
from pearl_kernels.registry import OPERATORS

Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_again(tensors: Tensors) -> Tensors:
    copies = {name.replace("layers.2.", "layers.3."): tensors[name].clone() for name in tensors if "layers.2." in name}
    return {**tensors, **copies}


UNREAD: Mapping[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "an output's bias": (
        "llama",
        lambda t: {**t, "model.layers.1.self_attn.o_proj.bias": tensor(48)},
        r"holds 'model\.layers\.1\.self_attn\.o_proj\.bias', ",
    ),
    "a head's bias": ("llama", lambda t: {**t, "lm_head.bias": tensor(131)}, r"holds 'lm_head\.bias'"),
    "a layer": ("llama", layer_again, r"holds 'model\.layers\.3\.input_layernorm\.weight' \(and 8 more\)"),
    "a base model's bias": (
        "llama-tied",
        lambda t: {
            name.removeprefix("model."): value for name, value in {**t, "layers.0.mlp.up_proj.bias": tensor(80)}.items()
        },
        r"holds 'layers\.0\.mlp\.up_proj\.bias'",
    ),
    "a bias below one model. too many": (
        "llama",
        lambda t: {**t, "model.model.layers.0.mlp.up_proj.bias": tensor(80)},
        r"holds 'model\.model\.layers\.0\.mlp\.up_proj\.bias'",
    ),
    "an adapter": (
        "qwen2",
        lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.default.weight": tensor(4, 48)},
        r"holds 'model\.layers\.0\.self_attn\.q_proj\.lora_A",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_lies_under_the_layers_or_the_head_and_is_not_read_is_named(case: str, tmp_path: Path) -> None:
    family, change, message = UNREAD[case]
    write(tmp_path, change(save(family, tmp_path)))
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


def test_a_model_labelled_as_another_family(tmp_path: Path) -> None:
    """A Llama has no biases of q, k and v: without them these weights are another model."""
    save("qwen2", tmp_path)
    edit_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelLoadError, match=r"'model\.layers\.0\.self_attn\.k_proj\.bias' \(and 8 more\)"):
        load(tmp_path)


def test_what_has_no_part_in_the_logits_is_ignored(tmp_path: Path) -> None:
    save("llama", tmp_path)
    other = {
        "vision_tower.layers.0.norm.weight": tensor(9),
        "score.weight": tensor(2, 48),
        "v_head.summary.bias": tensor(1),
    }
    rewrite(tmp_path, {**other, "model.layers.1.self_attn.rotary_emb.inv_freq": tensor(4)})
    assert_as_transformers(tmp_path)


LOADED: Mapping[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "tied, another head stored": ("llama-tied", lambda t: {**t, HEAD: tensor(131, 48)}),
    "tied, the same head stored": ("llama-tied", lambda t: {**t, HEAD: t[EMBEDDING].clone()}),
    "tied, stored as the head alone": (
        "llama-tied",
        lambda t: {HEAD if name == EMBEDDING else name: value for name, value in t.items()},
    ),
    "a base model's names": ("llama-tied", lambda t: {name.removeprefix("model."): value for name, value in t.items()}),
    "a base model's names and a head": (
        "llama",
        lambda t: {name.removeprefix("model."): value for name, value in t.items()},
    ),
    "names with one model. too many": ("llama", lambda t: {f"model.{name}": value for name, value in t.items()}),
    "float64": ("llama", lambda t: {name: value.double() for name, value in t.items()}),
}


@pytest.mark.parametrize("case", LOADED)
def test_what_transformers_loads(case: str, tmp_path: Path) -> None:
    family, change = LOADED[case]
    write(tmp_path, change(save(family, tmp_path)))
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("family", "part"),
    [("llama-biases", "o_proj.bias"), ("llama-biases", ".bias"), ("qwen2", "q_proj.bias"), ("qwen3", "norm")],
)
def test_what_transformers_fills_in_with_constants_may_be_missing(family: str, part: str, tmp_path: Path) -> None:
    missing = [name for name in save(family, tmp_path) if part in name]
    rewrite(tmp_path, dict.fromkeys(missing))
    with pytest.warns(UserWarning, match=rf"has no tensor '.*{part}.*' \(and {len(missing) - 1} more\)"):
        assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("llama", HEAD, r"no tensor 'lm_head\.weight'.*tie_word_embeddings is false"),
        ("llama", EMBEDDING, r"no tensor 'model\.embed_tokens\.weight'"),
        ("llama-tied", EMBEDDING, r"no tensor 'model\.embed_tokens\.weight' \(and 1 more\)"),
    ],
)
def test_what_transformers_fills_in_at_random_may_not(family: str, name: str, message: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    rewrite(tmp_path, {name: None})
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    tensors = save("llama", tmp_path)
    rewrite(tmp_path, {"norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(ModelLoadError, match=r"holds '(model\.)?norm\.weight' and '(model\.)?norm\.weight', which are"):
        load(tmp_path)


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_a_head_counts_as_memory_exactly_where_it_is_another_matrix(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared a few rows at a time: the two differ in the last number only. Ranks cut the matrix that is stored."""
    monkeypatch.setattr(checkpoint, "_COMPARED", 10 * SHAPE["hidden_size"])
    tensors = save("llama-tied", tmp_path)
    head = tensors[EMBEDDING].double()  # the dtype it is stored in makes no difference
    head[-1, -1] += 0 if same else 1e-6  # less than half precision can tell
    rewrite(tmp_path, {HEAD: head})
    kernels = select(Situation("cpu", torch.float32), dict.fromkeys(OPERATORS, "reference"))
    declared = ModelConfig.from_pretrained(str(tmp_path))
    found = stored_config(tmp_path, declared)
    assert weight_bytes(found, torch.float32) - weight_bytes(declared, torch.float32) == (not same) * head.numel() * 4
    whole, *ranks = (
        load_model(
            tmp_path, device=torch.device("cpu"), dtype=torch.float32, max_model_len=16, kernels=kernels, sharding=part
        ).weights
        for part in (None, shard(declared, 0, 2), shard(declared, 1, 2))
    )
    assert (whole.embedding is None) == same
    assert torch.equal(torch.cat([rank.head.data for rank in ranks])[: SHAPE["vocab_size"]], head.float())
