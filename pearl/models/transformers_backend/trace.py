"""One forward of a model without weights: which modules call attention, with what, and what else they ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pearl.errors import UnsupportedModelError
from pearl.models.transformers_backend.config import AttentionLayer
from pearl.models.transformers_backend.interface import NOT_CAUSAL, AttentionCall, bind

_TOKENS = 5
# Keyword arguments that attention gets and that change nothing of what verify_attention computes for a causal row:
# what the mask says too, and what the model was called with.
_WITHOUT_MEANING = {
    "dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip
_UNDERSTOOD = _WITHOUT_MEANING | {"scaling", "softcap"}


@dataclass(frozen=True)
class Trace:
    """``attention``: each layer's, in the order of their calls. ``vocab_size``: columns of the logits. ``hidden``: of
    its hidden states, if there is one of each token before every layer and behind the last; else 0.
    """

    attention: tuple[AttentionLayer, ...]
    vocab_size: int
    hidden: int


def trace(model: Any) -> Trace:
    """Of transformers' causal LM on the meta device, whose attention is TRACED.

    Raises UnsupportedModelError for what ``verify_attention`` over pages would not compute; whatever else the model's
    own code raises is left to the caller.
    """
    recorder = _Recorder({id(module): name for name, module in model.named_modules()})
    bind(model, recorder)
    # A mask, if only of ones, keeps transformers from looking for several texts in the positions, which have no values.
    output = model(
        input_ids=torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta"),
        attention_mask=torch.ones((1, _TOKENS), dtype=torch.int64, device="meta"),
        position_ids=torch.arange(_TOKENS, device="meta")[None],
        use_cache=False,
        output_hidden_states=True,
    )
    _require_alike(recorder.layers)
    hidden = _hidden_size(output.hidden_states, len(recorder.layers))
    return Trace(tuple(recorder.layers), output.logits.shape[-1], hidden)


def _hidden_size(states: Sequence[Tensor] | None, layers: int) -> int:
    shapes = [tuple(state.shape) for state in states or ()]
    whole = len(shapes) == layers + 1 and set(shapes) == {(1, _TOKENS, shapes[0][-1])}
    return int(shapes[0][-1]) if whole else 0


class _Recorder:
    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self.layers: list[AttentionLayer] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        (module, query, key, value, mask, options), name = call, self._names[id(call.module)]
        if any(layer.module == name for layer in self.layers):
            raise UnsupportedModelError(f"its {name} attends more than once in a forward, to different keys")
        _require_understood(name, options)
        if getattr(module, "is_causal", None) is False:  # where transformers leaves the mask out this decides
            raise UnsupportedModelError(f"its {name} is not causal (is_causal)")
        (_, heads, rows, head_dim), (_, kv_heads, keys, _) = query.shape, key.shape
        if value.shape != key.shape or key.shape[-1] != head_dim:
            raise UnsupportedModelError(
                f"its {name} has keys of {list(key.shape[1:])} and values of {list(value.shape[1:])} for queries of "
                f"{list(query.shape[1:])} (heads, tokens, size): a KV page has room for one size of them"
            )
        if (rows, keys) != (_TOKENS, _TOKENS) or heads % kv_heads:
            raise UnsupportedModelError(
                f"its {name} lets {rows} rows of {heads} heads attend to {keys} keys of {kv_heads} heads"
            )
        self.layers.append(AttentionLayer(name, heads, kv_heads, head_dim, _window_of(name, mask)))
        return query.transpose(1, 2)


def _require_understood(name: str, options: Mapping[str, Any]) -> None:
    others = sorted(key for key, value in options.items() if value is not None and key not in _UNDERSTOOD)
    if others:
        raise UnsupportedModelError(
            f"its {name} gives attention {', '.join(others)}, of which the verify_attention operator knows nothing"
        )
    if options.get("dropout") or options.get("is_causal") is False:
        raise UnsupportedModelError(f"its {name} attends with dropout, or not only to the past")
    for key in ("scaling", "softcap"):
        if isinstance(options.get(key), Tensor):
            raise UnsupportedModelError(f"its {name} gives attention a {key} that is a tensor, not one number")


def _window_of(name: str, mask: Tensor | None) -> int:
    """What ``interface._mask`` put in the mask's place."""
    ours = mask is not None and mask.dtype is torch.int64 and mask.numel() == 1 and mask.device.type == "cpu"
    if mask is None or not ours:
        raise UnsupportedModelError(f"its {name} makes its attention's mask itself, so that it cannot be read")
    if (window := int(mask)) == NOT_CAUSAL:
        raise UnsupportedModelError(
            f"its {name} does not attend to all of the past, or the last tokens of it: neither causal attention nor a "
            "sliding window"
        )
    return window


def _require_alike(layers: list[AttentionLayer]) -> None:
    for layer in layers:
        first = layers[0]
        if (layer.kv_heads, layer.head_dim) != (first.kv_heads, first.head_dim):
            raise UnsupportedModelError(
                f"its {first.module} has {first.kv_heads} KV heads of {first.head_dim}, its {layer.module} "
                f"{layer.kv_heads} of {layer.head_dim}: all layers' pages must be of one size"
            )
