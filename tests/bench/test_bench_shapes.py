"""Random weights of published shapes: their sizes, their numbers, and an engine around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch

from bench.roofline.forwards import ForwardBench
from pearl import LLM, SamplingParams
from pearl.bench import shapes
from pearl.bench.options import parse_shapes
from pearl.bench.shapes import (
    SHAPES,
    assemble_shapes,
    forward_bytes,
    load_shapes,
    random_decoders,
    random_prompts,
)
from pearl.choices import ShapeName
from pearl.config import EngineConfig
from pearl.engine.model_loading import LoadedModels
from pearl.errors import ConfigurationError, InvalidRequestError
from pearl.models import KVCache
from pearl.models.weight_size import weight_bytes

OPTIONS = {"device": "cpu", "max_model_len": 128, "max_num_seqs": 2, "draft_threads": 1, "target_threads": 1}
CONFIG = EngineConfig(**OPTIONS, prefix_caching=False)  # type: ignore[arg-type]
SMALL_QWEN = replace(
    SHAPES["32b"], hidden=128, layers=2, heads=2, kv_heads=1, head_dim=64, ffn=256, vocab_size=300, windows=(0, 0)
)


@pytest.fixture
def more_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = replace(SHAPES["tiny-target"], layers=70, windows=(0,) * 70)
    monkeypatch.setitem(SHAPES, "small-qwen", SMALL_QWEN)  # type: ignore[arg-type]
    monkeypatch.setitem(SHAPES, "deep", deep)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models() -> Iterator[LoadedModels]:
    loaded = load_shapes(CONFIG, "tiny-target", "tiny-draft")
    yield loaded
    loaded.close()


# Of the checkpoints on the hub, in parameters.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("1b", 1_235_814_400), ("8b", 8_030_261_248), ("32b", 32_763_876_352), ("70b", 70_553_706_496)],
)
def test_shapes_have_the_published_sizes(name: str, parameters: int) -> None:
    assert weight_bytes(SHAPES[name], torch.bfloat16) == 2 * parameters


@pytest.mark.parametrize(("name", "kv_bytes"), [("1b", 32_768), ("8b", 131_072), ("32b", 262_144), ("70b", 327_680)])
def test_shapes_have_the_published_keys_and_values(name: str, kv_bytes: int) -> None:
    assert KVCache.bytes_per_token(SHAPES[name], torch.bfloat16) == kv_bytes


def logits_of(models: LoadedModels, role: str) -> torch.Tensor:
    runner = models.target if role == "target" else models.draft
    assert runner is not None
    with torch.inference_mode():
        bench = ForwardBench(role, runner, 32)
        return runner.compute(bench.batch(8)).float()


@pytest.mark.usefixtures("more_shapes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny-target", "tiny-draft", "small-qwen", "deep"])
def test_logits_are_of_a_models_size(name: str, dtype: str) -> None:
    config = replace(CONFIG, dtype=dtype, method="autoregressive")
    logits = logits_of(load_shapes(config, name, None), "target")
    assert logits.shape == (8, SHAPES[name].vocab_size)
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3


def test_bfloat16_is_the_default(models: LoadedModels) -> None:
    assert models.target.model.dtype == torch.bfloat16
    assert models.target.cache.layers[0][0].dtype == torch.bfloat16


def test_a_seed_gives_the_same_weights_and_another_others(models: LoadedModels) -> None:
    again = load_shapes(CONFIG, "tiny-target", "tiny-draft")
    other = load_shapes(replace(CONFIG, seed=1), "tiny-target", "tiny-draft")
    for role in ("target", "draft"):
        assert torch.equal(logits_of(models, role), logits_of(again, role))
        assert not torch.equal(logits_of(models, role), logits_of(other, role))


def test_keys_and_values_are_small_random_numbers() -> None:
    models = load_shapes(CONFIG, "tiny-target", "tiny-draft")
    assert models.draft is not None
    for runner in (models.target, models.draft):
        tensors = [tensor.float() for pair in runner.cache.layers for tensor in pair]
        assert all(0.4 < tensor.std() < 0.6 and tensor.abs().max() < 5 for tensor in tensors)
        assert not torch.equal(tensors[0], tensors[1])


@pytest.mark.usefixtures("more_shapes")
@pytest.mark.parametrize("name", ["tiny-target", "tiny-draft", "small-qwen"])
def test_forward_bytes_are_those_of_the_weights_that_a_forward_reads(name: str) -> None:
    models = load_shapes(replace(CONFIG, method="autoregressive"), name, None)
    with torch.inference_mode():
        assert forward_bytes(SHAPES[name], torch.bfloat16) == ForwardBench("x", models.target, 16).weight_bytes


@pytest.mark.parametrize(("name", "tied"), [("tiny-target", False), ("tiny-draft", True)])
def test_only_a_tied_head_is_the_embedding(name: str, tied: bool) -> None:
    config = replace(CONFIG, method="autoregressive", dtype="float32")
    model = random_decoders(config, name, None).target
    unit_rows = torch.eye(SHAPES[name].hidden)
    head = torch.cat([model.kernels.linear(row[None], model.weights.head) for row in unit_rows]).T
    assert torch.allclose(head, model.embed(torch.arange(head.shape[0]))) == tied


@pytest.mark.usefixtures("more_shapes")
def test_the_vocabulary_is_what_both_models_have() -> None:
    assert load_shapes(CONFIG, "tiny-target", "small-qwen").vocab_size == 300
    assert load_shapes(CONFIG, "small-qwen", "tiny-draft").tokenizer.vocab_size == 300


def test_words_are_numbers(models: LoadedModels) -> None:
    tokenizer = models.tokenizer
    assert tokenizer.encode("<17><0><511>") == [17, 0, 511]
    assert tokenizer.decode([17, 0, 511]) == "<17><0><511>"
    assert tokenizer.eos_ids == frozenset()
    pieces = tokenizer.detokenizer([1, 2])
    assert [pieces.feed((3,)), pieces.feed((44,)), pieces.flush()] == ["<3>", "<44>", ""]
    with pytest.raises(InvalidRequestError, match='words like "<17>"'):
        tokenizer.encode("hello")


def test_an_llm_around_random_weights_is_exact(models: LoadedModels) -> None:
    prompts = ["<1><2><3>", *random_prompts([40], models.vocab_size)]
    params = SamplingParams(max_tokens=20)
    with LLM.from_models(models, CONFIG) as llm, llm.variant(method="autoregressive") as plain:
        outputs, wanted = llm.generate(prompts, params), plain.generate(prompts, params)
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert tokens == [output.outputs[0].token_ids for output in wanted]
    assert [len(ids) for ids in tokens] == [20, 20]
    assert outputs[0].outputs[0].text == "".join(f"<{token}>" for token in tokens[0])


def test_models_that_do_not_fit_the_configuration_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[LoadedModels] = []
    monkeypatch.setattr(LoadedModels, "close", lambda self: closed.append(self))
    models = load_shapes(replace(CONFIG, method="autoregressive"), "tiny-target", "tiny-draft")
    assert models.draft is None
    with pytest.raises(ConfigurationError, match="needs a draft model"):
        LLM.from_models(models, CONFIG)
    assert closed == [models]


def test_closing_the_llm_closes_its_models_and_a_variant_does_not(
    models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[LoadedModels] = []
    monkeypatch.setattr(LoadedModels, "close", lambda self: closed.append(self))
    llm = LLM.from_models(models, CONFIG)
    llm.variant(method="autoregressive").close()
    assert closed == []
    llm.close()
    assert closed == [models]


def test_several_engines_may_be_assembled_around_the_same_weights() -> None:
    decoders = random_decoders(CONFIG, "tiny-target", "tiny-draft", max_model_len=256)
    short = assemble_shapes(CONFIG, decoders)
    long = assemble_shapes(replace(CONFIG, max_model_len=256, max_num_seqs=4), decoders)
    assert short.target.model is long.target.model
    assert (short.num_pages, short.max_model_len) == (2 * 8, 128)
    assert (long.num_pages, long.max_model_len) == (4 * 16, 256)
    assert torch.equal(logits_of(short, "target"), logits_of(long, "target"))


def test_random_prompts_have_their_lengths_and_differ() -> None:
    prompts = random_prompts([30, 30, 7], 100)
    assert [len(prompt) for prompt in prompts] == [30, 30, 7]
    assert prompts[0] != prompts[1]
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)
    assert prompts == random_prompts([30, 30, 7], 100)


def test_parse_shapes() -> None:
    assert get_args(ShapeName) == tuple(SHAPES)
    assert parse_shapes("8b:1b") == ("8b", "1b")
    for text in ("8b", "8b:9b", "8b:1b:1b", "", ":"):
        with pytest.raises(ConfigurationError, match=r"TARGET:DRAFT, each one of tiny-target, .*70b; not"):
            parse_shapes(text)


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        (CONFIG, ("9b", "1b"), "unknown shape '9b'; known are tiny-target"),
        (CONFIG, ("tiny-target", "2b"), "unknown shape '2b'"),
        (CONFIG, ("tiny-target", None), "method='pearl' needs a draft; name its shape"),
        (replace(CONFIG, target_parallel=2), ("tiny-target", "tiny-draft"), "leave target_parallel at 1"),
        (replace(CONFIG, kv_cache_memory=1000), ("tiny-target", "tiny-draft"), "KV cache"),
    ],
)
def test_what_cannot_be_loaded_is_refused(config: EngineConfig, names: tuple[str, str | None], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_shapes(config, *names)


def test_refusals_come_before_any_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_decoder", lambda *_: pytest.fail("weights were made"))
    with pytest.raises(ConfigurationError, match="unknown shape"):
        load_shapes(CONFIG, "tiny-target", "2b")
