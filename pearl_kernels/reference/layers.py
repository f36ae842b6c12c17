"""Reference of the decoder layer's operators. Each function is the specification that every provider must match.

Arithmetic is fp32 whatever the tensors' dtype; results are rounded once, to the dtype of the input.
N tokens, D model width, F feed-forward width, H heads, P pages of S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pearl_kernels.reference.quantized import QuantizedMatrix, dequantize


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args: x ``[N, D]``, weight ``[D]``, same floating dtype. Returns ``[N, D]`` in x's dtype.
    """
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place (rounded to its dtype), then ``rms_norm(residual)``.

    Args: x, residual ``[N, D]``, weight ``[D]``. Returns the normed ``[N, D]``.
    """
    residual.copy_(residual.float() + x.float())
    return rms_norm(residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """Gated activation: x ``[N, 2F]`` holds gate and up halves; returns ``silu(gate) * up``, ``[N, F]``."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_and_mul(x: Tensor) -> Tensor:
    """Gated activation as ``silu_and_mul``, with GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415):
    ``0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))``.
    """
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


def scale_and_cap(x: Tensor, scale: float, softcap: float = 0.0) -> None:
    """x ``[N, D]`` becomes ``x * scale``, and with a softcap > 0 ``softcap * tanh(x * scale / softcap)``, in place.

    -inf stays what it is: a token that is banned. Of embeddings (Gemma, Granite) and logits (Gemma 2, Granite).
    """
    y = x.float() * scale
    x.copy_(y if softcap <= 0 else torch.where(y == -torch.inf, y, softcap * torch.tanh(y / softcap)))


@dataclass(frozen=True)
class LinearWeight:
    """A matrix ``[M, K]`` as ``linear`` takes it. Only the provider that packed it knows the layout of ``data``."""

    data: Tensor
    out_features: int  # M
    in_features: int  # K
    scale: Tensor | None = None  # fp32: data are integers or fp8 and mean data * scale; None: data are x's dtype
    offset: Tensor | None = None  # as scale, to be added to each weight
    group: int = 0  # inputs that share a scale, of a QuantizedMatrix; 0: one scale for each output, [M]
    bits: int = 8  # of data, where there is a scale
    fp8: bool = False  # whether data are e4m3 numbers, where there are groups


WeightFormat = Literal["full", "int8"]


