"""EAGLE-3 and Medusa in plain torch, as their papers and published checkpoints have them; made, taught and saved.

A head that is to be right now and then is taught the very texts that the tests will see: that takes a second or two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

Tensors = dict[str, Tensor]
TARGET_LAYERS = (0, 2, 3)  # of a target of four, none of them the default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def eagle_shape(judge: PreTrainedModel, **changes: Any) -> dict[str, Any]:
    """config.json of a head for a target."""
    config = judge.config
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.vocab_size - 40 if config.vocab_size > 100 else config.vocab_size - 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": list(TARGET_LAYERS),
        **changes,
    }  # fmt: skip


def random_eagle(shape: Mapping[str, Any], seed: int, kept: Sequence[int] | None = None) -> Tensors:
    """``kept``: the target's ids that it drafts; None: any, as many as the shape says."""
    generator = torch.Generator().manual_seed(seed)
    d, f, v, vd = (shape[n] for n in ("hidden_size", "intermediate_size", "vocab_size", "draft_vocab_size"))
    q, kv = (shape[n] * shape["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm() -> Tensor:
        return 1 + 0.2 * torch.randn(d, generator=generator)

    ids = torch.randperm(v, generator=generator)[:vd].sort().values if kept is None else torch.tensor(sorted(kept))
    return {
        "fc.weight": matrix(d, 3 * d),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        "midlayer.self_attn.q_proj.weight": matrix(q, 2 * d),
        "midlayer.self_attn.k_proj.weight": matrix(kv, 2 * d),
        "midlayer.self_attn.v_proj.weight": matrix(kv, 2 * d),
        "midlayer.self_attn.o_proj.weight": matrix(d, q),
        "midlayer.mlp.gate_proj.weight": matrix(f, d),
        "midlayer.mlp.up_proj.weight": matrix(f, d),
        "midlayer.mlp.down_proj.weight": matrix(d, f),
        "norm.weight": norm(),
        "lm_head.weight": 3 * matrix(vd, d),
        "d2t": ids - torch.arange(vd),
        "t2d": torch.zeros(v, dtype=torch.bool).index_fill_(0, ids, True),
    }


class PlainEagle:
    """The head on a whole text at once: row i is of the feature at i and the token at i + 1."""

    def __init__(self, shape: Mapping[str, Any], tensors: Tensors, embedding: Tensor) -> None:
        self.shape, self.tensors = shape, tensors
        self.embedding = tensors.get("embed_tokens.weight", embedding)

    def features(self, states: Tensor) -> Tensor:
        """Of the target's hidden states ``[n, 3, D]``."""
        return states.flatten(1) @ self.tensors["fc.weight"].T

    def outputs(self, features: Tensor, tokens: Tensor) -> Tensor:
        """``[n, D]`` for features ``[n, D]`` and the tokens behind them ``[n]``."""
        own = {name.removeprefix("midlayer."): tensor for name, tensor in self.tensors.items()}
        eps, n = self.shape["rms_norm_eps"], len(tokens)
        normed = rms_norm(features, own["hidden_norm.weight"], eps)
        x = torch.cat((rms_norm(self.embedding[tokens], own["input_layernorm.weight"], eps), normed), -1)
        residual = (normed if self.shape.get("norm_before_residual") else features) + self._attention(own, x, n)
        x = rms_norm(residual, own["post_attention_layernorm.weight"], eps)
        gated = F.silu(x @ own["mlp.gate_proj.weight"].T) * (x @ own["mlp.up_proj.weight"].T)
        return residual + gated @ own["mlp.down_proj.weight"].T

    def _attention(self, own: Tensors, x: Tensor, n: int) -> Tensor:
        size, positions = self.shape["head_dim"], torch.arange(n)
        heads = self.shape["num_attention_heads"], self.shape["num_key_value_heads"]
        q, k, v = (
            (x @ own[f"self_attn.{name}_proj.weight"].T + own.get(f"self_attn.{name}_proj.bias", 0)).view(n, -1, size)
            for name in "qkv"
        )
        angles = torch.outer(positions, self.shape["rope_theta"] ** (-torch.arange(0, size, 2) / size))
        cos, sin = (f(torch.cat((angles, angles), -1))[:, None] for f in (torch.cos, torch.sin))

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat((-b, a), -1) * sin

        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads[0] // heads[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * size**-0.5
        scores = scores.masked_fill(positions[None, :] > positions[:, None], -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        return attended @ own["self_attn.o_proj.weight"].T + own.get("self_attn.o_proj.bias", 0)

    def logits(self, outputs: Tensor) -> Tensor:
        """Over the target's ids."""
        own = (
            rms_norm(outputs, self.tensors["norm.weight"], self.shape["rms_norm_eps"])
            @ self.tensors["lm_head.weight"].T
        )
        if "d2t" not in self.tensors:
            return own
        whole = own.new_full((*own.shape[:-1], self.shape["vocab_size"]), -torch.inf)
        whole[:, torch.arange(own.shape[-1]) + self.tensors["d2t"]] = own
        return whole


def hidden_states(judge: PreTrainedModel, ids: Sequence[int], layers: Sequence[int]) -> Tensor:
    """``[n, layers, D]``"""
    with torch.no_grad():
        states = judge(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return torch.stack([states[layer][0] for layer in layers], 1)


def random_medusa(judge: PreTrainedModel, heads: int, blocks: int, seed: int) -> Tensors:
    generator, d = torch.Generator().manual_seed(seed), judge.config.hidden_size
    tensors = {}
    for head in range(heads):
        for block in range(blocks):
            tensors[f"{head}.{block}.linear.weight"] = torch.randn(d, d, generator=generator) * d**-0.5
            tensors[f"{head}.{block}.linear.bias"] = 0.3 * torch.randn(d, generator=generator)
        tensors[f"{head}.{blocks}.weight"] = torch.randn(judge.config.vocab_size, d, generator=generator) * d**-0.5
    return tensors


def plain_medusa(tensors: Tensors, blocks: int, head: int, states: Tensor) -> Tensor:
    """``[n, V]`` for last hidden states ``[n, D]``."""
    for block in range(blocks):
        name = f"{head}.{block}.linear"
        states = states + F.silu(states @ tensors[name + ".weight"].T + tensors[name + ".bias"])
    return states @ tensors[f"{head}.{blocks}.weight"].T


def teach_eagle(plain: PlainEagle, judge: PreTrainedModel, texts: Sequence[Sequence[int]], steps: int = 60) -> None:
    """Cross entropy of the tokens to come, on the target's features and twice on what it makes of them itself."""
    trained = [t.requires_grad_() for t in plain.tensors.values() if t.is_floating_point()]
    optimizer, place = torch.optim.Adam(trained, lr=0.01), torch.full((plain.shape["vocab_size"],), -100)
    ids = torch.arange(plain.shape["draft_vocab_size"]) + plain.tensors["d2t"]
    place[ids] = torch.arange(len(ids))
    states = [hidden_states(judge, text, plain.shape["eagle_aux_hidden_state_layer_ids"]) for text in texts]
    for _ in range(steps):
        loss = torch.zeros(())
        for text, state in zip(texts, states, strict=True):
            features, tokens = plain.features(state), torch.tensor(text)
            for shift in range(3):
                outputs = plain.outputs(features[: len(tokens) - 1 - shift], tokens[1 + shift :])
                wanted = place[tokens[2 + shift :]]
                logits = plain.logits(outputs[:-1])[:, ids]
                loss = loss + F.cross_entropy(logits, wanted, ignore_index=-100) * (wanted >= 0).any()
                features = outputs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for tensor in trained:
        tensor.requires_grad_(False)


def teach_medusa(
    tensors: Tensors, blocks: int, judge: PreTrainedModel, texts: Sequence[Sequence[int]], steps: int = 60
) -> None:
    heads = len({name.split(".")[0] for name in tensors})
    optimizer = torch.optim.Adam([t.requires_grad_() for t in tensors.values()], lr=0.02)
    states = [hidden_states(judge, text, [judge.config.num_hidden_layers])[:, 0] for text in texts]
    for _ in range(steps):
        loss = torch.zeros(())
        for text, state in zip(texts, states, strict=True):
            for head in range(heads):
                logits = plain_medusa(tensors, blocks, head, state[: -2 - head])
                loss = loss + F.cross_entropy(logits, torch.tensor(text[2 + head :]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for tensor in tensors.values():
        tensor.requires_grad_(False)


def save_head(folder: Path, shape: Mapping[str, Any], tensors: Tensors, name: str = "model.safetensors") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    return str(folder)
