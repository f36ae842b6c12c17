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

from bench.drafter_training.data import Text
from bench.drafter_training.lessons import Learner, Step
from bench.drafter_training.states import StateFile

Shape = dict[str, Any]  # as config.json has it


def read_layers(target: PreTrainedModel) -> list[int]:
    """Whose states a head reads: EAGLE's own choice."""
    count = target.config.num_hidden_layers
    return [2, count // 2, count - 3]


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
        "eagle_aux_hidden_state_layer_ids": read_layers(target),
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
        self._begin_as(target)

    @torch.no_grad()
    def _begin_as(self, target: PreTrainedModel) -> None:
        """As far as the shapes allow it: the target's last layer, on the last of the features, and its vocabulary."""
        d = self.shape["hidden_size"]
        self.lm_head.weight.copy_(target.get_output_embeddings().weight[self.kept])  # type: ignore[no-untyped-call]
        self.fc.weight[:, -d:] += torch.eye(d)
        if (norm := getattr(target.base_model, "norm", None)) is not None:
            self.norm.weight.copy_(norm.weight)
        last = dict(target.base_model.get_submodule(f"layers.{target.config.num_hidden_layers - 1}").named_parameters())
        for name, own in self.midlayer.named_parameters():
            theirs = last.get({"hidden_norm.weight": "input_layernorm.weight"}.get(name, name))
            if theirs is None or name == "input_layernorm.weight":
                continue
            if theirs.shape == own.shape:
                own.copy_(theirs)
            elif own.ndim == 2 and own.shape == (theirs.shape[0], 2 * theirs.shape[1]):
                own[:, d:].copy_(theirs)  # the token's half stays small

    def rollout(self, states: Tensor, embedded: Tensor, steps: int, begin: int = 0) -> list[Tensor]:
        """``lm_head`` of ``outputs``: logits ``[B, n, Vd]``."""
        return [self.lm_head(output) for output in self.outputs(states, embedded, steps, begin)]

    def outputs(self, states: Tensor, embedded: Tensor, steps: int, begin: int = 0) -> list[Tensor]:
        """Training-time test (arXiv 2503.01840): what ``lm_head`` reads, ``[B, n, D]``, for each of ``steps`` tokens
        behind position t, for t from ``begin`` on.

        states: the target's ``[B, T, 3 D]``; embedded: tokens ``[B, T, D]``. Step s, at t, is of what step s - 1 made
        there, and of the token at t + 1 + s; it sees the target's features up to t, and the steps before it at t alone,
        as a window does. n = T - steps - 1 - begin.
        """
        layer, count = self.midlayer, states.shape[1] - steps - 1
        features, found = self.fc(states[:, :count]), []
        past = self._inputs(embedded[:, 1 : 1 + count], features)  # what is before begin is only looked at
        features, x = features[:, begin:], past[:, begin:]
        before = [self._keys_values(past, torch.arange(count, device=x.device))]
        positions = torch.arange(begin, count, device=x.device)
        for step in range(steps):
            if step:
                x = self._inputs(embedded[:, 1 + step + begin : 1 + step + count], features)
                before.append(self._keys_values(x, positions + step))
            features = features + self._attend(x, before, positions, step)
            x = layer.post_attention_layernorm(features)
            features = features + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
            found.append(self.norm(features))
        return found

    def _inputs(self, embedded: Tensor, features: Tensor) -> Tensor:
        return torch.cat((self.midlayer.input_layernorm(embedded), self.midlayer.hidden_norm(features)), -1)

    def _keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        own, shape = self.midlayer.self_attn, self.shape
        group = shape["num_attention_heads"] // shape["num_key_value_heads"]
        k, v = (self._heads(p(x)) for p in (own.k_proj, own.v_proj))
        return self._rotate(k, positions).repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.shape["head_dim"]).transpose(1, 2)

    def _attend(self, x: Tensor, before: Sequence[tuple[Tensor, Tensor]], positions: Tensor, step: int) -> Tensor:
        own, (past, past_values) = self.midlayer.self_attn, before[0]
        q = self._rotate(self._heads(own.q_proj(x)), positions + step)
        later = torch.arange(past.shape[2], device=x.device) > positions[:, None]
        scores = (q @ past.transpose(-1, -2)).masked_fill(later, -torch.inf)
        along = [(q * keys).sum(-1, keepdim=True) for keys, _ in before[1:]]
        weights = (torch.cat((scores, *along), -1) * self.shape["head_dim"] ** -0.5).softmax(-1)
        attended = weights[..., : past.shape[2]] @ past_values
        for place, (_, values) in enumerate(before[1:]):
            attended = attended + weights[..., past.shape[2] + place, None] * values
        projected: Tensor = own.o_proj(attended.transpose(1, 2).flatten(2))
        return projected

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


class HeadLearner(Learner):
    """A window is rolled out on the head's own states, at every place of an answer."""

    most_steps = 8

    def __init__(self, module: TrainedHead, embeddings: Tensor, states: StateFile, device: str) -> None:
        super().__init__(module, module.kept, embeddings, states, device)
        self._drafter = module

    def _shape(self) -> dict[str, Any]:
        return dict(self._drafter.shape)

    def steps(self, text: Text, count: int) -> list[Step]:
        """At the places whose next but one token is of the answer."""
        begin, given = max(0, text.begin - 2), self._states.read(text)
        ids = torch.tensor([text.ids], device=self._device)
        read, last = given.states[None].to(self._device).tensor_split([self._drafter.fc.in_features], -1)
        with self._fast():
            found = self._drafter.outputs(read, self._embeddings[ids], count, begin)
            drafted = [self._drafter.lm_head(output) for output in found]
        every = []
        for step, (output,) in enumerate(found):
            rows = slice(begin + 1 + step, begin + 1 + step + len(output))  # of the token at t + 2 + step
            wanted, tokens, p = last[0, rows], given.tokens[rows], given.probabilities[rows]
            apart = (output.float() - wanted).square().sum(-1) / wanted.square().sum(-1)
            every.append(self._vocabulary.step(drafted[step][0], tokens.to(output.device), p.to(output.device), apart))
        return every
