"""Weights from a checkpoint into transformers' own module, in the engine's dtype, and the module onto our pages."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pearl.errors import ModelLoadError
from pearl.models.hub import fetch_weights
from pearl.models.model_files import first_line, listed
from pearl.models.model_folder import ModelFolder
from pearl.models.quantization import refuse_quantized_tensors
from pearl.models.transformers_backend.config import TransformersConfig
from pearl.models.transformers_backend.describe import read
from pearl.models.transformers_backend.interface import PAGED, register
from pearl.models.transformers_backend.model import TransformersModel
from pearl.models.transformers_backend.probe import probe
from pearl_kernels import KernelSet

# Masks and frequencies that older checkpoints store, and that classes compute themselves now.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attention\.bias|(attn|attention)\.masked_bias)$")


def load(
    path: str | Path,
    config: TransformersConfig,
    *,
    device: torch.device,
    kernels: KernelSet,
    page_size: int,
) -> TransformersModel:
    """Load a model that ``describe`` accepted; its weights are read once, in ``config.dtype``.

    Raises ModelLoadError if tensors are missing, of another shape, or not the model's; UnsupportedModelError if it does
    not compute on pages what it computes by itself (``probe``).
    """
    folder = fetch_weights(str(path))
    check_files(folder)
    with torch.inference_mode(False), torch.no_grad():
        module = _module(folder, config).to(device).eval()
    model = TransformersModel(module, config, kernels)
    with torch.inference_mode():
        probe(model, module, config, page_size)
    return model


def check_files(folder: Path) -> None:
    """Raises ModelLoadError if there are no weights that can be read, UnsupportedModelError if they are quantised."""
    with ExitStack() as stack:
        tensors = ModelFolder(str(folder)).open(stack)
        stored = {name: values.get_dtype() for name, values in tensors if not _COMPUTED.search(name)}
    refuse_quantized_tensors(folder, stored, stored)


def _module(folder: Path, config: TransformersConfig) -> Any:
    from transformers import AutoModelForCausalLM

    register()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=read(folder),
            dtype=config.dtype,
            attn_implementation=PAGED,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # files that are damaged, tensors that do not fit: whatever these run into
        raise ModelLoadError(f"{folder}: transformers cannot load these weights: {first_line(error)}") from error
    module, found = loaded
    _require_whole(folder, config, found)
    return module


def _require_whole(folder: Path, config: TransformersConfig, found: Any) -> None:
    """transformers fills what is missing with random numbers, and leaves out what it does not know."""
    for key, wrong in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        if names := sorted(str(name[0] if isinstance(name, tuple) else name) for name in found.get(key, ())):
            raise ModelLoadError(
                f"{folder} {wrong} {listed(names)}, of transformers' {config.architecture}: its output would be garbage"
            )
    if names := sorted(name for name in found.get("unexpected_keys", ()) if not _COMPUTED.search(name)):
        raise ModelLoadError(
            f"{folder} holds {listed(names)}, of which transformers' {config.architecture} with this "
            "config.json makes no use: its output would be wrong"
        )
