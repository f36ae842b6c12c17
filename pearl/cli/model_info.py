"""``pearl info --model``: what is recognised in a model, before any of its weights is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from pearl.models import ModelConfig
    from pearl.models.transformers_backend import TransformersConfig


def model_table(path: str, device: str, dtype: torch.dtype | None) -> Table:
    """Raises ModelLoadError or UnsupportedModelError: the sentence that loading the model would end with.

    Of a local model the files' headers are checked too; of one on the hub only its description is fetched.
    """
    from rich.table import Table

    from pearl.engine.memory import gib
    from pearl.heads import HEAD_NAMES, lone_head
    from pearl.models.backend import check_weights, describe_model
    from pearl.models.model_config import ModelConfig
    from pearl.models.weight_size import read_bytes, weight_bytes

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("model", path)
    if (kind := lone_head(path)) is not None:
        table.add_row("family", f"{HEAD_NAMES[kind]}: a draft, for the target that it was trained for")
        return table
    config = describe_model(path, "auto", dtype)
    if Path(path).exists():
        config = check_weights(Path(path), config)
    for name, text in _native(config) if isinstance(config, ModelConfig) else _through_transformers(config):
        table.add_row(name, text)
    table.add_row("context", f"{config.longest} tokens")
    name = str(config.dtype).removeprefix("torch.")
    held, read = (size(config, config.dtype, device=device) for size in (weight_bytes, read_bytes))
    table.add_row("weights", f"{gib(held)} in {name}" + (f"; a token reads {gib(read)}" if read < held else ""))
    if isinstance(config, ModelConfig) and config.quantization is not None:
        table.add_row("quantised", _quantised(config, device))
        for note in config.quantization.method.notes:
            table.add_row("", note)
    return table


def _quantised(config: ModelConfig, device: str) -> str:
    """The method, and in how many bits matrices stay."""
    from pearl.models.kept_matrices import kept_matrices, packer_on

    assert config.quantization is not None
    kept = kept_matrices(config, packer_on(device, config.dtype))
    bits = sorted({form.bits for form in kept.values()})
    held = f"{len(kept)} matrices stay in {' and '.join(map(str, bits))} bits" if kept else "matrices are decoded"
    return f"with {config.quantization.method.name}; on {device} {held}"


def _native(config: ModelConfig) -> list[tuple[str, str]]:
    from pearl.models.model_features import features

    shape = (
        f"{config.layers} layers of width {config.hidden}, feed-forward {config.ffn}, {config.vocab_size} rows of "
        "vocabulary"
    )
    return [
        ("family", f"{config.architecture}, by the native decoder"),
        ("shape", shape),
        ("features", "; ".join(features(config))),
    ]


def _through_transformers(config: TransformersConfig) -> list[tuple[str, str]]:
    layers = config.attention
    windows = sorted({layer.window for layer in layers if layer.window})
    counts = [f"a window of {size} tokens in {sum(layer.window == size for layer in layers)}" for size in windows]
    attention = f"{layers[0].heads} heads, {config.kv_heads} of keys and values, of {config.head_dim}"
    return [
        ("family", f"{config.architecture}, by the transformers backend: its own module, attention on our pages"),
        ("shape", f"{config.layers} layers, {config.vocab_size} rows of vocabulary"),
        ("attention", "; ".join([attention, *(f"{count} of {len(layers)} layers" for count in counts)])),
    ]
