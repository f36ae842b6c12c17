"""A model made to take ids that it lacks: its own logits to the bit, -inf for the others, whatever runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CONTEXT, build

from pearl.messages import ForwardWork, SequenceState
from pearl.models import Decoder, KVCache, load_model
from pearl.sampling_params import SamplingParams
from pearl.workers import HostQueue, ModelRunner
from pearl_kernels import Situation, select
from pearl_kernels.reference import WeightFormat
from pearl_kernels.registry import OPERATORS

V, WIDE, PAGE = 131, 150, 16
CPU = torch.device("cpu")


def load(path: Path, dtype: torch.dtype, provider: str | None, weights: WeightFormat, vocab_size: int) -> Decoder:
    kernels = select(
        Situation("cpu", dtype, weights=weights), prefer=dict.fromkeys(OPERATORS, provider) if provider else {}
    )
    return load_model(path, device=CPU, dtype=dtype, max_model_len=CONTEXT, kernels=kernels, vocab_size=vocab_size)


def logits(decoder: Decoder, tokens: tuple[int, ...]) -> torch.Tensor:
    cache = KVCache.allocate(decoder.config, 2, PAGE, decoder.dtype, CPU)
    runner = ModelRunner(decoder, cache, PAGE, HostQueue(CPU))
    state = SequenceState(0, 0, SamplingParams(), 0, 1, None)
    with torch.inference_mode():
        return runner.forward([ForwardWork(state, tokens, 0, len(tokens), (1, 0))])


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    ("dtype", "provider", "weights"),
    [(torch.float32, None, "full"), (torch.bfloat16, None, "full"), (torch.float32, "reference", "full"),
     (torch.bfloat16, None, "int8")],
    ids=["fp32", "bf16", "reference", "int8"],
)  # fmt: skip
def test_only_what_is_missing_changes(
    tmp_path: Path, family: str, dtype: torch.dtype, provider: str | None, weights: WeightFormat
) -> None:
    build(family).save_pretrained(tmp_path)
    plain, wide = (load(tmp_path, dtype, provider, weights, size) for size in (0, WIDE))
    tokens = (3, 130, 0, 77, 77)
    expected, found = logits(plain, tokens), logits(wide, tokens)
    assert found.shape == (5, WIDE)
    assert torch.equal(found[:, :V], expected)
    assert (found[:, V:] == -torch.inf).all()
    reads_missing = logits(wide, (3, V, 0, WIDE - 1))
    assert reads_missing[:, :V].isfinite().all()
    assert torch.equal(reads_missing[0], found[0])
    mean = plain.embed(torch.arange(V)).float().mean(0).to(dtype)
    assert torch.equal(wide.embed(torch.arange(V, WIDE)), mean.expand(WIDE - V, -1))


def test_a_model_that_knows_more_stays_as_it_is(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    decoder = load(tmp_path, torch.float32, None, "full", V)
    assert decoder.config.vocab_size == V
    assert decoder.weights.head_bias is None
