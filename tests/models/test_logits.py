"""Our decoder against transformers' own classes, in fp32: prefill, chunks, decoding, windows after a rollback."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, build, load
from paged_harness import (
    Harness,
    assert_close,
    check_chunks_decoding_and_a_rolled_back_window,
    check_prefill_of_ragged_sequences,
    expected,
    tokens_of,
)
from transformers import PreTrainedModel

from pearl.models import Decoder


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Decoder]:
    model = build(request.param)
    path: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="40KB")
    return model, load(path)


def test_prefill_of_ragged_sequences(pair: tuple[PreTrainedModel, Decoder]) -> None:
    check_prefill_of_ragged_sequences(*pair)


def test_chunks_then_decoding_then_a_window_over_rolled_back_positions(pair: tuple[PreTrainedModel, Decoder]) -> None:
    check_chunks_decoding_and_a_rolled_back_window(*pair)


def test_last_rows_only(pair: tuple[PreTrainedModel, Decoder]) -> None:
    model, decoder = pair
    text = tokens_of(21, 17)
    harness = Harness(decoder, [len(text)])
    assert_close(harness.forward([(0, text, 0)], num_logits=3)[0], expected(model, text)[-3:])
