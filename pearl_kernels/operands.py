"""How the arguments of an operator must fit together, the same for every provider that hands addresses to a kernel.

Each function raises ValueError, in the operator's name, for what does not fit. Values of index tensors are not looked
at: on a GPU that would wait for the device.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from pearl_kernels.checks import CallChecks, Checks, cache_shape, group_size, matrix
from pearl_kernels.reference import MOST_ALTERNATIVES, Alternatives, ExpertWeights, Routing, Rule, SamplingTensors


class RopeSizes(NamedTuple):
    rows: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    slots: int


class AttentionSizes(NamedTuple):
    rows: int
    query_heads: int
    kv_heads: int
    head_dim: int
    pages: int
    page_size: int
    sequences: int
    table_width: int  # pages


def check_rope(
    checks: Checks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> RopeSizes:
    op, dtype = "rope_and_cache", q.dtype
    call = checks.beside(op, "q", q)
    call.floating(op, "q", q)
    n, query_heads, head_dim = call.heads(op, "q", q)
    pages, page_size, kv_heads, _ = cache_shape(op, k_cache)
    call.rows(op, "q", q, dtype, (n, query_heads, head_dim))
    call.rows(op, "k", k, dtype, (n, kv_heads, head_dim))
    call.rows(op, "v", v, dtype, (n, kv_heads, head_dim))
    call.contiguous(op, "positions", positions, torch.int64, (n,))
    call.contiguous(op, "cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], head_dim))
    call.contiguous(op, "k_cache", k_cache, dtype, (pages, page_size, kv_heads, head_dim))
    call.contiguous(op, "v_cache", v_cache, dtype, (pages, page_size, kv_heads, head_dim))
    call.contiguous(op, "slot_mapping", slot_mapping, torch.int64, (n,))
    call.optional(op, "q_norm", q_norm, dtype, (head_dim,))
    call.optional(op, "k_norm", k_norm, dtype, (head_dim,))
    return RopeSizes(n, query_heads, kv_heads, head_dim, cos_sin.shape[0], pages * page_size)


def check_attention(
    checks: Checks,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    most_rows: int = 0,
    sinks: Tensor | None = None,
    cache_dtype: torch.dtype | None = None,
) -> AttentionSizes:
    """``cache_dtype``: what the caches must be of; None: any that the provider computes."""
    op = "verify_attention"
    if most_rows < 0:
        raise ValueError(f"{op}: most_rows must be 0 (unknown) or more, not {most_rows}")
    call = checks.beside(op, "q", q)
    call.floating(op, "q", q)
    call.floating(op, "k_cache", k_cache)
    n, query_heads, head_dim = call.heads(op, "q", q)
    pages, page_size, kv_heads, _ = cache_shape(op, k_cache)
    group_size(op, query_heads, kv_heads)
    if block_tables.dim() != 2:
        raise ValueError(f"{op}: block_tables must be [sequences, pages], not {list(block_tables.shape)}")
    sequences, table_width = context_lens.shape[0], block_tables.shape[1]
    dtype, shape = cache_dtype or k_cache.dtype, (pages, page_size, kv_heads, head_dim)
    call.rows(op, "q", q, q.dtype, (n, query_heads, head_dim))
    call.contiguous(op, "k_cache", k_cache, dtype, shape)
    call.contiguous(op, "v_cache", v_cache, dtype, shape)
    call.rows(op, "block_tables", block_tables, torch.int32, (sequences, table_width))
    call.contiguous(op, "query_start", query_start, torch.int32, (sequences + 1,))
    call.contiguous(op, "context_lens", context_lens, torch.int32, (sequences,))
    call.optional(op, "sinks", sinks, torch.float32, (query_heads,))
    return AttentionSizes(n, query_heads, kv_heads, head_dim, pages, page_size, sequences, table_width)


def check_route(checks: Checks, logits: Tensor, top_k: int) -> tuple[int, int, int, int]:
    """Rows and experts of the logits, their address and row stride."""
    call = checks.beside("route", "logits", logits)
    call.floating("route", "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"route: logits must be [rows, experts], not {list(logits.shape)}")
    n, count = logits.shape
    if not 1 <= top_k <= count:
        raise ValueError(f"route: top_k must be from 1 to {count}, not {top_k}")
    return n, count, *call.rows("route", "logits", logits, logits.dtype, (n, count))


def check_experts(
    checks: Checks,
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    shared: Tensor | None,
    shared_gate: Tensor | None,
) -> int:
    """The number of experts of a row. What is packed is of its provider: its layout is not looked at."""
    op, dtype = "experts", x.dtype
    call = checks.beside(op, "x", x)
    call.floating(op, "x", x)
    n, width = matrix(op, x)
    up, down, count = weights.gate_up, weights.down, weights.count
    if (up.in_features, down.out_features, 2 * down.in_features) != (width, width, up.out_features):
        raise ValueError(
            f"{op}: gate_up of {up.in_features} to {up.out_features} and down of {down.in_features} to "
            f"{down.out_features} features do not fit x of {width}"
        )
    if down.data.shape[0] != count:
        raise ValueError(f"{op}: gate_up has {count} experts, down {down.data.shape[0]}")
    if routing.experts.dim() != 2:
        raise ValueError(f"{op}: routing must be [rows, experts of a row], not {list(routing.experts.shape)}")
    top_k = routing.experts.shape[1]
    call.contiguous(op, "x", x, dtype, (n, width))
    call.contiguous(op, "routing.experts", routing.experts, torch.int32, (n, top_k))
    call.contiguous(op, "routing.weights", routing.weights, torch.float32, (n, top_k))
    for name, weight in (("gate_up", up), ("down", down)):
        data = weight.data
        if (weight.scale is None and data.dtype is not dtype) or data.device != call.device:
            raise ValueError(f"{op}: {name} must be {dtype} on {call.device}, not {data.dtype} on {data.device}")
    call.optional(op, "gate_up_bias", weights.gate_up_bias, dtype, (count, up.out_features))
    call.optional(op, "down_bias", weights.down_bias, dtype, (count, width))
    if (shared is None) != (shared_gate is None):
        raise ValueError(f"{op}: shared and shared_gate come together")
    call.optional(op, "shared", shared, dtype, (n, width))
    call.optional(op, "shared_gate", shared_gate, dtype, (n, 1))
    return top_k


def check_logits(call: CallChecks, op: str, name: str, logits: Tensor, vocab_size: int) -> None:
    if logits.dim() != 2 or not 0 < vocab_size <= logits.shape[1]:
        raise ValueError(f"{op}: {name} must be [rows, at least {vocab_size}], not {list(logits.shape)}")
    call.floating(op, name, logits)
    call.rows(op, name, logits, logits.dtype, (logits.shape[0], logits.shape[1]))


def check_sampling(call: CallChecks, op: str, params: SamplingTensors, n: int) -> None:
    if params.layout == (call.device, n):  # looked at once for all calls that it is handed to
        return
    call.contiguous(op, "temperature", params.temperature, torch.float32, (n,))
    call.contiguous(op, "top_k", params.top_k, torch.int32, (n,))
    call.contiguous(op, "top_p", params.top_p, torch.float32, (n,))
    call.contiguous(op, "min_p", params.min_p, torch.float32, (n,))
    call.contiguous(op, "seed", params.seed, torch.int64, (n,))


def new_alternatives(op: str, logits: Tensor, count: int) -> Alternatives | None:
    """Uninitialised; None if none are asked for."""
    if not 0 <= count <= MOST_ALTERNATIVES:
        raise ValueError(f"{op}: alternatives must be 0 to {MOST_ALTERNATIVES}, not {count}")
    if count == 0:
        return None
    n = logits.shape[0]
    return Alternatives(
        logits.new_empty((n, count), dtype=torch.int64),
        logits.new_empty((n, count), dtype=torch.float32),
        logits.new_empty(n, dtype=torch.float32),
    )


def check_verify(
    checks: Checks,
    logits: Tensor,
    draft_tokens: Tensor,
    row_start: Tensor,
    positions: Tensor,
    params: SamplingTensors,
    vocab_size: int,
    rule: str,
    draft_logprobs: Tensor | None,
    draft_logits: Tensor | None,
    draft_rows: Tensor | None,
    draft_temperature: Tensor | None,
) -> int:
    """The number of requests."""
    op, n, requests = "verify", logits.shape[0], row_start.shape[0] - 1
    if rule not in get_args(Rule):
        raise ValueError(f"{op}: rule must be 'rejection', 'coupled' or 'block', not {rule!r}")
    if requests < 0:
        raise ValueError(f"{op}: row_start needs at least one entry")
    call = checks.beside(op, "logits", logits)
    check_logits(call, op, "logits", logits, vocab_size)
    check_sampling(call, op, params, requests)
    call.contiguous(op, "draft_tokens", draft_tokens, torch.int64, (n,))
    call.contiguous(op, "row_start", row_start, torch.int32, (requests + 1,))
    call.contiguous(op, "positions", positions, torch.int64, (n,))
    call.optional(op, "draft_logprobs", draft_logprobs, torch.float32, (n,))
    call.optional(op, "draft_rows", draft_rows, torch.int32, (n,))
    call.optional(op, "draft_temperature", draft_temperature, torch.float32, (requests,))
    if draft_logits is not None:
        check_logits(call, op, "draft_logits", draft_logits, vocab_size)
    return requests
