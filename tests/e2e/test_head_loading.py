"""Which folders are heads, in which formats and variants; what is not of this target is refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from e2e_support import Pair, token_ids
from head_checks import HeadCheck
from plain_heads import PlainEagle, Tensors, eagle_shape, random_eagle, random_medusa, save_head

from pearl import LLM, SamplingParams
from pearl.errors import ConfigurationError, ModelLoadError, PearlError, UnsupportedModelError
from pearl.models.transformers_backend import trace

if TYPE_CHECKING:
    from conftest import Headed

OpenLLM = Callable[..., LLM]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
MEDUSA_SHAPE = {"medusa_num_heads": 2, "medusa_num_layers": 1}


def at(pair: Pair, draft: str) -> Pair:
    return Pair("head", pair.target, draft, pair.judge, pair.tokenizer, pair._known)


def assert_drafts(pair: Pair, plain: PlainEagle | Tensors, open_llm: OpenLLM, batch: list[list[int]]) -> None:
    check = HeadCheck(pair.judge, plain)
    llm = open_llm(pair, window=3, observer=check)
    check.watch(llm, batch)
    assert token_ids(llm.generate(batch, PARAMS)) == [pair.greedy(prompt, 12) for prompt in batch]
    assert check.checked > 20
    llm.close()


VARIANTS: dict[str, dict[str, Any]] = {
    "all ids, and no map": {"draft_vocab_size": 300},
    "biased": {"attention_bias": True},
    "normed before the residual": {"norm_before_residual": True},
    "one kv head": {"num_key_value_heads": 1, "head_dim": 24},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_eagle_heads(headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path, variant: str) -> None:
    own = headed["eagle"]
    shape = eagle_shape(own.pair.judge, **VARIANTS[variant])
    tensors = random_eagle(shape, seed=4)
    if shape["draft_vocab_size"] == 300:
        del tensors["d2t"], tensors["t2d"]
    if shape.get("attention_bias"):
        for name in "qkvo":
            matrix = tensors[f"midlayer.self_attn.{name}_proj.weight"]
            tensors[f"midlayer.self_attn.{name}_proj.bias"] = torch.linspace(-1, 1, matrix.shape[0])
    pair = at(own.pair, save_head(tmp_path, shape, tensors))
    embedding = pair.judge.get_input_embeddings().weight.data
    assert_drafts(pair, PlainEagle(shape, tensors, embedding), open_llm, own.batch[3:5])


def test_formats_of_eagle_heads(headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path) -> None:
    """Pickled; with its layer under another name, and an embedding of its own; layers that are read as SGLang and as
    speculators' configurations name them.
    """
    own = headed["eagle"]
    assert isinstance(own.plain, PlainEagle)
    shape, tensors = dict(own.plain.shape), own.plain.tensors
    layers = shape.pop("eagle_aux_hidden_state_layer_ids")
    embedding = 0.3 * torch.randn(300, 64, generator=torch.Generator().manual_seed(6))
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    nested = {"transformer_layer_config": shape, "speculators_model_type": "eagle3",
              "draft_vocab_size": shape["draft_vocab_size"], "eagle_aux_hidden_state_layer_ids": layers}  # fmt: skip
    odd = [layer + 1 for layer in (0, 1, 2)]
    forms = [
        ({**shape, "eagle_aux_hidden_state_layer_ids": layers}, tensors, "pytorch_model.bin", layers),
        (nested, {**renamed, "embed_tokens.weight": embedding}, "model.safetensors", layers),
        ({**shape, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}, tensors, "model.safetensors", odd),
    ]
    for index, (config, stored, name, read) in enumerate(forms):
        pair = at(own.pair, save_head(tmp_path / str(index), config, stored, name))
        plain = PlainEagle({**shape, "eagle_aux_hidden_state_layer_ids": read}, {**tensors, **{
            key: stored[key] for key in ("embed_tokens.weight",) if key in stored}}, own.plain.embedding)  # fmt: skip
        assert_drafts(pair, plain, open_llm, own.batch[3:5])


def test_medusa_heads_inside_of_a_model_of_another_name(
    headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path
) -> None:
    own = headed["medusa"]
    heads = random_medusa(own.pair.judge, 2, 1, seed=2)
    stored = {f"medusa_head.{name}": tensor for name, tensor in heads.items()}
    pair = at(own.pair, save_head(tmp_path, MEDUSA_SHAPE, stored, "medusa_lm_head.safetensors"))
    assert_drafts(pair, heads, open_llm, own.batch[3:5])


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], type[PearlError], str]] = {
    "another vocabulary": ({"vocab_size": 301}, ConfigurationError, "vocab_size=301, this one has 300"),
    "another hidden size": ({"hidden_size": 48}, ConfigurationError, "hidden_size=48, this one has 64"),
    "another target": ({"target_hidden_size": 128}, ConfigurationError, "target_hidden_size=128"),
    "more ids than there are": (
        {"draft_vocab_size": 400},
        ModelLoadError,
        "draft_vocab_size must be an .* 300, not",
    ),
    "a width that is no number": (
        {"target_hidden_size": "64"},
        ModelLoadError,
        "target_hidden_size must be an",
    ),
    "two layers": ({"num_hidden_layers": 2}, UnsupportedModelError, "num_hidden_layers is 2"),
    "a layer that is not there": (
        {"eagle_aux_hidden_state_layer_ids": [0, 1, 4]},
        ModelLoadError,
        "three of the target",
    ),
    "a layer twice": ({"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}, ModelLoadError, r"\(1, 1, 2\)"),
    "the default of so few layers": ({"eagle_aux_hidden_state_layer_ids": None}, ModelLoadError, r"not \(2, 2, 1\)"),
    "another activation": ({"hidden_act": "gelu"}, UnsupportedModelError, "gelu"),
    "another family": ({"model_type": "mamba"}, UnsupportedModelError, "mamba"),
    "no aux states": ({"eagle_config": {"use_aux_hidden_state": False}}, UnsupportedModelError, "use_aux_hidden_state"),
    "settings that are no object": ({"eagle_config": [1]}, ModelLoadError, r"config\.json: eagle_config must be an"),
    "a layer's that are none": ({"transformer_layer_config": [1]}, ModelLoadError, "transformer_layer_config must be"),
    "layers that are no list": ({"eagle_aux_hidden_state_layer_ids": 2}, ModelLoadError, "layer_ids must be a list"),
    "a name for a list": ({"architectures": "LlamaEagle3"}, ModelLoadError, r"config\.json: architectures must be a"),
    "heads that do not divide": ({"num_key_value_heads": 3}, ModelLoadError, "num_key_value_heads=3"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_configurations_that_are_refused(
    headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path, case: str
) -> None:
    """Before a weight is looked for: there is none."""
    changes, error, says = REFUSED_CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(eagle_shape(headed["eagle"].pair.judge) | changes))
    with pytest.raises(error, match=says):
        open_llm(at(headed["eagle"].pair, str(tmp_path)), window=3)


def test_other_heads_and_other_targets_are_refused(
    headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = headed["eagle"].pair
    for config, error, says in [
        ({"architectures": ["EagleLlamaForCausalLM"], "model_type": "llama"}, UnsupportedModelError, "EAGLE-3"),
        ({"medusa_num_heads": 0}, ModelLoadError, "medusa_num_heads"),
        ({"model_type": "medusa", "hidden_size": 32, "medusa_num_heads": 2}, ConfigurationError, "hidden_size=32"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=says):
            open_llm(at(own, str(tmp_path)))
    missing = tmp_path / "empty"
    missing.mkdir()
    shutil.copy(Path(own.draft) / "config.json", missing)
    with pytest.raises(ModelLoadError, match=r"holds none of model\.safetensors"):  # when its ranks are there
        open_llm(at(own, str(missing)), target_parallel=2)
    monkeypatch.setattr(trace, "_hidden_size", lambda states, layers: 0)
    with pytest.raises(ConfigurationError, match="does not hand over one for each layer; choose a draft model"):
        open_llm(own, backend="transformers")
    with pytest.raises(ConfigurationError, match=r"draft_backend='transformers' .* is an EAGLE-3 head"):
        open_llm(own, draft_backend="transformers")


def test_a_head_is_no_target(headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path) -> None:
    """But Medusa heads may lie beside the weights of a model of their own."""
    own = headed["medusa"]
    for kind, name in (("eagle", "an EAGLE-3 head"), ("medusa", "a set of Medusa heads")):
        with pytest.raises(ConfigurationError, match=rf"^target=.* is {name}, .* give it as the draft"):
            open_llm(target=headed[kind].pair.draft, draft=own.pair.target)
    folder = shutil.copytree(own.pair.target, tmp_path / "both")
    shutil.copy(Path(own.pair.draft) / "medusa_lm_head.pt", folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "medusa_num_heads": 3, "medusa_num_layers": 2}))
    llm = open_llm(target=str(folder), draft=str(folder), dtype="float32", window=3)
    prompt = own.batch[3]
    assert token_ids(llm.generate([prompt], PARAMS)) == [own.pair.greedy(prompt, 12)]


def changed(tensors: Tensors, rng: random.Random) -> tuple[str, Tensors]:
    """One tensor is missing, has another name, shape or dtype."""
    name = rng.choice(sorted(tensors.keys() - {"t2d"}))
    tensor, rest = tensors[name], {key: value for key, value in tensors.items() if key != name}
    kind = rng.choice(("missing", "name", "shape", "dtype"))
    if kind == "name":
        rest[name + "s"] = tensor
    elif kind == "shape":
        rest[name] = torch.cat((tensor, tensor[:1]))
    elif kind == "dtype":
        rest[name] = tensor.to(torch.float32 if name == "d2t" else torch.int8)
    return name, rest


def test_any_tensor_that_is_changed_is_refused_by_name(
    headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path
) -> None:
    own, rng = headed["eagle"], random.Random(5)
    shape, medusa = eagle_shape(own.pair.judge), random_medusa(own.pair.judge, 2, 1, seed=2)
    for index in range(24):
        tensors = random_eagle(shape, 1) if index % 3 else medusa
        name, wrong = changed(tensors, rng)
        folder = save_head(tmp_path / str(index), shape if index % 3 else MEDUSA_SHAPE, wrong)
        with pytest.raises((ModelLoadError, UnsupportedModelError), match=name.replace(".", r"\.")):
            open_llm(at(own.pair, folder), window=3)


def test_maps_that_contradict_are_refused(headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path) -> None:
    own = headed["eagle"]
    shape, tensors = eagle_shape(own.pair.judge), random_eagle(eagle_shape(own.pair.judge), 1)
    twice, beyond, other = tensors["d2t"].clone(), tensors["d2t"].clone(), tensors["t2d"].roll(1)
    twice[1], beyond[-1] = twice[0] - 1, 300
    wrong = [
        ({"d2t": twice}, "d2t must give"),
        ({"d2t": beyond}, "d2t must give"),
        ({"t2d": other}, "name different ids"),
    ]
    for index, (change, says) in enumerate(wrong):
        folder = save_head(tmp_path / str(index), shape, tensors | change)
        with pytest.raises(ModelLoadError, match=says):
            open_llm(at(own.pair, folder), window=3)


def test_files_that_are_no_heads_weights(headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path) -> None:
    own, shape = headed["eagle"], eagle_shape(headed["eagle"].pair.judge)
    save_head(tmp_path, shape, {}, "other.safetensors")
    with pytest.raises(ModelLoadError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        open_llm(at(own.pair, str(tmp_path)))
    file = tmp_path / "pytorch_model.bin"
    for content, says in ((b"version https://git-lfs", "Git LFS"), (b"nothing", "damaged|more than tensors")):
        file.write_bytes(content)
        with pytest.raises(ModelLoadError, match=says):
            open_llm(at(own.pair, str(tmp_path)))
    torch.save({"fc.weight": Path("code")}, file)
    with pytest.raises(ModelLoadError, match="more than tensors"):
        open_llm(at(own.pair, str(tmp_path)))
    torch.save([torch.ones(1)], file)
    with pytest.raises(ModelLoadError, match="no table of tensors"):
        open_llm(at(own.pair, str(tmp_path)))
