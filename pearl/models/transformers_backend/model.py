"""A causal LM that transformers' own module computes, all but its attention; it stands where a ``Decoder`` stands."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pearl.models.forward_batch import ForwardBatch
from pearl.models.hidden_states import HiddenStates
from pearl.models.kv_cache import KVCache
from pearl.models.transformers_backend.config import TransformersConfig
from pearl.models.transformers_backend.interface import bind
from pearl.models.transformers_backend.paged_attention import PagedAttention
from pearl_kernels import KernelSet


class TransformersModel:
    """Stateless between forwards. Call it in torch.inference_mode.

    The tokens of all sequences are one flat text to the module, with a position each: what does not attend works on
    each token alone. ``probe`` makes sure of that before the model is accepted.
    """

    def __init__(self, module: Any, config: TransformersConfig, kernels: KernelSet) -> None:
        self.config, self.kernels, self._module = config, kernels, module
        self._attention = PagedAttention(module, config, kernels.verify_attention)
        bind(module, self._attention)
        self._keeps_rows = "logits_to_keep" in inspect.signature(module.forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype

    def forward(self, batch: ForwardBatch, cache: KVCache, hidden: HiddenStates | None = None) -> Tensor:
        """Compute all N tokens, write their keys and values, fill ``hidden``, and return logits ``[M, V]`` of
        batch.logits_rows.
        """
        rows, ids = batch.logits_rows, self._known(batch.input_ids)[None]
        some = {"logits_to_keep": rows} if self._keeps_rows else {}
        with self._attention.over(batch, cache):
            output = self._module(
                input_ids=ids,
                # Attention does not read it. Without it some modules look, on the host, whether ids are padding.
                attention_mask=torch.ones_like(ids),
                position_ids=batch.positions[None],
                use_cache=False,
                output_hidden_states=hidden is not None,
                **some,
            )
        if hidden is not None:
            for layer in hidden.layers:
                hidden.keep(layer, output.hidden_states[layer][0])
        logits: Tensor = output.logits[0] if self._keeps_rows else output.logits[0, rows]
        logits = logits[:, : self.config.known_ids].to(self.dtype)
        missing = self.config.vocab_size - self.config.known_ids
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits.contiguous()

    def new_hidden(self, rows: int, layers: tuple[int, ...]) -> HiddenStates:
        """Uninitialised, for a forward of so many tokens."""
        states = torch.empty(rows, len(layers), self.config.hidden, dtype=self.dtype, device=self._module.device)
        return HiddenStates(layers, states)

    def embed(self, ids: Tensor) -> Tensor:
        """``[N, D]`` for int64 ids ``[N]``."""
        rows: Tensor = self._module.get_input_embeddings()(self._known(ids))
        return rows

    def _known(self, ids: Tensor) -> Tensor:
        """Ids that a draft lacks are read as its first: it never drafts them, and no output depends on them."""
        known = self.config.known_ids
        return ids if known == self.config.vocab_size else ids.masked_fill(ids >= known, 0)
