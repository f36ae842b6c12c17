"""What the settings of each quantisation method mean: how it stores matrices, and what it would have done besides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.mxfp4_storage import Mxfp4Storage
from pearl.models.packed_storage import AwqStorage, GptqStorage, PackedStorage
from pearl.models.quantized_storage import Bits, Fp8Storage, Int8Storage, Scales, Storage

Settings = Mapping[str, Any]
_ADVICE = (
    "supported are compressed-tensors (float-quantized, int-quantized, pack-quantized), fp8 (per tensor or in blocks), "
    "ModelOpt's FP8, AWQ (gemm), GPTQ (4 or 8 bits) and gpt-oss's MXFP4; use one of these, or the unquantised "
    "checkpoint that it was made from"
)
_ACTIVATIONS = "its activations were to be quantised to {}; here only its weights are"
_KV_CACHE = "the scales of its KV cache are not used: keys and values are kept in full"


@dataclass(frozen=True)
class Method:
    """``name``: for people. ``ignored``: modules that the settings leave plain, as they name them. ``notes``: what is
    computed otherwise than the quantiser meant.
    """

    name: str
    storage: Storage
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Refused(Exception):
    """Of settings; ``reason`` reads on from the method's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def method_of(settings: Any, where: str) -> Method:
    """``settings``: quantization_config of a config.json, or what ModelOpt says in a file of its own.

    ``where``: the model and the field, for errors. Raises UnsupportedModelError or ModelLoadError.
    """
    name = _name(settings)
    parse = _PARSERS.get(str(settings.get("quant_method"))) if isinstance(settings, dict) else None
    if parse is None:
        raise UnsupportedModelError(f"{where} says that it is quantised with {name}; {_ADVICE}")
    try:
        method = parse(settings)
    except Refused as error:
        raise UnsupportedModelError(
            f"{where} says that it is quantised with {name}: {error.reason}; {_ADVICE}"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{where}, quantised with {name}, cannot be read: {error}") from error
    return Method(name, method.storage, method.ignored, method.notes)


def _compressed_tensors(settings: Settings) -> Method:
    groups = settings.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    if not schemes or not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in schemes):
        raise ValueError("config_groups must say of each group how its weights are quantised")
    first, *others = schemes
    if any(
        (group["weights"], _format(settings, group)) != (first["weights"], _format(settings, first)) for group in others
    ):
        raise Refused("its config_groups quantise weights in different ways")
    if settings.get("quantization_status", "compressed") != "compressed":
        raise Refused(f"its quantization_status is {settings['quantization_status']!r}, not 'compressed'")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise Refused("its weights are sparse (sparsity_config)")
    if settings.get("transform_config"):
        raise Refused("its weights are transformed (transform_config)")
    weights = first["weights"]
    storage = _compressed_storage(_format(settings, first), weights)
    notes = [_ACTIVATIONS.format(_bits_of(group["input_activations"])) for group in schemes
             if group.get("input_activations")]  # fmt: skip
    if settings.get("kv_cache_scheme"):
        notes.append(_KV_CACHE)
    return Method("", storage, _strings(settings, "ignore"), tuple(dict.fromkeys(notes)))


def _format(settings: Settings, group: Settings) -> Any:
    return group.get("format") or settings.get("format")


def _compressed_storage(kind: Any, weights: Settings) -> Storage:
    bits, number = weights.get("num_bits"), weights.get("type", "int")
    symmetric = _flag(weights, "symmetric", True)
    if weights.get("dynamic"):
        raise Refused("its weights are to be quantised while it runs (dynamic)")
    scales = _scales(weights)
    if kind == "naive-quantized":
        kind = "float-quantized" if number == "float" else "int-quantized"
    if kind == "float-quantized" and (number, bits) == ("float", 8) and symmetric:
        return Fp8Storage(scales, ("weight_scale",))
    if kind == "int-quantized" and (number, bits) == ("int", 8):
        return Int8Storage(scales, symmetric)
    if kind == "pack-quantized" and number == "int" and bits in (4, 8):
        if scales.kind not in ("channel", "group"):
            raise Refused(f"packed weights with a scale for each {scales.kind} are unknown")
        return PackedStorage(bits, scales, symmetric, weights.get("actorder") not in (None, False, "weight", "static"))
    raise Refused(f"format {kind!r} with {number} weights of {bits} bits")


def _scales(weights: Settings) -> Scales:
    group_size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy == "tensor":
        return Scales("tensor")
    if strategy == "channel":
        return Scales("channel")
    if strategy == "group":
        return Scales("group", 1, _size("group_size", group_size))
    if strategy == "block":
        return _blocks(weights, "block_structure")
    raise Refused(f"weights with strategy {strategy!r}")


