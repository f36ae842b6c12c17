"""A model's attention over its KV pages: what its modules call in a forward of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pearl.models.forward_batch import ForwardBatch
from pearl.models.kv_cache import KVCache
from pearl.models.transformers_backend.config import TransformersConfig
from pearl.models.transformers_backend.interface import AttentionCall


class PagedAttention:
    """Of one model; it belongs to the model's worker. Holds no module: they hold it (``interface.bind``)."""

    def __init__(self, model: nn.Module, config: TransformersConfig, verify_attention: Callable[..., Any]) -> None:
        self._layer = {id(model.get_submodule(layer.module)): i for i, layer in enumerate(config.attention)}
        self._windows = [layer.window for layer in config.attention]
        self._verify_attention = verify_attention
        self._forward: tuple[ForwardBatch, KVCache] | None = None
        self._called: list[int] = []

    @contextmanager
    def over(self, batch: ForwardBatch, cache: KVCache) -> Iterator[None]:
        """Around a forward: its tokens and their pages. Raises RuntimeError unless each layer has attended once."""
        self._forward, self._called = (batch, cache), []
        try:
            yield
            if self._called != list(range(len(self._windows))):
                raise RuntimeError(
                    f"layers attended in the order {self._called}, not each once: no output can be exact"
                )
        finally:
            self._forward = None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Writes keys and values to the tokens' slots, and attends through block tables."""
        assert self._forward is not None  # modules run within ``over``
        batch, cache = self._forward
        layer = self._layer[id(call.module)]
        self._called.append(layer)
        keys, values = cache.layers[layer]
        # Every row has a slot: those without one are padding of captured forwards, and these are never captured.
        keys.flatten(0, 1).index_copy_(0, batch.slot_mapping, call.key[0].transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, batch.slot_mapping, call.value[0].transpose(0, 1))
        scale, softcap = call.options.get("scaling"), call.options.get("softcap")
        attended: Tensor = self._verify_attention(
            call.query[0].transpose(0, 1).contiguous(), keys, values, batch.block_tables, batch.query_start,
            batch.context_lens, call.query.shape[-1] ** -0.5 if scale is None else scale, self._windows[layer],
            0.0 if softcap is None else softcap, batch.most_rows,
        )  # fmt: skip
        return attended[None]
