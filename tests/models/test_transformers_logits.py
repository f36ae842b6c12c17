"""transformers' own modules on our pages against themselves, in fp32: as ``test_logits`` does with the decoder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paged_harness import (
    Harness,
    assert_close,
    check_chunks_decoding_and_a_rolled_back_window,
    check_prefill_of_ragged_sequences,
    expected,
    tokens_of,
)
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers_families import FAMILIES, build

from pearl.errors import UnsupportedModelError
from pearl.models import KVCache
from pearl.models.transformers_backend import TransformersConfig, TransformersModel, describe, load
from pearl.models.weight_size import weight_bytes
from pearl_kernels import Situation, select

CPU = torch.device("cpu")


def load_from(path: Path, dtype: torch.dtype = torch.float32, page_size: int = 4) -> TransformersModel:
    config = describe(str(path), dtype)
    kernels = select(Situation("cpu", dtype, config.head_dim, page_size=page_size))
    return load(path, config, device=CPU, kernels=kernels, page_size=page_size)


Models = tuple[PreTrainedModel, TransformersModel]


@pytest.fixture(params=[name for name in FAMILIES if name != "gptj"], scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    model, path = build(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, load_from(path)


def test_prefill_of_ragged_sequences(pair: Models) -> None:
    check_prefill_of_ragged_sequences(*pair)


def test_chunks_then_decoding_then_a_window_over_rolled_back_positions(pair: Models) -> None:
    check_chunks_decoding_and_a_rolled_back_window(*pair)


def test_what_the_engine_knows_before_weights_are_read(pair: Models) -> None:
    judge, model = pair
    config, text = model.config, judge.config
    assert (config.layers, config.vocab_size) == (text.num_hidden_layers, 131)
    assert weight_bytes(config, torch.bfloat16) == 2 * sum(p.numel() for p in judge.parameters())
    windowed = {i for i, kind in enumerate(getattr(text, "layer_types", None) or ()) if kind == "sliding_attention"}
    if not windowed and getattr(text, "sliding_window", None):
        windowed = set(range(config.layers))
    windows = [text.sliding_window if i in windowed else 0 for i in range(config.layers)]
    assert [layer.window for layer in config.attention] == windows


def test_hidden_states_are_numbered_as_transformers_numbers_them(pair: Models) -> None:
    judge, model = pair
    if getattr(judge.config, "word_embed_proj_dim", 48) != 48:  # what the head reads has another width
        assert model.config.hidden == 0
        return
    text, layers = tokens_of(31, 12), (0, 2, model.config.layers)
    harness = Harness(model, [len(text)])
    hidden = model.new_hidden(len(text), layers)
    harness.forward([(0, text, 0)], num_logits=1, hidden=hidden)
    with torch.inference_mode():
        states = judge(torch.tensor([text]), output_hidden_states=True).hidden_states
    for index, layer in enumerate(layers):
        assert_close(hidden.rows[:, index], states[layer][0])


def test_embeddings_of_tokens(pair: Models) -> None:
    judge, model = pair
    ids = torch.tensor([3, 130, 3])
    with torch.inference_mode():
        assert torch.equal(model.embed(ids), judge.get_input_embeddings()(ids))


def test_bf16_weights_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    build("cohere2-windows").save_pretrained(tmp_path)
    model = load_from(tmp_path, torch.bfloat16)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model._module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(model._module.parameters(), judge.parameters(), strict=True))
    text = tokens_of(5, 30)
    harness = Harness(model, [len(text)])
    harness.cache = KVCache.allocate(model.config, 11, 4, torch.bfloat16, CPU)
    logits, wanted = harness.forward([(0, text, 0)])[0], expected(judge, text)
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).float().abs().max() < 0.1 * wanted.float().abs().max()


def test_a_token_that_is_the_one_for_padding_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers recommends a mask where the first or the last token of a text is the one that would pad it."""
    judge, warned = build("gpt2-scales-by-layer"), []
    judge.save_pretrained(tmp_path)
    model = load_from(tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", warned.append)
    text = [judge.config.pad_token_id] * 5
    logits = Harness(model, [len(text)]).forward([(0, text, 0)])[0]
    assert warned == []
    assert_close(logits, expected(judge, text))


def test_models_of_one_process_and_a_users_own_do_not_meet(tmp_path: Path) -> None:
    """Interleaved, with transformers' modules of the same class and configuration between them."""
    names = ("phi", "cohere2-windows", "cohere2-windows")
    judges, models = [], []
    for index, name in enumerate(names):
        judge = build(name)
        with torch.no_grad():
            for parameter in judge.parameters():
                parameter.mul_(1 + 0.1 * index)
        judge.save_pretrained(tmp_path / str(index))
        judges.append(judge)
        models.append(load_from(tmp_path / str(index)))
    text = tokens_of(8, 20)
    wanted = [expected(judge, text) for judge in judges]
    harnesses = [Harness(model, [len(text)]) for model in models]
    for half in (slice(0, 11), slice(11, 20)):
        for harness, judge, logits in zip(harnesses, judges, wanted, strict=True):
            assert_close(harness.forward([(0, text[half], half.start)])[0], logits[half])
            assert torch.equal(expected(judge, text), logits)
    users = AutoModelForCausalLM.from_pretrained(tmp_path / "1", attn_implementation="sdpa")
    assert_close(expected(users, text), wanted[1])


def test_gptj_where_it_calls_attention_through_the_interface(tmp_path: Path) -> None:
    """As it does since a version of transformers that need not be here; before, it is refused."""
    judge = build("gptj")
    judge.save_pretrained(tmp_path)
    if "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[type(judge).__module__]):
        with pytest.raises(UnsupportedModelError, match=r"'gptj' cannot run on KV pages: its attention does not go"):
            load_from(tmp_path)
        return
    check_prefill_of_ragged_sequences(judge, load_from(tmp_path))
    check_chunks_decoding_and_a_rolled_back_window(judge, load_from(tmp_path))


def test_ids_that_a_draft_lacks_are_never_its_own(tmp_path: Path) -> None:
    judge = build("phi")
    judge.save_pretrained(tmp_path)
    config: TransformersConfig = replace(describe(str(tmp_path)), vocab_size=140)
    model = load(tmp_path, config, device=CPU, kernels=select(Situation("cpu", head_dim=8)), page_size=4)
    harness = Harness(model, [6])
    logits = harness.forward([(0, [5, 139, 7, 131, 2, 1], 0)])[0]
    assert logits.shape == (6, 140)
    assert (logits[:, 131:] == -torch.inf).all()
    assert_close(logits[:1, :131], expected(judge, [5]))
    assert logits[:, :131].isfinite().all()
