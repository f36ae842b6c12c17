"""A draft model made of its target's first layers, which can be trained; its embeddings and head stay the target's.

It drafts the most frequent ids alone (FR-Spec, arXiv 2502.14856).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.drafter_training.data import Text
from bench.drafter_training.lessons import Learner, Step
from bench.drafter_training.states import StateFile
from pearl.models.draft_vocabulary import REDUCED_SIZE, TARGET_IDS

_OF_EACH_LAYER = ("layer_types", "no_rope_layers")  # lists in a configuration


class TrainedLayers(nn.Module):
    """The first ``count``, named as transformers stores a model of that family. ``kept``: the target's ids that it
    drafts, rising.
    """

    def __init__(self, target: PreTrainedModel, count: int, kept: Sequence[int]) -> None:
        super().__init__()
        config = copy.deepcopy(target.config)
        config.num_hidden_layers = count
        for name in _OF_EACH_LAYER:
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name)[:count])
        self.config = config
        self.model = type(target.base_model)(config).float()
        del self.model.embed_tokens  # the target's are given
        theirs = target.base_model.state_dict()
        self.model.load_state_dict({name: theirs[name] for name in self.model.state_dict()})
        self.kept: Tensor
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        head = target.get_output_embeddings().weight.detach()  # type: ignore[no-untyped-call]
        self.head: Tensor
        self.register_buffer("head", head[self.kept].float(), persistent=False)

    def forward(self, embedded: Tensor, begin: int) -> Tensor:
        """Logits ``[n, Vd]`` of embeddings ``[T, D]``, from ``begin`` on."""
        states = self.model(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0, begin:]
        return nn.functional.linear(states, self.head)

    def save(self, folder: Path) -> None:
        """As a folder that ``draft=`` takes, in bf16; without the target's embeddings."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        fields |= {REDUCED_SIZE: len(self.kept), "dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        tensors = {name: t.to("cpu", torch.bfloat16).contiguous() for name, t in self.state_dict().items()}
        tensors[TARGET_IDS] = self.kept.cpu()
        if not self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = self.head.to("cpu", torch.bfloat16).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class LayersLearner(Learner):
    """Teacher forcing: in a text that the target wrote every place is one where all before it was accepted."""

    most_steps = 1

    def __init__(self, module: TrainedLayers, embeddings: Tensor, states: StateFile, device: str) -> None:
        super().__init__(module, module.kept, embeddings, states, device)
        self._drafter = module

    def _shape(self) -> dict[str, Any]:
        return {"layers": self._drafter.config.num_hidden_layers}

    def steps(self, text: Text, count: int) -> list[Step]:
        given, begin = self._states.read(text), max(0, text.begin - 1)
        ids = torch.tensor(text.ids[:-1], device=self._device)
        with self._fast():
            logits = self._drafter(self._embeddings[ids], begin)
        rows = slice(begin, len(ids))
        tokens, p = (t[rows].to(self._device) for t in (given.tokens, given.probabilities))
        return [self._vocabulary.step(logits, tokens, p)]
