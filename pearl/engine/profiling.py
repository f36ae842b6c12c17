"""What a model's rounds need of a GPU beside weights and KV: measured by a forward of the largest size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pearl.config import EngineConfig, Role
from pearl.engine.memory import MemoryMeter, Share, explaining_out_of_memory
from pearl.models import CausalModel, ForwardBatch, KVCache, ModelConfig

_ESTIMATE_FACTOR = 2  # over the tensors that a forward surely holds: attention's partial sums, the allocator's rounding


@dataclass(frozen=True)
class Largest:
    """The largest batches that the scheduler makes of one model: ``tokens`` of prompts, or ``window`` tokens of each of
    ``sequences``, and one of each of ``branches``, in contexts of ``context`` tokens; ``rows`` of them with logits.
    """

    tokens: int
    sequences: int
    window: int
    rows: int
    context: int
    page_size: int
    branches: int = 0

    @classmethod
    def of(cls, config: EngineConfig, role: Role, max_model_len: int) -> Largest:
        sequences, branches = config.max_num_seqs, config.most_prepared if role == "draft" else 0
        window = min(config.most_judged if role == "target" else 2, max_model_len)  # a draft may lag by two tokens
        # Decoding rows are never held back by prompts, which get a page at least (Scheduler._plan_batch).
        tokens = max(config.max_num_batched_tokens, sequences * window + config.page_size)
        tokens = min(tokens, sequences * max_model_len) + branches
        rows = min(config.max_logit_rows, tokens) if role == "target" else sequences + branches
        return cls(tokens, sequences, window, rows, max_model_len, config.page_size, branches)

    @property
    def batches(self) -> tuple[list[int], list[int]]:
        """The tokens of each sequence: chunks of as few prompts as can have them, and windows; branches beside both."""
        whole, rest = divmod(self.tokens - self.branches, self.context)
        branches = [1] * self.branches
        return [self.context] * whole + [rest] * (rest > 0) + branches, [self.window] * self.sequences + branches


@torch.inference_mode()
def measured_bytes(config: EngineConfig, model: CausalModel, share: Share, largest: Largest, meter: MemoryMeter) -> int:
    """The most that a round's forwards allocate. Raises ConfigurationError if there is not enough for one."""
    reason = f"beside its weights a forward of {largest.tokens} tokens needs more than there is"
    with explaining_out_of_memory(share, meter, reason, "lower max_num_batched_tokens, max_num_seqs or max_window"):
        forwards = [partial(_prepare, model, share, largest, lengths) for lengths in largest.batches]
        forward = max(meter.peak_bytes(share.device, prepare) for prepare in forwards)
    return forward * _pools(config)


def estimated_bytes(config: EngineConfig, share: Share, largest: Largest) -> int:
    """``measured_bytes`` of a tensor-parallel rank that is not loaded yet, from its shape."""
    local = share.config
    assert isinstance(local, ModelConfig)  # or it had no ranks
    heads = (2 * local.heads + 2 * local.kv_heads) * local.head_dim  # q, k, v and what attention makes of them
    token = 4 * local.hidden + max(heads, 3 * local.ffn)  # input, residual, their norm and the next; gate, up, product
    row = 3 * share.vocab_size  # the rank's logits, all ranks', and these side by side
    tensors = (largest.tokens * token + largest.rows * row) * share.dtype.itemsize
    return tensors * _ESTIMATE_FACTOR * _pools(config)


def verdict_bytes(config: EngineConfig, role: Role, share: Share, draft: Share | None) -> int:
    """What is kept for a round's verdict on a model's GPU.

    Of the draft its ring of logits (``LogitsRing``), of which rows are sent to a target on another device, at most as
    many as it has. Of the target, where every request asks for logprobs, the log-softmax of its rows in fp32, two more
    while one is computed. Of both, where a request changes logits, a forward's rows in fp32.
    """
    ring = 0
    if draft is not None and config.verification != "coupled":
        rows = (2 * config.max_num_seqs + config.prepared_slots) * config.largest_window + 1
        ring = rows * draft.vocab_size * draft.dtype.itemsize
    row = share.vocab_size * 4
    processed = 0 if share.dtype is torch.float32 else row
    if role == "draft":
        return ring + processed * (config.max_num_seqs + config.most_prepared)
    logprobs = (config.max_num_seqs + 2) * row
    return (logprobs + processed * config.max_num_seqs) * config.most_judged + (
        ring if draft is not None and draft.device != share.device else 0
    )


def _pools(config: EngineConfig) -> int:
    """A worker's graphs keep their tensors in a pool of their own, beside that of its other forwards."""
    return 1 if config.enforce_eager else 2


def _prepare(model: CausalModel, share: Share, largest: Largest, lengths: Sequence[int]) -> Callable[[], Tensor]:
    """One forward, with a KV cache just large enough for its tokens."""
    pages = [-(-length // largest.page_size) + 1 for length in lengths]  # the tokens may begin anywhere in a page
    cache = KVCache.allocate(share.config, sum(pages), largest.page_size, share.dtype, share.device)
    batch = _batch(lengths, pages, largest, share.device)
    return partial(model.forward, batch, cache)


def _batch(lengths: Sequence[int], pages: Sequence[int], largest: Largest, device: torch.device) -> ForwardBatch:
    """The last ``lengths[i]`` tokens of sequences of full length, each of which repeats ``pages[i]`` pages of its own:
    enough for its tokens to lie in different slots. Of the last tokens logits are wanted.
    """
    size, width = largest.page_size, -(-largest.context // largest.page_size)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(largest.context - length, largest.context) for length in lengths])
    own = torch.tensor(pages)
    first = own.cumsum(0) - own
    tables = first[:, None] + torch.arange(width) % own[:, None]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total = int(starts[-1])
    return ForwardBatch(
        input_ids=torch.zeros(total, dtype=torch.int64, device=device),
        positions=positions.to(device),
        slot_mapping=(tables[sequence, positions // size] * size + positions % size).to(device),
        block_tables=tables.to(device, torch.int32),
        query_start=starts.to(device, torch.int32),
        context_lens=torch.full((len(lengths),), largest.context, dtype=torch.int32, device=device),
        logits_rows=torch.arange(max(0, total - largest.rows), total, device=device),
    )
