"""Mixtures of experts: how checkpoints hold them, what is refused, and that rows do not depend on each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, assert_as_transformers, edit_config, rewrite, save, write
from families import MIXTURES, build, load
from safetensors.torch import load_file

from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.messages import ForwardWork, SequenceState
from pearl.models import Decoder, FusedDecoder, KVCache, ModelConfig, load_model
from pearl.models.mixture import Mixture
from pearl.models.sharding import shard
from pearl.sampling_params import SamplingParams
from pearl_kernels import GatedUnit, Situation, select

CPU = torch.device("cpu")
both_forms = pytest.mark.parametrize("original", [True, False], ids=["each expert", "stacked"])


@both_forms
@pytest.mark.parametrize("name", MIXTURES)
def test_every_form_of_a_checkpoint_is_read(name: str, original: bool, tmp_path: Path) -> None:
    """transformers writes experts one by one, under each family's names, or all experts of a layer together."""
    build(name).save_pretrained(tmp_path, save_original_format=original, max_shard_size="60KB" if original else "5GB")
    assert_as_transformers(tmp_path)


def test_a_base_model_s_stacks_are_found_without_their_prefix(tmp_path: Path) -> None:
    build("qwen3-moe").save_pretrained(tmp_path, save_original_format=False)
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(tmp_path / SINGLE).items()}
    write(tmp_path, tensors)
    wanted = load_file(tmp_path / SINGLE)["layers.1.mlp.experts.down_proj"]
    mixture = load(tmp_path).weights.layers[1].mixture
    assert mixture is not None
    assert mixture.experts.count == len(wanted)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "more experts than stored": ({"num_local_experts": 9}, "has no tensor|has shape"),
    "fewer experts than stored": ({"num_local_experts": 3, "num_experts_per_tok": 3}, "makes no use|has shape"),
    "wider experts": ({"moe_intermediate_size": 24}, "has shape"),
    "top_k": ({"num_experts_per_tok": 8}, "num_experts_per_tok=8 is more than the 7 experts"),
    "no top_k": ({"num_experts_per_tok": 0}, r"num_experts_per_tok must be an integer from 1 to \d+, not 0"),
    "dense layer": ({"mlp_only_layers": [1]}, "has no tensor .*mlp|makes no use"),
    "dense": ({"num_local_experts": 0}, "has no tensor .*mlp"),
    "step": ({"decoder_sparse_step": 2}, "has no tensor .*mlp"),
    "activation": ({"hidden_act": "gelu_pytorch_tanh"}, "mixture of experts with the activation 'gelu_tanh' is not"),
    "no step": ({"decoder_sparse_step": 0}, r"decoder_sparse_step must be an integer from 1 to \d+, not 0"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_configuration_that_is_not_the_checkpoint_s_is_refused(case: str, tmp_path: Path) -> None:
    save("qwen3-moe", tmp_path)
    changes, message = CHANGES[case]
    edit_config(tmp_path, **changes)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message):
        load(tmp_path)


