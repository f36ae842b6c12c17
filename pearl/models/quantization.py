"""Whether a checkpoint's matrices are stored as plain numbers, and if not, how: by its description and its tensors.

Cast as they are, quantised matrices would be garbage: what is not understood is refused by its method's or its
tensor's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.model_files import read_json_if_there
from pearl.models.quantization_methods import Method, method_of
from pearl.models.quantized_storage import FLOATS, FewBits, Storage
from pearl.models.weight_files import CONFIG

HF_QUANT_CONFIG = "hf_quant_config.json"  # ModelOpt's
_PLAIN = FLOATS | {"F64"}
# What quantisers store beside a matrix, or in its place: last parts of tensors' names.
_COMPANIONS = {
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_packed", "weight_shape",
    "weight_g_idx", "input_scale", "activation_scale", "qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format",
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "codebooks", "codes",
    "weight_blocks", "weight_scales", "gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks",
    "down_proj_scales",
}  # fmt: skip
_HEAD = "lm_head"


@dataclass(frozen=True)
class Quantization:
    """How a model's matrices are quantised. ``matrices``: which ones, by the names of their modules; None: not known
    before its files are: all in its layers but those that the settings leave out.

    ``storages``: of a method that stores each matrix in a way of its own, by module. ``shuffled``: those in which an
    input's group is another than its place says; None: not known, all that may be by the settings.
    """

    method: Method
    matrices: frozenset[str] | None = None
    storages: Mapping[str, Storage] = field(default_factory=dict, hash=False)
    shuffled: frozenset[str] | None = None

    def storage_of(self, module: str) -> Storage | None:
        """None: its matrix is plain."""
        if self.storages:
            return self.storages.get(module)
        return self.method.storage if self.holds(module) else None

    def few_bits(self, module: str, inputs: int) -> FewBits | None:
        """None: its matrix is plain, or can only be decoded: its groups are no runs of inputs."""
        storage = self.storage_of(module)
        if storage is None:
            return None
        held = storage.few_bits(inputs)
        shuffled = storage.ordered if self.shuffled is None else module in self.shuffled
        return None if shuffled and held.group < inputs else held

    def holds(self, module: str) -> bool:
        """Whether a layer's or the head's matrix is one of them, as far as it is known."""
        if self.matrices is not None:
            return module in self.matrices
        return not self.ignores(module) and module != _HEAD

    def ignores(self, module: str) -> bool:
        """Whether the settings leave it plain: by its name, a part of that, or a pattern ("re:..." or with "*")."""
        return any(_matches(pattern, module) for pattern in self.method.ignored)


def read_quantization(folder: Path) -> Quantization | None:
    """What a model's description says; None: its matrices are plain.

    Raises UnsupportedModelError with the method's name, or ModelLoadError.
    """
    settings = read_json_if_there(folder / CONFIG)
    for key in ("quantization_config", "compression_config"):  # the second: compressed-tensors, at first
        if settings.get(key):
            return Quantization(method_of(settings[key], f"{key} of {folder / CONFIG}"))
    found = read_json_if_there(folder / HF_QUANT_CONFIG).get("quantization")
    if not isinstance(found, dict):
        found = {"quant_algo": found}
    if not found.get("quant_algo"):  # without one only the KV cache is meant
        return None
    return Quantization(method_of({**found, "quant_method": "modelopt"}, str(folder / HF_QUANT_CONFIG)))


def refuse_quantized_tensors(
    folder: Path, needed: Mapping[str, str], others: Iterable[str], quantization: Quantization | None = None
) -> None:
    """By what the files hold. ``needed``: safetensors' name of the dtype of each tensor that the decoder reads as plain
    numbers; ``others``: names of what else lies under its layers and head.
    """
    means = "" if quantization is None else f", which is not how {quantization.method.name} stores it"
    advice = "take an unquantised checkpoint, or one whose config.json says how it was quantised (quantization_config)"
    for name, dtype in needed.items():
        if dtype not in _PLAIN:
            raise UnsupportedModelError(
                f"{folder} is quantised: {name!r} is stored as {dtype}, not in F32, F16 or BF16{means}; {advice}"
            )
    for name in others:
        if name.rsplit(".", 1)[-1] in _COMPANIONS:
            raise UnsupportedModelError(
                f"{folder} is quantised: {name!r} belongs to a quantised matrix{means}; {advice}"
            )


def require_quantized(folder: Path, quantization: Quantization, matrices: Collection[str]) -> None:
    """ModelLoadError unless what its files hold is what its description says: some matrices, and none it leaves out."""
    name = quantization.method.name
    if not matrices:
        raise ModelLoadError(
            f"{folder} is quantised with {name} by its description, but no tensor of it is; remove quantization_config "
            f"from its {CONFIG} if its weights are plain"
        )
    for module in sorted(matrices):
        if quantization.ignores(module):
            raise ModelLoadError(
                f"{folder}: {name} leaves {module!r} unquantised by its description, but it is stored quantised"
            )


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    if "*" in pattern:
        return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), module) is not None
    return f".{pattern}." in f".{module}."
