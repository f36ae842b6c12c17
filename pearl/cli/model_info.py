"""``pearl info --model``: what is recognised in a model, before any of its weights is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from pearl.models import ModelConfig


def model_table(path: str, device: str, dtype: torch.dtype | None) -> Table:
    """Raises ModelLoadError or UnsupportedModelError: the sentence that loading the model would end with.

    Of a local model the files' headers are checked too; of one on the hub only its description is fetched.
    """
    from rich.table import Table

    from pearl.engine.memory import gib
    from pearl.models import ModelConfig
    from pearl.models.checkpoint import stored_config
    from pearl.models.model_features import features
    from pearl.models.weight_size import read_bytes, weight_bytes

    config = ModelConfig.from_pretrained(path, dtype)
    if Path(path).exists():
        config = stored_config(Path(path), config)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("model", path)
    table.add_row("family", f"{config.architecture}, by the native decoder")
    table.add_row("shape", _shape(config))
    table.add_row("features", "; ".join(features(config)))
    table.add_row("context", f"{config.longest} tokens")
    name = str(config.dtype).removeprefix("torch.")
    held, read = (size(config, config.dtype, device=device) for size in (weight_bytes, read_bytes))
    table.add_row("weights", f"{gib(held)} in {name}" + (f"; a token reads {gib(read)}" if read < held else ""))
    if config.quantization is not None:
        table.add_row("quantised", f"with {config.quantization.method.name}")
    return table


def _shape(config: ModelConfig) -> str:
    return (
        f"{config.layers} layers of width {config.hidden}, feed-forward {config.ffn}, {config.vocab_size} rows of "
        "vocabulary"
    )
