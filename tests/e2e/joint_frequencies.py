"""The exact joint distribution of a few tokens of a small model, and whether samples have it.

Eight tokens, so that all 8**5 continuations of a prompt can be weighed with transformers in fp64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from e2e_support import Pair, perturbed, random_model, save
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pearl import SamplingParams

V, DEPTH, SAMPLES = 8, 5, 1500
PROMPT = [3, 1, 6]
MARGINALS = ((0, 1, 2), (0, 1), (1, 2), (2, 3, 4), (3, 4))
ALARM, PROOF = 1e-4, 1e-6
CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)


def small_pair(root: Path, draft_tokens: int = V) -> Pair:
    """A draft that knows the first ``draft_tokens`` of the eight tokens."""
    judge = random_model(CONFIG, seed=2)
    draft = perturbed(judge, 0.4)
    if draft_tokens < V:
        draft.resize_token_embeddings(draft_tokens)
    target = save(judge, letters(V), root / "target")
    return Pair("small", target, save(draft, letters(draft_tokens), root / "draft"), judge, letters(V))


def letters(count: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<eos>": 0, **{chr(96 + i): i for i in range(1, count)}}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def exact_joint(pair: Pair, params: SamplingParams) -> Tensor:
    """fp64 ``[V] * DEPTH``: probability of every continuation of PROMPT, by transformers' own warpers."""
    warpers = LogitsProcessorList()
    if params.repetition_penalty != 1:
        warpers.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.logit_bias:
        warpers.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias.items()]))
    warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    prefixes = torch.cartesian_prod(*[torch.arange(V)] * (DEPTH - 1))
    ids = torch.cat((torch.tensor(PROMPT).expand(len(prefixes), -1), prefixes), dim=1)
    with torch.inference_mode():
        logits = pair.judge(ids).logits[:, len(PROMPT) - 1 :].double()
    scores = [warpers(ids[:, : len(PROMPT) + depth], logits[:, depth]) for depth in range(DEPTH)]
    log_p = torch.stack(scores, dim=1).log_softmax(-1)
    taken = log_p[:, :-1].gather(2, prefixes[..., None])[..., 0].sum(-1)
    return (taken[:, None] + log_p[:, -1]).exp().reshape([V] * DEPTH)


def p_value(samples: Sequence[Sequence[int]], joint: Tensor, axes: tuple[int, ...]) -> float:
    """Pearson's chi-square for the tokens at ``axes``; cells that expect fewer than 5 are pooled."""
    others = [axis for axis in range(DEPTH) if axis not in axes]
    expected = (joint.sum(others) * len(samples)).flatten()
    counts = Counter(tuple(sample[axis] for axis in axes) for sample in samples)
    observed = torch.zeros(expected.shape, dtype=torch.float64)
    for cell, count in counts.items():
        observed[sum(token * V ** (len(axes) - 1 - i) for i, token in enumerate(cell))] = count
    assert not observed[expected == 0].any(), "a token of probability zero was drawn"
    order = expected.argsort(descending=True)
    observed, expected = observed[order], expected[order]
    large = int((expected >= 5).sum())
    large -= bool(expected[large:].sum() < 5)  # too little for a pool of its own: join the smallest of the others
    sizes = [1] * large + [len(expected) - large]
    o, e = (torch.stack([part.sum() for part in values.split(sizes)]) for values in (observed, expected))
    degrees, statistic = len(sizes) - 1, ((o - e) ** 2 / e).sum()
    return torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), statistic / 2).item()


def smallest_p(samples: Sequence[Sequence[int]], joint: Tensor) -> float:
    return min(p_value(samples, joint, axes) for axes in MARGINALS)


def params_of(**values: Any) -> SamplingParams:
    base = {"temperature": 1.0, "seed": 1, "n": SAMPLES, "max_tokens": DEPTH + 3, "ignore_eos": True}
    return SamplingParams(**{**base, **values})
