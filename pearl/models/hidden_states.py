"""What a forward leaves of itself beside its logits, for drafters that read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HiddenStates:
    """Numbered as transformers' ``hidden_states``: i is the residual stream before layer i; the number of layers, that
    behind the last one after the final norm, which the head reads.

    layers: rising. rows: ``[N, len(layers), D]`` in the model's dtype, for each token of the forward that fills it.
    """

    layers: tuple[int, ...]
    rows: Tensor

    def keep(self, layer: int, states: Tensor) -> None:
        """``states``: ``[N, D]``, those of ``layer``, copied if they are wanted."""
        if layer in self.layers:
            self.rows[:, self.layers.index(layer)] = states
