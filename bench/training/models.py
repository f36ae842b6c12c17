"""The two models of the pair: their shapes, where they start, how far they agree, and their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.training.corpus import Corpus
from bench.training.trainer import Options


@dataclass(frozen=True)
class Shape:
    """Size of one model; written ``hidden:layers:heads:kv_heads:ffn`` on the command line."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        parts = text.split(":")
        if len(parts) != 5 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise typer.BadParameter(f"{text!r} is not hidden:layers:heads:kv_heads:ffn, five positive integers")
        return cls(*map(int, parts))

    def build(self, vocab: int) -> LlamaForCausalLM:
        config = LlamaConfig(  # type: ignore[call-arg]
            vocab_size=vocab, hidden_size=self.hidden, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=64,
            max_position_embeddings=2048, rope_theta=10000.0, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, rms_norm_eps=1e-5, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, corpus: Corpus, options: Options) -> dict[str, float]:
    """Teacher-forced on held-out code: greedy agreement, and sum(min(p, q)), the T=1 acceptance probability."""
    rng, same, overlap, count = np.random.default_rng(2), 0.0, 0.0, 0
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
        for _ in range(16):
            ids = corpus.batch(rng, options.micro_batch, options.sequence, heldout=True)[:, :-1].to(options.device)
            p, q = (m(ids).logits.float().softmax(-1) for m in (target, draft))
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            overlap += torch.minimum(p, q).sum().item()
            count += ids.numel()
    return {"greedy_agreement": same / count, "overlap": overlap / count}


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    model.float()  # type: ignore[no-untyped-call]


def load_init(folder: Path | None, name: str, shape: Shape, vocab: int) -> LlamaForCausalLM:
    if folder is not None and (folder / name / "model.safetensors").exists():
        return LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    return shape.build(vocab)
