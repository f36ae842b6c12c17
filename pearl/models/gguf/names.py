"""What a tensor of a GGUF file is called in transformers' checkpoints, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.(?P<kind>weight|bias)")


class TensorNames:
    """Of one architecture. ``own``: where its layers have other parts, or mean others by the same name."""

    def __init__(self, own: Mapping[str, str] | None = None) -> None:
        self._parts = {**_LAYER, **(own or {})}
        self._back = {theirs: ours for ours, theirs in self._parts.items()}

    def theirs(self, name: str) -> str | None:
        """transformers' name of ``blk.3.ffn_up.weight``: ``model.layers.3.mlp.up_proj.weight``; None for others."""
        if name in _OUTSIDE:
            return _OUTSIDE[name]
        match = _BLOCK.fullmatch(name)
        if match is None or match["part"] not in self._parts:
            return None
        return f"model.layers.{int(match['layer'])}.{self._parts[match['part']]}.{match['kind']}"

    def ours(self, name: str) -> str:
        """The other way; a name that no GGUF tensor has stays as it is."""
        for ours, theirs in _OUTSIDE.items():
            if name == theirs:
                return ours
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, kind = rest.rpartition(".")
        return f"blk.{layer}.{self._back[part]}.{kind}" if part in self._back else name
