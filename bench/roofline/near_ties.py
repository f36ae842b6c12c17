"""Where two engines part, how near a tie that was: by transformers in float32, which neither of them is."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def widest_gap(
    folder: str, prompts: Sequence[list[int]], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> float | None:
    """Of the logits at each first difference: how far the less likely of both choices lies below the likeliest token.

    None where nothing differs. Some hundredths are a near tie that bf16 may turn either way; ten times that is a fault.
    """
    parted = [
        (prompt + a[:at], a[at], b[at])
        for prompt, a, b in zip(prompts, ours, theirs, strict=True)
        if (at := first_difference(a, b)) is not None
    ]
    if not parted:
        return None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    gaps = []
    for ids, *choices in parted:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        gaps.append(float(logits.max() - logits[choices].min()))
    return max(gaps)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first tokens that differ; None if one continuation begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
