"""Which quantised matrices can be merged as they are stored: the loader makes one of several, which needs one form."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from pearl.models.quantized_storage import FewBits

_MERGED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_EXPERT = re.compile(r"(\.experts)\.\d+\.")


def merged_name(module: str) -> str:
    """Of the matrix that it becomes a part of: projections of one input, and all experts of a layer."""
    prefix, _, last = _EXPERT.sub(r"\1.", module).rpartition(".")
    return f"{prefix}.{_MERGED.get(last, last)}"


def stored_alike(stored: Mapping[str, FewBits | None]) -> dict[str, FewBits]:
    """Those of all matrices that can be kept, by module: all that they are merged with lie in as many bits of the same
    groups. Where one has offsets all have, maybe of 0.
    """
    together: defaultdict[str, list[str]] = defaultdict(list)
    for module in stored:
        together[merged_name(module)].append(module)
    kept: dict[str, FewBits] = {}
    for modules in together.values():
        forms = [form for module in modules if (form := stored[module]) is not None]
        if len(forms) == len(modules) and len({(form.bits, form.group, form.fp8) for form in forms}) == 1:
            form = forms[0]._replace(offsets=any(form.offsets for form in forms))
            kept.update(dict.fromkeys(modules, form))
    return kept