def test_a_missing_expert_a_surplus_one_and_one_stored_twice_are_refused(tmp_path: Path) -> None:
    tensors = save("mixtral", tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    rewrite(tmp_path, {name: None})
    with pytest.raises(ModelLoadError, match=r"no tensor 'model.layers.1.mlp.experts.2.up_proj.weight'"):
        load(tmp_path)
    rewrite(tmp_path, {name: tensors[name], name.replace("experts.2", "experts.4"): tensors[name].clone()})
    with pytest.raises(ModelLoadError, match=r"experts\.4\.w3\.weight', of which a MixtralForCausalLM .* makes no use"):
        load(tmp_path)
    twice = {"model.layers.1.mlp.experts.2.up_proj.weight": tensors[name].clone()}
    write(tmp_path, {**tensors, **twice})
    with pytest.raises(ModelLoadError, match="which are the same tensor"):
        load(tmp_path)


def test_a_stack_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    build("qwen2-moe").save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    for wrong, message in (
        (tensors[name].transpose(1, 2), "has shape"),  # as gpt-oss stores them
        (tensors[name][:, :-2], "has shape"),
        (tensors[name][:-1], "has no tensor"),
        (tensors[name].flatten(1), "makes no use|has no tensor"),
    ):
        write(tmp_path, {**tensors, name: wrong})
        with pytest.raises(ModelLoadError, match=message):
            load(tmp_path)


def test_routers_are_not_rounded_with_the_other_matrices(tmp_path: Path) -> None:
    save("qwen2-moe", tmp_path)
    kernels = select(Situation("cpu", torch.float32, weights="int8"))
    model = load_model(tmp_path, device=CPU, dtype=torch.float32, max_model_len=128, kernels=kernels)
    mixture = model.weights.layers[0].mixture
    assert mixture is not None
    assert mixture.shared_gate is not None
    assert mixture.router.scale is mixture.shared_gate.scale is None
    assert mixture.experts.gate_up.data.dtype == mixture.experts.down.data.dtype == torch.int8


def work(sequence: int, tokens: list[int], start: int, wanted: int) -> ForwardWork:
    pages = tuple(range(8 * sequence, 8 * sequence + 8))
    return ForwardWork(
        SequenceState(sequence, sequence, SamplingParams(), 0, 0, None), tuple(tokens), start, wanted, pages
    )


def cache_of(model: Decoder, dtype: torch.dtype) -> KVCache:
    cache = KVCache.allocate(model.config, 24, 4, dtype, CPU)
    for tensor in (t for layer in cache.layers for t in layer):
        tensor.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"])
def test_a_window_beside_others_has_the_bits_of_decoding_alone(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Which experts are read, and with how many rows each, differs between the two: no row's result may."""
    save(name, tmp_path)
    model = load(tmp_path, dtype)
    text = torch.randint(131, (21,), generator=torch.Generator().manual_seed(3)).tolist()
    alone, beside = (FusedDecoder(model, cache_of(model, dtype), threads) for threads in (1, 3))
    with torch.inference_mode():
        steps = [alone.forward_work([work(0, [token], place, 1)])[0] for place, token in enumerate(text)]
        beside.forward_work([work(0, text[:9], 0, 0)])
        others = [work(1, text[5:12], 0, 0), work(2, [7], 0, 1)]
        window = beside.forward_work([others[0], work(0, text[9:], 9, len(text) - 9), others[1]])[:-1]
    assert window.isfinite().all()
    assert torch.equal(window, torch.stack(steps[9:]))


def test_a_mixture_is_not_given_out_to_ranks(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    config = ModelConfig.from_pretrained(str(tmp_path))
    assert shard(config, 0, 1).config == config
    with pytest.raises(
        ConfigurationError, match=r"a MixtralForCausalLM is a mixture of experts.* target_parallel at 1"
    ):
        shard(config, 0, 2)


def test_expected_experts() -> None:
    """By counting, of random choices."""
    mixture = Mixture(experts=8, top_k=3, hidden=4, sparse=(True,))
    for rows in (1, 2, 5):
        chosen = torch.rand(4000, rows, 8, generator=torch.Generator().manual_seed(rows)).argsort(-1)[..., :3]
        met = torch.zeros(4000, 8).scatter_(1, chosen.flatten(1), 1.0).sum(1).mean()
        assert mixture.expected_experts(rows) == pytest.approx(met.item(), rel=0.02)


def test_quirks_of_the_configurations_are_read(tmp_path: Path) -> None:
    """Against the modules that transformers makes of them."""
    for name in MIXTURES:
        model = build(name)
        model.save_pretrained(tmp_path)
        model_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
        assert model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
        config = ModelConfig.from_pretrained(str(tmp_path))
        mixture = config.mixture
        assert mixture is not None
        routers = [n for n, _ in model.named_modules() if re.search(r"mlp\.(gate|router)$", n)]
        assert [int(n.split(".")[2]) for n in routers] == [i for i, sparse in enumerate(mixture.sparse) if sparse]
        router: Any = model.get_submodule(routers[0])
        assert (mixture.experts, mixture.top_k) == (router.num_experts, router.top_k)
        assert mixture.renormalise == getattr(router, "norm_topk_prob", True)
        experts: Any = model.get_submodule(f"{routers[0].rpartition('.')[0]}.experts")
        assert experts.down_proj.shape[1 if mixture.interleaved else 2] == mixture.hidden
        unit = GatedUnit(experts.alpha, experts.limit, 1.0) if hasattr(experts, "alpha") else GatedUnit()
        assert mixture.unit == unit
        assert mixture.biases == hasattr(experts, "down_proj_bias")
