"""An EAGLE-3 head that can be trained, on the states of a target that cannot; and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

Shape = dict[str, Any]  # as config.json has it


def shape_of(target: PreTrainedModel, draft_vocab: int, ffn: int) -> Shape:
    """``ffn`` 0: the target's."""
    config = target.config
    heads = config.num_attention_heads
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": ffn or config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": draft_vocab,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": [2, config.num_hidden_layers // 2, config.num_hidden_layers - 3],
    }


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, size = shape["hidden_size"], shape["head_dim"]
        q, kv = size * shape["num_attention_heads"], size * shape["num_key_value_heads"]
        self.q_proj, self.o_proj = nn.Linear(2 * d, q, bias=False), nn.Linear(q, d, bias=False)
        self.k_proj, self.v_proj = nn.Linear(2 * d, kv, bias=False), nn.Linear(2 * d, kv, bias=False)


class _MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, f = shape["hidden_size"], shape["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, eps = shape["hidden_size"], shape["rms_norm_eps"]
        self.hidden_norm, self.input_layernorm = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)
        self.post_attention_layernorm = nn.RMSNorm(d, eps)
        self.self_attn, self.mlp = _Attention(shape), _MLP(shape)


class TrainedHead(nn.Module):
    """Named as the published checkpoints are. ``kept``: the target's ids that it drafts, rising."""

    def __init__(self, shape: Shape, target: PreTrainedModel, kept: Sequence[int]) -> None:
        super().__init__()
        d = shape["hidden_size"]
        self.shape = shape
        self.fc = nn.Linear(3 * d, d, bias=False)
        self.midlayer = _Layer(shape)
        self.norm = nn.RMSNorm(d, shape["rms_norm_eps"])
        self.lm_head = nn.Linear(d, len(kept), bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        self.kept: Tensor
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        with torch.no_grad():  # what it draws from comes to be like what the target draws from
            self.lm_head.weight.copy_(target.get_output_embeddings().weight[self.kept])  # type: ignore[no-untyped-call]

    def rollout(self, states: Tensor, embedded: Tensor, steps: int) -> list[Tensor]:
        """Training-time test (arXiv 2503.01840): logits ``[B, n, Vd]`` of each of ``steps`` tokens behind position t.

        states: the target's ``[B, T, 3 D]``; embedded: tokens ``[B, T, D]``. Step s, at t, is of what step s - 1 made
        there, and of the token at t + 1 + s; it sees the target's features up to t, and the steps before it at t alone,
        as a window does. n = T - steps - 1.
        """
        layer, count = self.midlayer, states.shape[1] - steps - 1
        features, found = self.fc(states[:, :count]), []
        before: list[tuple[Tensor, Tensor]] = []
        for step in range(steps):
            tokens = layer.input_layernorm(embedded[:, 1 + step : 1 + step + count])
            x = torch.cat((tokens, layer.hidden_norm(features)), -1)
            attended, keys_values = self._attend(x, before, step)
            before.append(keys_values)
            features = features + attended
            x = layer.post_attention_layernorm(features)
            features = features + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
            found.append(self.lm_head(self.norm(features)))
        return found

    def _attend(
        self, x: Tensor, before: Sequence[tuple[Tensor, Tensor]], step: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        own, shape = self.midlayer.self_attn, self.shape
        size, group = shape["head_dim"], shape["num_attention_heads"] // shape["num_key_value_heads"]
        positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = (p(x).unflatten(-1, (-1, size)).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
        q, k = self._rotate(q, positions + step), self._rotate(k, positions + step)
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        every = [*before, (k, v)]
        scores = (q @ every[0][0].transpose(-1, -2)).masked_fill(positions[None, :] > positions[:, None], -torch.inf)
        along = [(q * keys).sum(-1, keepdim=True) for keys, _ in every[1:]]
        weights = (torch.cat((scores, *along), -1) * size**-0.5).softmax(-1)
        attended = weights[..., : x.shape[1]] @ every[0][1]
        for place, (_, values) in enumerate(every[1:]):
            attended = attended + weights[..., x.shape[1] + place, None] * values
        return own.o_proj(attended.transpose(1, 2).flatten(2)), (k, v)

    def _rotate(self, t: Tensor, positions: Tensor) -> Tensor:
        half = torch.arange(0, t.shape[-1], 2, device=t.device) / t.shape[-1]
        angles = torch.outer(positions, self.shape["rope_theta"] ** -half)
        cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat((-b, a), -1) * sin

    def save(self, folder: Path) -> None:
        """In the published format, in bf16."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.to("cpu", torch.bfloat16).contiguous() for name, t in self.state_dict().items()}
        kept = self.kept.cpu()
        tensors["d2t"] = kept - torch.arange(len(kept))
        tensors["t2d"] = torch.zeros(self.shape["vocab_size"], dtype=torch.bool).index_fill_(0, kept, True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.shape, indent=2) + "\n")
