"""Folders with a model, what is done to them, and what transformers and our decoder make of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from families import build, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pearl.messages import ForwardWork, SequenceState
from pearl.models import KVCache
from pearl.sampling_params import SamplingParams
from pearl.workers.model_runner import build_batch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT = (5, 17, 99, 3, 64, 12, 130, 0)


def save(name: str, folder: Path) -> dict[str, Tensor]:
    """Save a family's random model in one file; returns its tensors."""
    build(name).save_pretrained(folder)
    return load_file(folder / SINGLE)


def write(folder: Path, tensors: Mapping[str, Tensor], name: str = SINGLE) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})


def rewrite(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace or add tensors; None removes one."""
    tensors = load_file(folder / SINGLE)
    for name, tensor in changes.items():
        tensors.pop(name, None) if tensor is None else tensors.update({name: tensor})
    write(folder, tensors)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_as_transformers(folder: Path, plain: Path | None = None, prefer: Mapping[str, str] | None = None) -> None:
    """The logits of a short text are those of transformers' class on the same folder, or on a plain one.

    ``prefer``: providers of operators.
    """
    assert_logits(folder, AutoModelForCausalLM.from_pretrained(plain or folder, dtype=torch.float32).eval(), prefer)


def assert_logits(path: Path, judge: PreTrainedModel, prefer: Mapping[str, str] | None = None) -> None:
    """Of what is loaded from there: those of a model of transformers."""
    with torch.inference_mode():
        wanted = judge(torch.tensor([_TEXT])).logits
        decoder = load(path, prefer=prefer)
        cache = KVCache.allocate(decoder.config, 1, 16, torch.float32, torch.device("cpu"))
        state = SequenceState(0, 0, SamplingParams(), 0, 0, None)
        batch = build_batch([ForwardWork(state, _TEXT, 0, len(_TEXT), (0,))], 16, torch.device("cpu"))
        logits = decoder.forward(batch, cache)
    assert (logits - wanted[0]).abs().max() <= 2e-5 * wanted.abs().max()
