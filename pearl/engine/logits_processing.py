"""Penalties, biases and minimum length: what changes logits depending on the tokens so far.

Both models apply it to their own logits before sampling, so p and q are always distributions *after* it; only rows of
requests that ask for any of it are touched. It is done in fp32: a bf16 logit of 20 has no neighbour nearer than 0.125.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pearl.host_tensors import from_numbers
from pearl.messages import SequenceState


def process_row(row: Tensor, state: SequenceState, history: Sequence[int], eos_ids: Collection[int]) -> None:
    """Change one fp32 logits row ``[V]`` in place for the token that follows ``history`` (prompt, then output so far).

    repetition_penalty: Keskar et al. 2019, over prompt and output. presence and frequency: over the output only.
    """
    assert row.dtype is torch.float32
    params = state.params
    output = history[state.prompt_length :]
    if params.repetition_penalty != 1:
        seen = from_numbers(sorted(set(history)), torch.int64, row.device)
        logits = row[seen]
        row[seen] = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(output)
        tokens = from_numbers(list(counts), torch.int64, row.device)
        times = from_numbers(list(counts.values()), torch.float32, row.device)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        tokens = from_numbers(list(params.logit_bias), torch.int64, row.device)
        row[tokens] += from_numbers(list(params.logit_bias.values()), torch.float32, row.device)
    if len(output) < params.min_tokens:
        row.index_fill_(0, from_numbers(sorted(params.ending_ids(eos_ids)), torch.int64, row.device), -torch.inf)


def process_rows(
    logits: Tensor, state: SequenceState, continuation: Sequence[int], eos_ids: Collection[int], committed: int
) -> None:
    """A request's window ``[m, V]`` in fp32: row i follows the first ``committed`` tokens and continuation[:i]."""
    assert state.history is not None
    for index in range(logits.shape[0]):
        process_row(logits[index], state, (*state.history[:committed], *continuation[:index]), eos_ids)