def _blocks(settings: Settings, name: str) -> Scales:
    sizes = settings.get(name)
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise ValueError(f"{name} must be a block's rows and columns, not {sizes!r}")
    return Scales("block", _size(name, sizes[0]), _size(name, sizes[1]))


def _fp8(settings: Settings) -> Method:
    if settings.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise Refused(f"fmt {settings['fmt']!r}")
    if settings.get("scale_fmt") not in (None, "float"):
        raise Refused(f"scale_fmt {settings['scale_fmt']!r}")
    if settings.get("weight_block_size") is None:
        storage = Fp8Storage(Scales("tensor"), ("weight_scale", "weight_scale_inv"))
    else:
        storage = Fp8Storage(_blocks(settings, "weight_block_size"), ("weight_scale_inv",))
    notes = (_ACTIVATIONS.format("fp8"),) + ((_KV_CACHE,) if settings.get("kv_cache_scheme") else ())
    ignored = _strings(settings, "ignored_layers") + _strings(settings, "modules_to_not_convert")
    return Method("", storage, ignored, notes)


def _modelopt(settings: Settings) -> Method:
    if settings.get("quant_algo") != "FP8":
        raise Refused(f"quant_algo {settings.get('quant_algo')!r}")
    kv_cache = settings.get("kv_cache_quant_algo") or settings.get("kv_cache_scheme")
    notes = (_ACTIVATIONS.format("fp8"),) + ((_KV_CACHE,) if kv_cache else ())
    ignored = _strings(settings, "exclude_modules") + _strings(settings, "ignore")
    return Method("", Fp8Storage(Scales("tensor"), ("weight_scale",)), ignored, notes)


def _awq(settings: Settings) -> Method:
    bits = settings.get("bits", settings.get("w_bit"))
    if bits != 4:
        raise Refused(f"{bits} bits")
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise Refused(f"version {version!r}, whose matrices are packed in another order")
    if not _flag(settings, "zero_point", True):
        raise Refused("it has no zero points (zero_point)")
    group = _group(settings.get("group_size", settings.get("q_group_size")))
    return Method("", AwqStorage(group), ("lm_head", *_strings(settings, "modules_to_not_convert")))


def _gptq(settings: Settings) -> Method:
    bits: Literal[2, 3] | Bits = settings.get("bits", 0)
    if bits not in (4, 8):
        raise Refused(f"{bits} bits")
    if settings.get("dynamic"):
        raise Refused("modules have settings of their own (dynamic)")
    shift = {"gptq": 1, "gptq_v2": 0}.get(str(settings.get("checkpoint_format", "gptq")))
    if shift is None:
        raise Refused(f"checkpoint_format {settings['checkpoint_format']!r}")
    if settings.get("pack_dtype", "int32") != "int32":
        raise Refused(f"pack_dtype {settings['pack_dtype']!r}")
    storage = GptqStorage(
        bits,
        _group(settings.get("group_size")),
        _flag(settings, "sym", True),
        _flag(settings, "desc_act", False),
        shift,
    )
    ignored = () if settings.get("lm_head") else ("lm_head",)
    return Method("", storage, ignored + _strings(settings, "modules_in_block_to_ignore"))


def _mxfp4(settings: Settings) -> Method:
    """Experts' matrices, whatever else the settings do not name."""
    plain = ("self_attn", "mlp.gate", "lm_head", *_strings(settings, "modules_to_not_convert"))
    return Method("", Mxfp4Storage(), plain)


_PARSERS: Mapping[str, Callable[[Settings], Method]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}


def _name(settings: Any) -> str:
    """What the quantiser calls itself, with the format where it has several."""
    if not isinstance(settings, dict):
        return repr(settings)
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    if method is None:
        return "a method that has no name"
    kind = settings.get("format") or settings.get("fmt") or settings.get("quant_algo") or _bits(settings)
    return f"{method} ({kind})" if kind else str(method)


def _bits(settings: Settings) -> str:
    for key, bits in (("load_in_8bit", 8), ("load_in_4bit", 4), ("bits", settings.get("bits"))):
        if settings.get(key):
            kind = f"{settings['bnb_4bit_quant_type']}, " if settings.get("bnb_4bit_quant_type") and bits == 4 else ""
            return f"{kind}{bits} bits"
    return ""


def _bits_of(activations: Settings) -> str:
    return f"{activations.get('type', 'int')}{activations.get('num_bits', '')}"


def _group(value: Any) -> int:
    return -1 if value == -1 else _size("group_size", value)


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return value


def _flag(settings: Settings, name: str, default: bool) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return value


def _strings(settings: Settings, name: str) -> tuple[str, ...]:
    values = settings.get(name) or ()
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a list of modules' names, not {values!r}")
    for value in values:
        if value.startswith("re:"):
            try:
                re.compile(value.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"{name} holds {value!r}, which is no regular expression: {error}") from error
    return tuple(values)
