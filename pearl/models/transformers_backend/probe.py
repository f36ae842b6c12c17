"""A few tokens through the pages and through the module's own attention: a model is accepted if both say the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pearl.errors import UnsupportedModelError
from pearl.models.forward_batch import ForwardBatch
from pearl.models.kv_cache import KVCache
from pearl.models.transformers_backend.config import TransformersConfig
from pearl.models.transformers_backend.model import TransformersModel

# Root mean square of a row's difference, in parts of the row's own: rounding stays far below, a position or a key
# that is another's does not.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}
_LENGTHS = (7, 4)


def probe(model: TransformersModel, module: Any, config: TransformersConfig, page_size: int) -> None:
    """Compute two short texts in chunks, beside each other; compare the logits with those of ``module``'s own eager
    attention, which computes each at once. Whatever the texts share beyond weights shows.

    Raises UnsupportedModelError if they differ by more than rounding. Call it in torch.inference_mode.
    """
    device = module.device
    lengths = [min(length, config.max_position_embeddings) for length in _LENGTHS]
    texts = [_text(config, length, seed, device) for seed, length in enumerate(lengths)]
    wanted = [_own_logits(module, text)[:, : config.known_ids] for text in texts]
    cache = KVCache.allocate(config, 2 * sum(lengths), page_size, config.dtype, device)
    for keys, values in cache.layers:  # what nobody wrote must not be read
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    first = max(1, lengths[0] // 2)
    begun = _batch([(texts[0][:first], 0)], page_size, lengths)
    rest = _batch([(texts[0][first:], first), (texts[1], 0)], page_size, lengths)
    rows = torch.cat([model.forward(begun, cache), model.forward(rest, cache)])[:, : config.known_ids]
    kept = torch.cat([begun.logits_rows, rest.logits_rows + first])
    difference = _relative(rows.float(), torch.cat(wanted)[kept].float())
    if not difference <= _TOLERANCE[config.dtype]:
        raise UnsupportedModelError(
            f"transformers' {config.architecture} computes other logits on KV pages than with its own attention (by "
            f"{difference:.2g} of their size): part of its attention, of its positions or of what it remembers does "
            "not go through transformers' attention interface, or its weights are no numbers"
        )


def _text(config: TransformersConfig, length: int, seed: int, device: torch.device) -> Tensor:
    ids = torch.arange(1, length + 1, device=device) * (7919 + 13 * seed)
    return ids % config.known_ids


def _own_logits(module: Any, text: Tensor) -> Tensor:
    """``[T, V]``, with the attention that transformers' class has itself."""
    paged = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        logits: Tensor = module(input_ids=text[None], attention_mask=torch.ones_like(text)[None]).logits[0]
    finally:
        module.set_attn_implementation(paged)
    return logits


def _batch(items: list[tuple[Tensor, int]], page_size: int, lengths: list[int]) -> ForwardBatch:
    """Tokens of the first sequences and their first positions; each sequence has pages of its own, in no order."""
    device = items[0][0].device
    positions = [torch.arange(start, start + len(tokens)) for tokens, start in items]
    columns = -(-max(lengths) // page_size)
    tables = torch.arange(len(lengths) * columns).flip(0).view(len(lengths), columns)[: len(items)]
    slots = [
        table[position // page_size] * page_size + position % page_size
        for table, position in zip(tables, positions, strict=True)
    ]
    starts = torch.tensor([0, *(len(position) for position in positions)]).cumsum(0)
    return ForwardBatch(
        input_ids=torch.cat([tokens for tokens, _ in items]),
        positions=torch.cat(positions).to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device, torch.int32),
        query_start=starts.to(device, torch.int32),
        context_lens=torch.tensor([int(position[-1]) + 1 for position in positions], dtype=torch.int32, device=device),
        logits_rows=torch.arange(0, int(starts[-1]), 2, device=device),  # neither all nor the last ones
    )


def _relative(actual: Tensor, wanted: Tensor) -> float:
    """The largest of all rows; nan if a number is none."""
    size = wanted.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((actual - wanted).square().mean(-1).sqrt() / size).max())
