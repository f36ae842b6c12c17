"""Our decoder against transformers' own classes, in fp32: prefill, chunks, decoding, windows after a rollback."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, build, load
from paged_harness import Harness, assert_close, expected, tokens_of
from transformers import PreTrainedModel

from pearl.models import Decoder


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Decoder]:
    model = build(request.param)
    path: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="40KB")
    return model, load(path)


def test_prefill_of_ragged_sequences(pair: tuple[PreTrainedModel, Decoder]) -> None:
    model, decoder = pair
    texts = [tokens_of(i, length) for i, length in enumerate((1, 37, 8))]
    harness = Harness(decoder, [len(text) for text in texts])
    for logits, text in zip(harness.forward([(i, t, 0) for i, t in enumerate(texts)]), texts, strict=True):
        assert_close(logits, expected(model, text))


def test_chunks_then_decoding_then_a_window_over_rolled_back_positions(pair: tuple[PreTrainedModel, Decoder]) -> None:
    model, decoder = pair
    text, other = tokens_of(11, 41), tokens_of(12, 23)
    harness = Harness(decoder, [len(text), len(other)])
    wanted, wanted_other = expected(model, text), expected(model, other)

    assert harness.forward([(0, text[:13], 0)], num_logits=0)[0].shape[0] == 0  # a chunk without logits
    first, second = harness.forward([(0, text[13:30], 13), (1, other[:9], 0)])  # a chunk beside a prompt
    assert_close(first, wanted[13:30])
    assert_close(second, wanted_other[:9])

    wrong = [(token + 1) % 131 for token in text[31:36]]
    harness.forward([(0, [text[30], *wrong], 30), (1, [other[9]], 9)])  # a window that will be rejected
    window, single = harness.forward([(0, text[31:38], 31), (1, [other[10]], 10)])  # truncated, then rewritten
    assert_close(window, wanted[31:38])
    assert_close(single, wanted_other[10:11])
    for position in range(38, 41):
        assert_close(harness.forward([(0, [text[position]], position)])[0], wanted[position : position + 1])


def test_last_rows_only(pair: tuple[PreTrainedModel, Decoder]) -> None:
    model, decoder = pair
    text = tokens_of(21, 17)
    harness = Harness(decoder, [len(text)])
    assert_close(harness.forward([(0, text, 0)], num_logits=3)[0], expected(model, text)[-3:])