def pack_linear(weight: Tensor, weights: WeightFormat = "full") -> LinearWeight:
    """Prepare weight ``[M, K]`` for ``linear``, once, at load. The reference keeps the matrix itself, or its integers.

    ``weights="int8"`` replaces each row w by integers and a scale (symmetric, per output channel): in fp32,
    ``scale = max |w| / 127`` (1 for a row of zeros) and ``q = round(w / scale)``, half to even, which lies in
    [-127, 127]. That is another matrix, ``q * scale``: the model that it belongs to is another model.
    Raises ValueError if a weight to be rounded is not finite.
    """
    out_features, in_features = weight.shape
    if weights == "full":
        return LinearWeight(weight, out_features, in_features)
    w = weight.float()
    if not w.isfinite().all():
        raise ValueError("pack_linear: int8 needs finite weights")
    peak = w.abs().amax(1) if in_features else w.new_zeros(out_features)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    integers = (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return LinearWeight(integers, out_features, in_features, scale)


def pack_quantized(matrix: QuantizedMatrix, dtype: torch.dtype) -> LinearWeight:
    """Prepare a quantised matrix for ``linear`` with x of ``dtype``, once, at load.

    The reference keeps it as it is. A provider that has no kernel for its numbers or its groups decodes it (in fp32,
    rounded to ``dtype``) and packs it as ``pack_linear`` does.
    """
    out_features, in_features = matrix.values.shape
    fp8 = matrix.values.dtype == torch.float8_e4m3fn
    return LinearWeight(
        matrix.values, out_features, in_features, matrix.scale, matrix.offset, matrix.group, matrix.bits, fp8
    )


def weight_rows(weight: LinearWeight, rows: Tensor) -> Tensor:
    """Rows of the matrix that was packed: of a head that is its model's embedding too, the embeddings of tokens.

    Args: weight ``[M, K]`` from the same provider's ``pack_linear``, in full; rows int64 ``[N]``, each in [0, M).
    Returns ``[N, K]`` of its dtype, the very numbers that were packed. Raises ValueError if they were rounded.
    """
    if weight.scale is not None:
        raise ValueError("weight_rows: a quantised weight no longer has the numbers that were packed")
    return weight.data[rows]


def linear(x: Tensor, weight: LinearWeight | Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, all of one dtype; of int8 weights ``(x @ q.T) * scale + bias``.

    Products of quantised weights are summed up, scaled and added to the bias in fp32 and rounded once.

    Args: x ``[N, K]``, weight ``[M, K]`` from the same provider's ``pack_linear`` or ``pack_quantized`` (the reference
        also takes the plain matrix), bias ``[M]`` or None. Returns ``[N, M]``.
    """
    if isinstance(weight, Tensor) or weight.scale is None:
        return F.linear(x, weight if isinstance(weight, Tensor) else weight.data, bias)
    if weight.group:
        out = F.linear(x.float(), dequantize(unpack_quantized(weight)))
    else:
        out = F.linear(x.float(), weight.data.float()) * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def unpack_quantized(weight: LinearWeight) -> QuantizedMatrix:
    """What the reference packed."""
    assert weight.scale is not None
    return QuantizedMatrix(weight.data, weight.scale, weight.offset, weight.group, 4 if weight.bits == 4 else 8)


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Optional per-head RMS norm (Qwen3) and rotary embedding of q and k; writes q in place, k and v to the cache.

    Args:
        q: ``[N, Hq, D]``, rotated in place. k, v: ``[N, Hk, D]``, left as they are. Rows may be strided (views of one
            merged projection), the last two dimensions are contiguous.
        positions: int64 ``[N]``, rows of ``cos_sin``.
        cos_sin: fp32 ``[max_position, D]``: D/2 cosines, then D/2 sines ("half rotation": lane i pairs with i + D/2).
        k_cache, v_cache: ``[P, S, Hk, D]``, contiguous.
        slot_mapping: int64 ``[N]``, ``page * S + slot``; a negative slot writes nothing (padding row).
        q_norm, k_norm: ``[D]`` or None, with ``eps``.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = rms_norm(x, norm, eps)
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

    q.copy_(rotate(q, q_norm))
    live = slot_mapping >= 0
    k_cache.flatten(0, 1)[slot_mapping[live]] = rotate(k, k_norm)[live]
    v_cache.flatten(0, 1)[slot_mapping[live]] = v[live]


def verify_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    most_rows: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged query rows over the paged KV cache, which already holds the queries' own keys.

    One call serves decoding (1 row a sequence), verification (a window of rows) and prefill chunks, mixed.

    Args:
        q: ``[N, Hq, D]``; rows ``query_start[r]:query_start[r + 1]`` belong to sequence r and sit at its last
            positions: row i of m is at position ``context_lens[r] - m + i`` and sees keys at positions <= its own.
        k_cache, v_cache: ``[P, S, Hk, D]``; query head h reads KV head ``h // (Hq // Hk)``.
        block_tables: int32 ``[R, B]``; entries past ``ceil(context_lens[r] / S)`` are never read.
        query_start: int32 ``[R + 1]``. context_lens: int32 ``[R]``, keys in all, the queries' included.
        window: > 0 keeps only the last ``window`` keys, the row's own included (sliding window).
        softcap: > 0 replaces scores s by ``softcap * tanh(s / softcap)``.
        most_rows: rows of the sequence that has most, as far as the host knows; 0: unknown. A hint to kernels, which
            may be wrong: no result depends on it.
        sinks: fp32 ``[Hq]``: a logit of each query head that joins the softmax of each of its rows as one more key
            would, neither scaled nor capped, in every window, and that has no value: only the denominator knows of it,
            so that a row's probabilities add up to less than 1 (gpt-oss). -inf is as good as none.
    Returns: ``[N, Hq, D]`` in q's dtype.
    """
    page_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for r, length in enumerate(context_lens.tolist()):
        begin, end = query_start[r].item(), query_start[r + 1].item()
        pages = block_tables[r, : -(-length // page_size)].long()
        group = q.shape[1] // kv_heads
        k, v = (c[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for c in (k_cache, v_cache))
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        key = torch.arange(length, device=q.device)
        row = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        visible = (key <= row) if window <= 0 else (key <= row) & (key > row - window)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), -1)
        probabilities = scores.softmax(-1)[..., :length]
        out[begin:end] = torch.einsum("hqk,khd->qhd", probabilities, v).to(q.dtype)
    return out


def copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    """Copy whole pages inside ``cache`` ``[P, ...]``: for each row of pairs (int64 ``[M, 2]``) source to destination.

    No destination is also a source or a destination of another pair, so the order of the copies is free.
    """
    cache[pairs[:, 1]] = cache[pairs[:, 0]]
