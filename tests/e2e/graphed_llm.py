"""An LLM whose models work on recording devices, with captured forwards, verifications and windows.

The models and kernels are real. A captured call that depended on anything but its static inputs would repeat the first
round for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from e2e_support import Rounds
from recording_queue import RecordingQueue
from torch import Tensor

from pearl import LLM
from pearl.engine.model_loading import LoadedModels
from pearl.models import Decoder
from pearl.workers import GraphRunner, ModelRunner


@dataclass
class Graphed:
    llm: LLM
    target: RecordingQueue | None
    draft: RecordingQueue | None
    rounds: Rounds

    @property
    def queues(self) -> list[RecordingQueue]:
        return [queue for queue in (self.target, self.draft) if queue]


OpenGraphed = Callable[..., Graphed]


def on_devices(
    models: LoadedModels,
    target: RecordingQueue | None,
    draft: RecordingQueue | None,
    most_rows: int = 40,
    most: tuple[int, int] = (0, 0),
) -> LoadedModels:
    """``most``: sequences, and rows of each. A model without a device stays where it is."""
    if target:
        models = replace(models, target=_on_graphs(models.target, target, most_rows, *most))
    if draft and models.draft:
        models = replace(models, draft=_on_graphs(models.draft, draft, most_rows, most[0], 1))
    return models


def _on_graphs(runner: ModelRunner, queue: RecordingQueue, most_rows: int, *limits: int) -> GraphRunner:
    model = runner.model
    attend = model.kernels.verify_attention

    def checked(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor,
                *rest: Any) -> Any:  # fmt: skip
        """Padding, and windows that have ended, may read any page; but one that is named."""
        read = torch.arange(tables.shape[1]) * keys.shape[1] < lengths[:, None]
        assert ((tables >= 0) | ~read).all()
        assert (lengths <= tables.shape[1] * keys.shape[1]).all()
        return attend(q, keys, values, tables, starts, lengths, *rest)

    kernels = queue.kernels(replace(model.kernels, verify_attention=checked))
    with torch.inference_mode():
        for tensor in (t for layer in runner.cache.layers for t in layer):
            tensor.fill_(torch.nan)
    recorded = Decoder(model.config, model.weights, model.cos_sin, kernels)
    return GraphRunner(recorded, runner.cache, runner.page_size, queue, most_rows, *limits, runner.hidden_layers)
