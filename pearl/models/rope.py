"""Rotary position embeddings (RoFormer, arXiv 2104.09864) with the context extensions of the supported families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError

# Which numbers each type of scaling reads, besides rope_theta.
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
        "attention_factor", "mscale", "mscale_all_dim",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
}  # fmt: skip
_OPTIONAL = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"}


def cos_sin_table(rope: Mapping[str, Any], head_dim: int, original_length: int, max_length: int) -> Tensor:
    """fp32 ``[max_length, head_dim]``: head_dim / 2 cosines, then as many sines, for positions 0..max_length - 1.

    rope: ModelConfig.rope. original_length: the configuration's max_position_embeddings. Raises what ``frequencies``
    and ``require_fixed_frequencies`` raise.
    """
    require_fixed_frequencies(rope, original_length, max_length)
    per_lane, scale = frequencies(rope, head_dim, original_length)
    angles = torch.outer(torch.arange(max_length, dtype=torch.float32), per_lane)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def longest_fixed(rope: Mapping[str, Any], original_length: int) -> int:
    """Positions up to which an angle does not depend on how long its sequence has become."""
    if rope["rope_type"] == "longrope":
        return min(original_length, int(rope["original_max_position_embeddings"]))
    return original_length


def require_fixed_frequencies(rope: Mapping[str, Any], original_length: int, max_length: int) -> None:
    """ConfigurationError if the angle of a position would depend on how long its sequence has become.

    "dynamic" scaling changes all frequencies with every token beyond the original length: cached keys would contradict
    new ones, and rollback would have no meaning. Up to that length it changes nothing. "longrope" has two sets of
    frequencies, and a sequence changes from one to the other as a whole at its original length.
    """
    if rope["rope_type"] == "longrope" and max_length > longest_fixed(rope, original_length):
        longest = longest_fixed(rope, original_length)
        raise ConfigurationError(
            f"max_model_len={max_length} is above the {longest} positions (original_max_position_embeddings) of a "
            "model with longrope RoPE scaling, which from there on has other frequencies and contradicts cached keys; "
            f"give max_model_len={longest} or less"
        )
    if rope["rope_type"] == "dynamic" and max_length > original_length:
        raise ConfigurationError(
            f"max_model_len={max_length} is above the {original_length} positions (max_position_embeddings) of a model "
            "with dynamic RoPE scaling, which from there on contradicts cached keys; "
            f"give max_model_len={original_length} or less, or a model with linear, llama3 or yarn scaling"
        )


def frequencies(rope: Mapping[str, Any], head_dim: int, original_length: int) -> tuple[Tensor, float]:
    """fp32 ``[head_dim / 2]``, radians per position of each lane, and the factor on cosines and sines.

    head_dim: of a head that is rotated in part, its rotated lanes.

    Raises UnsupportedModelError (the type of scaling) or ModelLoadError (parameters that give no finite numbers).
    """
    check_parameters(rope)
    kind, theta = rope["rope_type"], float(rope["rope_theta"])
    scale = 1.0
    try:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        per_lane = 1.0 / theta**exponents
        if kind == "linear":
            per_lane = per_lane / rope["factor"]
        elif kind == "llama3":
            per_lane = _llama3(per_lane, rope)
        elif kind == "yarn":
            per_lane, scale = _yarn(per_lane, rope, theta, head_dim, original_length)
        elif kind == "longrope":
            per_lane, scale = _longrope(theta**exponents, rope, original_length)
        finite = math.isfinite(scale) and bool(per_lane.isfinite().all())
    except (ArithmeticError, ValueError):  # logarithms and quotients of numbers that make no sense together
        finite = False
    if not finite:
        raise ModelLoadError(f"the RoPE parameters {dict(rope)!r} give no finite frequencies; correct config.json")
    return per_lane, scale


def check_parameters(rope: Mapping[str, Any]) -> None:
    """What is there of a configuration's rope_parameters: its type of scaling is known, its numbers are numbers.

    Raises UnsupportedModelError or ModelLoadError.
    """
    if own := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise UnsupportedModelError(
            f"rope_parameters of their own for some layers ({', '.join(own)}) are not supported"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise UnsupportedModelError(f"RoPE scaling {kind!r} is not supported; known are {', '.join(_NUMBERS)}")
    for name in ("rope_theta", *_NUMBERS[kind]):
        value = rope.get(name, 1.0)
        if value is None and (name in _OPTIONAL or (kind, name) in (("yarn", "factor"), ("longrope", "factor"))):
            continue
        if not _is_finite(value) or (value <= 0 and name not in _OPTIONAL):
            wanted = "a finite number" if name in _OPTIONAL else "a finite number above 0"
            raise ModelLoadError(f"{name} of rope_parameters must be {wanted}, not {value!r} (rope_type {kind!r})")
    if kind == "llama3" and rope.get("low_freq_factor", 0) >= rope.get("high_freq_factor", math.inf):
        raise ModelLoadError(
            f"low_freq_factor of rope_parameters must be below high_freq_factor, not {rope['low_freq_factor']!r} "
            f"and {rope['high_freq_factor']!r}"
        )
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = rope.get(name, [1.0])
        if not isinstance(values, list) or not all(_is_finite(value) and value > 0 for value in values):
            raise ModelLoadError(f"{name} of rope_parameters must be a list of numbers above 0, not {values!r}")


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _llama3(per_lane: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * per_lane / (2 * math.pi)  # rotations in the original context
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    blended: Tensor = keep * per_lane + (1 - keep) * per_lane / factor
    return blended


def _yarn(
    per_lane: Tensor, rope: Mapping[str, Any], theta: float, head_dim: int, original_length: int
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation by lane, and a factor on cosines and sines that sharpens attention."""
    original = rope.get("original_max_position_embeddings") or original_length
    factor = rope["factor"] if rope.get("factor") is not None else original_length / original

    def lane(rotations: float) -> float:
        """The lane that turns that often within the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = lane(rope.get("beta_fast") or 32), lane(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    lanes = torch.arange(head_dim // 2, dtype=torch.float32)
    keep = 1.0 - ((lanes - first) / ((last - first) or 0.001)).clamp(0.0, 1.0)
    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = _mscale(factor, mscale) / _mscale(factor, all_dims) if mscale and all_dims else _mscale(factor, 1.0)
    return keep * per_lane + (1 - keep) * per_lane / factor, float(scale)


def _longrope(powers: Tensor, rope: Mapping[str, Any], max_position_embeddings: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753) up to its original length: each lane has a factor of its own, the short one.

    powers: theta ** exponent of each lane.
    """
    original = rope["original_max_position_embeddings"]
    short = torch.tensor(rope["short_factor"], dtype=torch.float32)
    if len(short) != len(powers):
        raise ModelLoadError(
            f"short_factor of rope_parameters has {len(short)} numbers; a head has {len(powers)} pairs of lanes"
        )
    factor = rope["factor"] if rope.get("factor") is not None else max_position_embeddings / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (short * powers), float(scale)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
