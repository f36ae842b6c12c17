"""Rotary position embeddings (RoFormer, arXiv 2104.09864) with the context extensions of the supported families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pearl.errors import UnsupportedModelError


def cos_sin_table(rope: Mapping[str, Any], head_dim: int, original_length: int, max_length: int) -> Tensor:
    """fp32 ``[max_length, head_dim]``: head_dim / 2 cosines, then as many sines, for positions 0..max_length - 1.

    rope: ModelConfig.rope. original_length: the configuration's max_position_embeddings.

    The table is a pure function of position. For "dynamic" scaling this departs from transformers, which recomputes
    the frequencies as a sequence grows past its original length: cached keys would contradict new ones, and rollback
    would have no meaning. Here the frequencies are those of max_length; up to the original length both agree.
    """
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    scale = 1.0
    if kind == "linear":
        frequencies = frequencies / rope["factor"]
    elif kind == "dynamic":
        length = max(max_length, original_length)
        stretch = rope["factor"] * length / original_length - (rope["factor"] - 1)
        frequencies = 1.0 / (theta * stretch ** (head_dim / (head_dim - 2))) ** exponents
    elif kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif kind == "yarn":
        frequencies, scale = _yarn(frequencies, rope, theta, head_dim, original_length)
    elif kind != "default":
        raise UnsupportedModelError(
            f"RoPE scaling {kind!r} is not supported; known are default, linear, dynamic, llama3 and yarn"
        )
    angles = torch.outer(torch.arange(max_length, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # rotations in the original context
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    blended: Tensor = keep * frequencies + (1 - keep) * frequencies / factor
    return blended


def _yarn(
    frequencies: Tensor, rope: Mapping[str, Any], theta: float, head_dim: int, original_length: int
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation by lane, and a factor on cosines and sines that sharpens attention."""
    original = rope.get("original_max_position_embeddings") or original_length
    factor = rope.get("factor") or 1.0

    def lane(rotations: float) -> float:
        """The lane that turns that often within the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = lane(rope.get("beta_fast") or 32), lane(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    lanes = torch.arange(head_dim // 2, dtype=torch.float32)
    keep = 1.0 - ((lanes - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = _mscale(factor, mscale) / _mscale(factor, all_dims) if mscale and all_dims else _mscale(factor, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / factor, float(scale)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
