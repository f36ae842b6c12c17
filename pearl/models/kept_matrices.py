"""Which quantised matrices a decoder keeps in their few bits: known from its configuration before any is read.

The loader, the bytes that are promised (``weight_size``) and reports ask here. What a provider's ``pack_quantized``
keeps is its kernel's contract, of which this is the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pearl.models.decoder_tensors import decoder_tensors, is_router, matrix_shapes
from pearl.models.merged_storage import stored_alike
from pearl.models.model_config import ModelConfig
from pearl.models.quantized_storage import FewBits


@dataclass(frozen=True)
class _Packer:
    """``steps``: of how many inputs groups must be whole ones, by bits; one group for all inputs always fits.
    ``bytes_of_four``: whether four bits take a byte.
    """

    steps: Mapping[int, int]
    fp8: bool
    bytes_of_four: bool = False

    def keeps(self, form: FewBits, inputs: int) -> bool:
        fits = form.group % self.steps[form.bits] == 0 or form.group >= inputs
        return fits and (self.fp8 or not form.fp8)

    def held(self, form: FewBits) -> FewBits:
        return form._replace(bits=8) if self.bytes_of_four else form


_PACKERS = {  # by provider
    "cpu": _Packer({4: 8, 8: 2}, fp8=False),
    "triton": _Packer({4: 32, 8: 32}, fp8=True),
    "reference": _Packer({4: 1, 8: 1}, fp8=True, bytes_of_four=True),
}


def packer_on(device: str, dtype: torch.dtype) -> str:
    """The provider that packs quantised matrices on devices of a torch type, for a model of that dtype."""
    if device != "cpu":
        return "triton"
    return "cpu" if dtype in (torch.float32, torch.bfloat16) else "reference"


def kept_matrices(config: ModelConfig, packer: str, ranks: int = 1) -> Mapping[str, FewBits]:
    """How matrices are held that are not decoded, by their modules; ``packer``: name of the provider that packs them.

    Of several ranks each decodes its part of all. What is merged is kept if all of it is stored alike.
    """
    if config.quantization is None or ranks > 1:
        return {}
    shapes = {
        module: shape for module, shape in matrix_shapes(decoder_tensors(config)).items() if not is_router(module)
    }
    alike = stored_alike({module: config.quantization.few_bits(module, shapes[module][1]) for module in shapes})
    own = _PACKERS[packer]
    return {module: own.held(form) for module, form in alike.items() if own.keeps(form, shapes[module][1])}
