"""Random small models, what transformers says about them, and the settings that every exactness test runs through.

The models are random but not featureless: weights are scaled so that greedy margins are wide and the continuation
keeps changing; a draft is a perturbed (or truncated) copy of its target, so that it is right often, but not always.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pearl import LLM
from pearl.drafting import ModelDrafter
from pearl.engine.rounds import RoundRecord
from pearl.outputs import RequestOutput

VOCAB = 300  # ids that the tokenizer knows; models may have more columns
KNOWN = 258  # ids that a draft of a smaller vocabulary knows
EOS = 0
# fp32 logits of two implementations differ by about 1e-5; a wider margin is decided the same way by both.
DECISIVE_MARGIN = 1e-4

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, rope_parameters=_LLAMA3_ROPE),
    "mistral": MistralConfig(**{**SHAPE, "num_key_value_heads": 1, "vocab_size": VOCAB + 20}, sliding_window=24),
    "qwen2": Qwen2Config(**{**SHAPE, "tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**{**SHAPE, "tie_word_embeddings": True, "head_dim": 32, "vocab_size": VOCAB + 12}),
}


def random_model(config: Any, seed: int) -> PreTrainedModel:
    """Updates to the residual stream dominate the embedding: tied models would otherwise repeat their input."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("model.norm.weight"):
            value = (1 + 0.2 * noise) * (4.0 if config.tie_word_embeddings else 1.0)
        elif "norm" in name:
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = 0.1 * noise
        elif "lm_head" in name:
            value = 0.4 * noise
        else:
            value = noise * 1.5 / weight.shape[-1] ** 0.5
        weight.data.copy_(value)
    return model


def perturbed(model: PreTrainedModel, amount: float, seed: int = 1000) -> PreTrainedModel:
    """A draft that mostly agrees: every weight moved by ``amount`` times its tensor's own spread."""
    generator = torch.Generator().manual_seed(seed)
    draft = copy.deepcopy(model)
    for weight in draft.parameters():
        weight.data += amount * weight.data.std() * torch.randn(weight.shape, generator=generator)
    return draft


def byte_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, the end of text, and a few merges learned from this file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text("utf-8")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path, **generation: Any) -> str:
    """``generation`` overrides fields of generation_config.json, for example eos_token_id."""
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@dataclass(frozen=True)
class Reference:
    """Greedy decoding by transformers. ``decisive``: leading tokens before the first near-tie."""

    tokens: list[int]
    decisive: int


@dataclass
class Pair:
    """A target and a draft on disk, with the target's transformers model as the judge."""

    name: str
    target: str
    draft: str
    judge: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    _known: dict[tuple[int, ...], Reference] = field(default_factory=dict)

    def llm(self, **options: Any) -> LLM:
        return LLM(**{"target": self.target, "draft": self.draft, "device": "cpu", "dtype": "float32", **options})

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """``count`` tokens that transformers generates past any end of text; near-ties would be a test's fault."""
        reference = self.reference(prompt, count)
        assert reference.decisive >= count, f"{self.name}: a near-tie at {reference.decisive}; choose another seed"
        return reference.tokens[:count]

    def reference(self, prompt: Sequence[int], count: int) -> Reference:
        key = tuple(prompt)
        known = self._known.get(key)
        if known is None or len(known.tokens) < count:
            known = self._known[key] = greedy_reference(self.judge, key, count)
        return known


def greedy_reference(
    judge: PreTrainedModel, prompt: Sequence[int], count: int, margin: float = DECISIVE_MARGIN, **options: Any
) -> Reference:
    """transformers' ``generate`` without padding tokens; goes on after an end of text unless given ``eos_token_id``."""
    ids = torch.tensor([list(prompt)])
    padding = list(range(VOCAB, judge.config.vocab_size)) if VOCAB < judge.config.vocab_size < 2 * VOCAB else []
    with torch.inference_mode():
        out = judge.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            return_dict_in_generate=True,
            output_scores=True,
            **{"eos_token_id": None, "suppress_tokens": padding or None, **options},
        )
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    best = torch.cat(out.scores).topk(2).values
    narrow = (best[:, 0] - best[:, 1] < margin).nonzero().flatten().tolist()
    return Reference(tokens, narrow[0] if narrow else len(tokens))


def prompts(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (length,), generator=generator).tolist() for length in lengths]


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def acceptance(outputs: Sequence[RequestOutput]) -> float:
    """Of all outputs together: accepted per tested token."""
    metrics = [completion.metrics for output in outputs for completion in output.outputs]
    return sum(m.accepted for m in metrics) / max(1, sum(m.tested for m in metrics))


def assert_at_rest(llm: LLM) -> None:
    """No request, no reader, no page and no lane is held, and the page tables are sound."""
    assert not llm._driver._readers
    scheduler = llm.engine.scheduler
    assert not scheduler.has_work
    assert not scheduler.requests
    for kv in filter(None, (scheduler.target_kv, scheduler.draft_kv)):
        kv.check_integrity()
        assert kv.num_free_pages == kv.num_pages


def poison_ring(llm: LLM) -> None:
    """NaN wherever drafted tokens' logits will be kept: what is not written must not be read."""
    drafter = llm.engine.workers.drafter
    assert isinstance(drafter, ModelDrafter)
    model = drafter._runner.model
    drafter._ring.allocate(model.config.vocab_size, model.dtype, llm.models.target.queue.device).fill_(torch.nan)


class Rounds(list[RoundRecord]):
    """An observer that keeps every round."""

    def __call__(self, record: RoundRecord) -> None:
        self.append(record)


PEARL_SETTINGS: dict[str, dict[str, Any]] = {
    **{f"pearl-{window}": {"window": window} for window in (1, 2, 3, 5, 8, "auto")},
    **{f"pearl-no-pre-{window}": {"window": window, "pre_verify": False} for window in (1, 3)},
    **{f"pearl-no-post-{window}": {"window": window, "post_verify": False} for window in (1, 3)},
    **{f"pearl-neither-{window}": {"window": window, "pre_verify": False, "post_verify": False} for window in (1, 4)},
}
PREPARED_SETTINGS: dict[str, dict[str, Any]] = {
    "prepared-2": {"window": 2, "prepared_windows": 3},
    "prepared-5": {"window": 5, "prepared_windows": 8},
    "prepared-auto": {"prepared_windows": 4},
    "prepared-no-pre-3": {"window": 3, "pre_verify": False, "prepared_windows": 4},
    "prepared-no-post-3": {"window": 3, "post_verify": False, "prepared_windows": 4},
}
SPECULATIVE_SETTINGS: dict[str, dict[str, Any]] = {
    f"speculative-{window}": {"method": "speculative", "window": window} for window in (1, 3, 5, "auto")
}
NGRAM_SETTINGS: dict[str, dict[str, Any]] = {
    "ngram-pearl": {"draft": "ngram", "window": 3},
    "ngram-no-pre": {"draft": "ngram", "window": 3, "pre_verify": False},
    "ngram-speculative": {"draft": "ngram", "window": 3, "method": "speculative"},
}
DRAFTING_SETTINGS = {**PEARL_SETTINGS, **PREPARED_SETTINGS, **SPECULATIVE_SETTINGS}
ALL_SETTINGS = {"autoregressive": {"method": "autoregressive"}, **DRAFTING_SETTINGS, **NGRAM_SETTINGS}
