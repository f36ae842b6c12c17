"""What a forward is said to move and to compute, by hand, and its operators' times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.roofline.forwards import ForwardBench, OperatorTime, operator_bytes
from bench.roofline.generators import intra_op_threads
from pearl import LLM
from pearl.models import bundled_path
from pearl_kernels import LinearWeight

CONTEXT = 40
HIDDEN, LAYERS, KV_HEADS, HEADS, HEAD_DIM, FFN, VOCAB = 384, 8, 2, 6, 64, 1152, 4096  # of the bundled target


@pytest.fixture(scope="module")
def bench() -> Iterator[ForwardBench]:
    with (
        LLM(max_num_seqs=1, draft_threads=1, target_threads=1, prefix_caching=False) as llm,
        torch.inference_mode(),
    ):
        yield ForwardBench("target", llm.models.target, CONTEXT)


@pytest.fixture(scope="module")
def operators(bench: ForwardBench) -> dict[str, OperatorTime]:
    with torch.inference_mode():
        return {time.op: time for time in bench.operators(3, 4)}


def test_the_weights_are_those_of_the_checkpoint(bench: ForwardBench) -> None:
    """The embedding is the head too and counts once; the padding of packed panels does not count."""
    stored = load_file(Path(bundled_path("target")) / "model.safetensors")
    assert bench.weight_bytes == sum(t.nbytes for t in stored.values())


def test_the_bytes_of_a_forward(bench: ForwardBench) -> None:
    key_and_value = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2
    for rows in (1, 7):
        expected = bench.weight_bytes + (CONTEXT + rows) * key_and_value + rows * (HIDDEN + VOCAB) * 2
        assert bench.bytes(rows) == expected


def test_the_flops_of_a_forward(bench: ForwardBench) -> None:
    layer = HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * HIDDEN + 3 * HIDDEN * FFN
    weights = LAYERS * layer + VOCAB * HIDDEN
    per_key = 4 * HEADS * HEAD_DIM * LAYERS
    assert bench.flops(1) == 2 * weights + per_key * CONTEXT
    assert bench.flops(2) == 4 * weights + per_key * (2 * CONTEXT - 1)


def test_the_batch_is_the_end_of_one_sequence(bench: ForwardBench) -> None:
    batch = bench.batch(3)
    assert batch.positions.tolist() == [37, 38, 39]
    assert batch.context_lens.tolist() == [CONTEXT]
    assert batch.logits_rows.tolist() == [0, 1, 2]


def test_a_forward_takes_time(bench: ForwardBench) -> None:
    with intra_op_threads(1), torch.inference_mode():
        assert 1e-5 < bench.seconds(1) < 5


def test_every_operator_of_the_forward_is_timed(operators: dict[str, OperatorTime]) -> None:
    calls = {op: time.calls for op, time in operators.items()}
    per_layer = ("qkv", "rope_and_cache", "verify_attention", "output", "gate_up", "silu_and_mul", "down")
    assert calls == dict.fromkeys(per_layer, LAYERS) | {"rms_norm": 1, "add_rms_norm": 2 * LAYERS, "lm_head": 1}


def test_a_kernel_takes_what_is_left_without_the_call(operators: dict[str, OperatorTime]) -> None:
    for time in operators.values():
        assert time.seconds > 0
        assert time.overhead > 0
        assert time.kernel_seconds == pytest.approx(max(time.seconds - time.overhead, 1e-9))
    assert operators["lm_head"].kernel_seconds > operators["silu_and_mul"].kernel_seconds


def test_the_bytes_of_the_operators(operators: dict[str, OperatorTime]) -> None:
    rows, item = 3, 2
    assert operators["rms_norm"].bytes == (2 * rows + 1) * HIDDEN * item
    assert operators["add_rms_norm"].bytes == (4 * rows + 1) * HIDDEN * item
    assert operators["silu_and_mul"].bytes == 3 * rows * FFN * item
    assert operators["down"].bytes == (FFN * HIDDEN + rows * (FFN + HIDDEN)) * item
    assert operators["lm_head"].bytes == (HIDDEN * VOCAB + rows * (HIDDEN + VOCAB)) * item
    queries = 2 * rows * HEADS * HEAD_DIM * item
    assert operators["verify_attention"].bytes == 2 * CONTEXT * KV_HEADS * HEAD_DIM * item + queries
    keys_and_values = 4 * rows * KV_HEADS * HEAD_DIM * item
    assert operators["rope_and_cache"].bytes == queries + keys_and_values + rows * HEAD_DIM * 4


def test_a_bias_is_not_the_weight() -> None:
    x, weight = torch.zeros(2, 8), LinearWeight(torch.zeros(4, 8), 4, 8)
    assert operator_bytes("linear", (x, weight, None)) == (16 + 32 + 8) * 4
