"""Hidden states beside the logits are transformers' own; the one C++ call leaves the same bits, and so do replays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, load
from test_fused_decoder import CPU, PAGE, PAGES, batch_of, bits, poisoned_cache, work_of

from pearl.models import Decoder, FusedDecoder, HiddenStates
from pearl.workers import GraphRunner, HostQueue, ModelRunner

ITEMS = ((0, 0, 5, 0), (1, 0, 7, 2), (2, 0, 9, 1))  # a chunk, a prompt of which two rows count, and one


@pytest.fixture(params=FAMILIES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(path)
    return path


def run(decoder: Decoder, layers: tuple[int, ...], fused: bool) -> tuple[torch.Tensor, HiddenStates]:
    cache, batch = poisoned_cache(decoder, decoder.dtype), batch_of(*ITEMS)
    hidden = decoder.new_hidden(batch.input_ids.shape[0], layers)
    hidden.rows.fill_(torch.nan)
    with torch.inference_mode():
        logits = FusedDecoder(decoder, cache).forward(batch, hidden) if fused else decoder.forward(batch, cache, hidden)
    return logits, hidden


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    decoder = load(tmp_path)
    every = tuple(range(decoder.config.layers + 1))
    for layers in (every, every[1:2], every[-1:], every[:-1]):
        _, hidden = run(decoder, layers, fused=False)
        begin = 0
        for item in work_of(*ITEMS):
            with torch.no_grad():
                wanted = model(torch.tensor([item.tokens]), output_hidden_states=True).hidden_states
            for place, layer in enumerate(layers):
                found, expected = hidden.rows[begin : begin + len(item.tokens), place], wanted[layer][0]
                assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), (layers, layer)
            begin += len(item.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_the_fused_forward_leaves_the_same_bits(folder: Path, dtype: torch.dtype) -> None:
    decoder = load(folder, dtype)
    last = decoder.config.layers
    plain, _ = run(decoder, (), fused=True)
    for layers in ((), (0,), (1, last - 1), (last,), (0, last)):
        (logits, hidden), (found, mine) = run(decoder, layers, fused=False), run(decoder, layers, fused=True)
        assert torch.equal(bits(found), bits(logits))
        assert torch.equal(bits(found), bits(plain)), "who asks for them changes nothing"
        assert torch.equal(bits(mine.rows), bits(hidden.rows))


def test_a_layer_that_is_not_there_is_refused(folder: Path) -> None:
    decoder = load(folder)
    with pytest.raises(ValueError, match="hidden layers holds"):
        run(decoder, (decoder.config.layers + 1,), fused=True)


def test_replayed_forwards_leave_them_until_they_are_read(folder: Path) -> None:
    """Of a decoding round, whose buffers the next replay fills again, and of a prompt, which runs eagerly."""
    decoder = load(folder)
    layers = (0, decoder.config.layers)
    cache = poisoned_cache(decoder, torch.float32)
    graphed = GraphRunner(decoder, cache, PAGE, HostQueue(CPU), 8, 3, 3, layers)
    eager = ModelRunner(decoder, poisoned_cache(decoder, torch.float32), PAGE, HostQueue(CPU), 1, layers)
    rounds = [((0, 0, 5, 0), (1, 0, 7, 2)), ((0, 5, 3, 3), (1, 7, 1, 1)), ((0, 8, 1, 1),)]
    kept = []
    with torch.inference_mode():
        for items in rounds:
            for runner in (graphed, eager):
                runner.forward(work_of(*items))
            assert graphed.hidden is not None
            assert eager.hidden is not None
            kept.append((graphed.hidden.rows, eager.hidden.rows))
    assert PAGES > 3
    for found, wanted in kept:
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
