"""One change to a checkpoint of any family: its logits are still those of transformers, or a sentence says why not.

Of the changes that are drawn some change nothing, some another model's shape, and most are mistakes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SINGLE, write
from families import build, load
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pearl.errors import PearlError
from pearl.messages import ForwardWork, SequenceState
from pearl.models import KVCache
from pearl.sampling_params import SamplingParams
from pearl.workers.model_runner import build_batch

NAMES = (
    "llama", "mistral-window", "ministral-layers", "qwen2-sliding-layers", "qwen3", "gemma", "gemma2", "gemma3-cap",
    "granite", "olmo2", "phi3-window", "phi3-partial-longrope", "smollm3-windows", "mixtral", "qwen2-moe-layers",
    "qwen3-moe-steps", "gpt-oss",
)  # fmt: skip
CHANGES = 8
# Of what lies around the model; architectures does not name the family, model_type does.
LEFT_ALONE = {"architectures", "transformers_version", "dtype", "initializer_range", "use_cache", "pad_token_id"}
TEXT = tuple((7 * i * i + 3) % 131 for i in range(30))


def another(value: Any, rng: random.Random) -> Any:
    """A value in place of another one: of its type, or not."""
    if rng.random() < 0.15:
        return rng.choice([None, "x", -1, 0, True, [], 2**40, 1e300])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return type(value)(rng.choice([value * 2, value + 1, value / 2, value * 3, value - 1]))
    if isinstance(value, str):
        return rng.choice(["silu", "gelu_pytorch_tanh", "gelu", "llama", "gemma2", "linear", "default", value + "x"])
    if isinstance(value, list) and value:
        return rng.choice([value[:-1], value[::-1], [*value[:-1], another(value[-1], rng)], [*value, value[0]]])
    if isinstance(value, dict) and value:
        changed, key = copy.deepcopy(value), rng.choice(sorted(value))
        changed[key] = another(value[key], rng)
        return changed
    return rng.choice([3, 0.5, True, "x"])


def change_config(folder: Path, rng: random.Random) -> str:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    name = rng.choice(sorted(fields.keys() - LEFT_ALONE))
    value = another(fields[name], rng)
    path.write_text(json.dumps({**fields, name: value}))
    return f"{name}: {fields[name]!r} -> {value!r}"


def change_tensor(folder: Path, rng: random.Random) -> str:
    tensors = load_file(folder / SINGLE)
    name = rng.choice(sorted(tensors))
    kinds: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
        "missing": lambda _: {},
        "shorter": lambda tensor: {name: tensor[:-1]},
        "turned": lambda tensor: {name: tensor.t() if tensor.ndim == 2 else tensor[None]},
        "bf16": lambda tensor: {name: tensor.bfloat16()},
        "double": lambda tensor: {name: tensor.double()},
        "integers": lambda tensor: {name: tensor.to(torch.int8)},
        "renamed": lambda tensor: {name.replace(".weight", ".weights"): tensor},
        "of another layer": lambda tensor: {name: tensor, name.replace("layers.0", "layers.9") + "x": tensor.clone()},
    }
    kind = rng.choice(sorted(kinds))
    write(folder, tensors | kinds[kind](tensors.pop(name)))
    return f"{name}: {kind}"


def ours(folder: Path) -> Tensor:
    decoder = load(folder)
    cache = KVCache.allocate(decoder.config, 1, 32, torch.float32, torch.device("cpu"))
    state = SequenceState(0, 0, SamplingParams(), 0, 0, None)
    with torch.inference_mode():
        work = [ForwardWork(state, TEXT, 0, len(TEXT), (0,))]
        return decoder.forward(build_batch(work, 32, torch.device("cpu")), cache)


def theirs(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([TEXT])).logits[0]
    return logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_one_change_gives_the_same_logits_or_a_sentence(name: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    build(name).save_pretrained(whole)
    tensors, config = (whole / SINGLE).read_bytes(), (whole / "config.json").read_text()
    rng = random.Random(name)
    refused = 0
    for number in range(CHANGES):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / SINGLE).write_bytes(tensors)
        (folder / "config.json").write_text(config)
        done = rng.choice([change_config, change_config, change_tensor])(folder, rng)
        logits = None
        with contextlib.suppress(PearlError):
            logits = ours(folder)
        if logits is None:
            refused += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = theirs(folder)
        assert logits.shape == wanted.shape, done
        if not wanted.isfinite().all():
            assert not logits.isfinite().all(), done
            continue
        assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max(), done
    assert 0 < refused < CHANGES
