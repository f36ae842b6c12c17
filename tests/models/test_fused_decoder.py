"""The forward in one C++ call gives the same bits as operator by operator, in logits and in the KV cache."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SHAPE, build, load
from transformers import LlamaConfig, LlamaForCausalLM

from pearl.messages import ForwardWork, SequenceState
from pearl.models import Decoder, ForwardBatch, FusedDecoder, KVCache, bundled_path, can_fuse, load_model
from pearl.models.collective import Collective
from pearl.parallel import RankSpec
from pearl.parallel.rank_loader import host_store, join
from pearl.sampling_params import SamplingParams
from pearl.workers.model_runner import build_batch
from pearl_kernels import KernelSet, Situation, select

PAGE, PAGES = 4, 16
CPU = torch.device("cpu")
TABLES = ((5, 2, 9, 0), (1, 14), (7, 3, 12))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))


def poisoned_cache(decoder: Decoder, dtype: torch.dtype) -> KVCache:
    cache = KVCache.allocate(decoder.config, PAGES, PAGE, dtype, CPU)
    for tensor in (t for layer in cache.layers for t in layer):
        tensor.fill_(torch.nan)
    return cache


def work_of(*items: tuple[int, int, int, int]) -> list[ForwardWork]:
    """items: (sequence, start, tokens, wanted logits)."""
    work = []
    for sequence, start, count, wanted in items:
        state = SequenceState(sequence, sequence, SamplingParams(), 0, 0, None)
        tokens = tuple((31 * sequence + 7 * p) % 131 for p in range(start, start + count))
        work.append(ForwardWork(state, tokens, start, wanted, TABLES[sequence]))
    return work


def batch_of(*items: tuple[int, int, int, int]) -> ForwardBatch:
    return build_batch(work_of(*items), PAGE, CPU)


ITEMS = [
    ((0, 0, 5, 0),),  # a chunk
    ((0, 5, 1, 1), (1, 0, 7, 2), (2, 0, 1, 1)),  # decoding beside a prompt of which the last rows count
    ((2, 1, 9, 9), (0, 6, 4, 1)),  # a window
    ((0, 8, 6, 6),),  # again over positions that were rolled back
]
BATCHES = [batch_of(*items) for items in ITEMS]


@pytest.fixture(params=FAMILIES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(path)
    return path


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(decoder: Decoder, dtype: torch.dtype, vocabulary: torch.Tensor | None = None) -> None:
    """``vocabulary``: ids that it can say, where these are not all."""
    plain, bound = poisoned_cache(decoder, dtype), poisoned_cache(decoder, dtype)
    fused = FusedDecoder(decoder, bound)
    for batch in BATCHES:
        with torch.inference_mode():
            expected, found = decoder.forward(batch, plain), fused.forward(batch)
        assert (expected if vocabulary is None else expected[:, vocabulary]).isfinite().all()
        assert torch.equal(bits(found), bits(expected))
    for layer, mine in zip(plain.layers, bound.layers, strict=True):
        for expected, found in zip(layer, mine, strict=True):
            assert torch.equal(bits(found), bits(expected))


@both_dtypes
def test_same_bits_as_operator_by_operator(folder: Path, dtype: torch.dtype) -> None:
    decoder = load(folder, dtype)
    assert can_fuse(decoder)
    assert_same_bits(decoder, dtype)


@both_dtypes
def test_odd_rows_of_a_tied_head_are_read_as_embeddings(dtype: torch.dtype, tmp_path: Path) -> None:
    config = LlamaConfig(**{**SHAPE, "hidden_size": 45, "num_attention_heads": 5, "num_key_value_heads": 1,
                            "head_dim": 8, "tie_word_embeddings": True})  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    decoder = load(tmp_path, dtype)
    assert decoder.weights.embedding is None
    assert_same_bits(decoder, dtype)


def test_work_items_give_the_same_bits_as_their_tensors(folder: Path) -> None:
    decoder = load(folder)
    of_tensors, of_items = (FusedDecoder(decoder, poisoned_cache(decoder, torch.float32)) for _ in range(2))
    for items, batch in zip(ITEMS, BATCHES, strict=True):
        with torch.inference_mode():
            assert torch.equal(bits(of_items.forward_work(work_of(*items))), bits(of_tensors.forward(batch)))


def random_work(rng: random.Random, before: Sequence[ForwardWork]) -> list[ForwardWork]:
    """Of some sequences of the round before with tables cut, continued or changed anywhere, and of new ones."""
    tables = [item.block_table[: rng.randint(0, 9)] for item in before if rng.random() < 0.7]
    tables += [()] * rng.randint(0, 3)
    work = []
    for table in tables:
        table += tuple(rng.randrange(PAGES) for _ in range(rng.randint(not table, 2)))
        if rng.random() < 0.3:
            at = rng.randrange(len(table))
            table = (*table[:at], rng.randrange(PAGES), *table[at + 1 :])
        start = rng.randrange(PAGE * len(table))
        tokens = tuple(rng.randrange(131) for _ in range(rng.randint(1, min(5, PAGE * len(table) - start))))
        state = SequenceState(len(work), len(work), SamplingParams(), 0, 0, None)
        work.append(ForwardWork(state, tokens, start, rng.randint(0, len(tokens)), table))
    return work


def test_block_tables_that_stay_from_round_to_round_are_those_of_each_round(llama: Decoder) -> None:
    """Rows are kept from forward to forward; one that was refused leaves nothing behind."""
    rng = random.Random(0)
    caches = [KVCache.allocate(llama.config, PAGES, PAGE, torch.float32, CPU) for _ in range(2)]
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        for keys, copied in zip(one, other, strict=True):
            keys.normal_(generator=torch.Generator().manual_seed(0))
            copied.copy_(keys)
    kept, fresh = (FusedDecoder(llama, cache) for cache in caches)
    work: list[ForwardWork] = []
    for _ in range(150):
        work = random_work(rng, work)
        if not sum(item.num_logits for item in work):
            continue
        if rng.random() < 0.3:
            broken = work[0]._replace(block_table=(*work[0].block_table, "no page"))
            with pytest.raises(TypeError):
                kept.forward_work([*work[1:], broken])
        with torch.inference_mode():
            found, expected = kept.forward_work(work), fresh.forward(build_batch(work, PAGE, CPU))
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 54}, "3 tokens from position 54, 1 of them with logits, on 2 pages of 4"),
        ({"start": -1}, "3 tokens from position -1"),
        ({"num_logits": 4}, "4 of them with logits"),
        ({"num_logits": -1}, "-1 of them with logits"),
        ({"block_table": (1, PAGES)}, "a slot is 64"),
        ({"block_table": (PAGES, 1), "start": 4}, "a page is 16"),
        ({"tokens": (1, 131, 2)}, "input_ids holds 131"),
        ({"tokens": (1, -1, 2)}, "input_ids holds -1"),
    ],
)
def test_work_that_does_not_fit_is_refused_before_anything_is_written(
    llama: Decoder, change: dict[str, object], message: str
) -> None:
    cache = poisoned_cache(llama, torch.float32)
    (work,) = work_of((1, 2, 3, 1))
    with pytest.raises(ValueError, match=message):
        FusedDecoder(llama, cache).forward_work([work._replace(**change)])  # type: ignore[arg-type]
    assert all(t.isnan().all() for layer in cache.layers for t in layer)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return load(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_ids", 131, "input_ids holds 131"),
        ("input_ids", -1, "input_ids holds -1"),
        ("positions", 128, "a position is 128"),
        ("slot_mapping", PAGE * PAGES, "a slot is 64"),
        ("block_tables", PAGES, "a page is 16"),
        ("logits_rows", 3, "logits_rows holds 3"),
    ],
)
def test_an_index_out_of_range_is_refused_before_anything_is_written(
    llama: Decoder, field: str, value: int, message: str
) -> None:
    cache = poisoned_cache(llama, torch.float32)
    batch = batch_of((1, 0, 3, 1))
    wrong = getattr(batch, field).clone()
    wrong.view(-1)[0] = value
    with pytest.raises(ValueError, match=message):
        FusedDecoder(llama, cache).forward(replace(batch, **{field: wrong}))
    assert all(t.isnan().all() for layer in cache.layers for t in layer)


def test_what_the_cpu_provider_does_not_run_alone_is_not_fused(llama: Decoder) -> None:
    def decoder(kernels: KernelSet, collective: Collective | None = None) -> Decoder:
        return Decoder(llama.config, llama.weights, llama.cos_sin, kernels, collective)

    able = select(Situation("cpu", torch.bfloat16))
    assert can_fuse(decoder(able))
    assert not can_fuse(decoder(select(Situation("cpu", torch.float16))))
    assert not can_fuse(decoder(select(prefer={"linear": "reference"})))
    alone = join(RankSpec(0, 1, 0, "", "cpu", torch.float32, 1, 1, 1, 1), host_store())
    assert not can_fuse(decoder(able, Collective(alone, 131)))


def test_threads_change_no_bit() -> None:
    """At real sizes, where helpers are woken: decoding, a window, and a prompt beside them."""
    kernels = select(Situation("cpu", torch.bfloat16))
    decoder = load_model(bundled_path("target"), device=CPU, dtype=torch.bfloat16, max_model_len=128, kernels=kernels)
    caches = [poisoned_cache(decoder, torch.bfloat16) for _ in range(3)]
    forwards = [FusedDecoder(decoder, cache, threads) for cache, threads in zip(caches, (1, 2, 5), strict=True)]
    for batch in (batch_of((0, 0, 5, 1), (1, 0, 7, 0), (2, 0, 12, 1)), *BATCHES[1:]):
        with torch.inference_mode():
            expected, *others = [fused.forward(batch) for fused in forwards]
        assert expected.isfinite().all()
        for found in others:
            assert torch.equal(bits(found), bits(expected))
    for tensors in zip(*(chain.from_iterable(cache.layers) for cache in caches), strict=True):
        assert all(torch.equal(bits(tensor), bits(tensors[0])) for tensor in tensors)


def running_seconds(threads: set[str]) -> float:
    """That these threads of the process were on a core."""
    return sum(int(Path(f"/proc/self/task/{t}/schedstat").read_text().split()[0]) / 1e9 for t in threads)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not tell when threads run")
def test_helpers_sleep_while_cores_are_shared() -> None:
    kernels = select(Situation("cpu", torch.bfloat16))
    decoder = load_model(bundled_path("target"), device=CPU, dtype=torch.bfloat16, max_model_len=128, kernels=kernels)
    before = set(os.listdir("/proc/self/task"))
    fused = FusedDecoder(decoder, poisoned_cache(decoder, torch.bfloat16), threads=3, beside=1)
    helpers = set(os.listdir("/proc/self/task")) - before
    assert len(helpers) == 2
    ran = []
    for shared in (True, False, True):
        fused.share_cores(shared)
        time.sleep(0.01)  # until they sleep
        begin = running_seconds(helpers)
        for batch in BATCHES * 3:
            fused.forward(batch)
        ran.append(running_seconds(helpers) - begin)
    assert ran[0] == ran[2] == 0.0
    assert ran[1] > 0.0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the kernel does not list a process's threads")
def test_there_are_as_many_helpers_as_are_wanted_at_most(llama: Decoder) -> None:
    for beside, helpers in ((None, 3), (4, 3), (2, 3 + 1), (1, 3)):
        before = set(os.listdir("/proc/self/task"))
        fused = FusedDecoder(llama, poisoned_cache(llama, torch.float32), threads=4, beside=beside)
        assert len(set(os.listdir("/proc/self/task")) - before) == helpers
        del fused


def test_no_more_threads_beside_another_model_than_alone(llama: Decoder) -> None:
    with pytest.raises(ValueError, match="more threads beside another model than alone"):
        FusedDecoder(llama, poisoned_cache(llama, torch.float32), threads=2, beside=3)


@both_dtypes
def test_int8_weights_give_the_same_bits_as_operator_by_operator(folder: Path, dtype: torch.dtype) -> None:
    kernels = select(Situation("cpu", dtype, weights="int8"))
    decoder = load_model(folder, device=CPU, dtype=dtype, max_model_len=128, kernels=kernels)
    assert decoder.weights.layers[0].output.data.dtype == decoder.weights.head.data.dtype == torch.int8
    assert_same_bits(decoder, dtype)
