"""transformers' own modules on our pages against themselves, in fp32: as ``test_logits`` does with the decoder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paged_harness import Harness, assert_close, expected, tokens_of
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers_families import FAMILIES, build

from pearl.models import KVCache
from pearl.models.transformers_backend import TransformersConfig, TransformersModel, describe, load
from pearl.models.weight_size import weight_bytes
from pearl_kernels import Situation, select

CPU = torch.device("cpu")


def load_from(path: Path, dtype: torch.dtype = torch.float32, page_size: int = 4) -> TransformersModel:
    config = describe(str(path), dtype)
    kernels = select(Situation("cpu", dtype, config.head_dim, page_size=page_size))
    return load(path, config, device=CPU, kernels=kernels, page_size=page_size)


@pytest.fixture(params=FAMILIES, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, TransformersModel]:
    model, path = build(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    if request.param == "gptj" and not _has_attention_interface(type(model)):
        pytest.skip("in this version of transformers GPT-J does not call attention through the interface")
    return model, load_from(path)


def _has_attention_interface(family: type[PreTrainedModel]) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[family.__module__])


Models = tuple[PreTrainedModel, TransformersModel]


def test_prefill_of_ragged_sequences(pair: Models) -> None:
    judge, model = pair
    texts = [tokens_of(i, length) for i, length in enumerate((1, 37, 8))]
    harness = Harness(model, [len(text) for text in texts])
    for logits, text in zip(harness.forward([(i, t, 0) for i, t in enumerate(texts)]), texts, strict=True):
        assert_close(logits, expected(judge, text))


def test_chunks_then_decoding_then_a_window_over_rolled_back_positions(pair: Models) -> None:
    judge, model = pair
    text, other = tokens_of(11, 41), tokens_of(12, 23)
    harness = Harness(model, [len(text), len(other)])
    wanted, wanted_other = expected(judge, text), expected(judge, other)

    assert harness.forward([(0, text[:13], 0)], num_logits=0)[0].shape == (0, model.config.vocab_size)
    first, second = harness.forward([(0, text[13:30], 13), (1, other[:9], 0)])  # a chunk beside a prompt
    assert_close(first, wanted[13:30])
    assert_close(second, wanted_other[:9])

    wrong = [(token + 1) % 131 for token in text[31:36]]
    harness.forward([(0, [text[30], *wrong], 30), (1, [other[9]], 9)])  # a window that will be rejected
    window, single = harness.forward([(0, text[31:38], 31), (1, [other[10]], 10)])  # truncated, then rewritten
    assert_close(window, wanted[31:38])
    assert_close(single, wanted_other[10:11])
    for position in range(38, 41):
        assert_close(harness.forward([(0, [text[position]], position)], 1)[0], wanted[position : position + 1])


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
    text = tokens_of(31, 12)
    harness = Harness(model, [len(text)])
    projected = getattr(judge.config, "word_embed_proj_dim", 48) != 48  # what the head reads has another width
    layers = (0, 2) if projected else (0, 2, model.config.layers)
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
