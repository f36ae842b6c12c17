"""How GPU memory is divided, with a meter that says what the test wants; one test with a real GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from pearl import LLM, SamplingParams
from pearl.config import EngineConfig
from pearl.engine import model_loading
from pearl.engine.kv_budget import (
    DEFAULT_BYTES,
    MARGIN_BYTES,
    MARGIN_SHARE,
    RANK_BYTES,
    decide_pages,
    require_one_sequence,
)
from pearl.engine.memory import CudaMeter, explaining_out_of_memory, shares_of
from pearl.engine.model_loading import load_models
from pearl.engine.profiling import Largest, estimated_bytes, measured_bytes
from pearl.errors import ConfigurationError
from pearl.models import Decoder, ModelConfig, bundled_path, load_model
from pearl_kernels import select

GIB, PAGE, CONTEXT, VOCAB = 1 << 30, 16, 64, 100
TARGET = ModelConfig(
    "LlamaForCausalLM", VOCAB, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, eps=1e-5, tied=True,
    qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="none", windows=(0, 0), max_position_embeddings=CONTEXT,
    rope={"rope_type": "default", "rope_theta": 1e4}, dtype=torch.float16,
)  # fmt: skip
DRAFT = replace(TARGET, layers=1, windows=(0,))
TARGET_PAGE, DRAFT_PAGE = 2048, 1024  # bytes: 16 tokens, keys and values, layers, 2 heads of 8, two bytes each
SEQUENCES, WINDOW = 1000, 3
LOGPROBS = (2 * SEQUENCES + 2) * (WINDOW + 1) * VOCAB * 4  # and the rows in fp32, where penalties change them
RING = (2 * WINDOW * SEQUENCES + 1) * VOCAB * 2
DRAWN = SEQUENCES * VOCAB * 4  # the draft's rows in fp32, likewise
TOTAL = 10 * GIB
ALONE = MARGIN_BYTES + int(MARGIN_SHARE * TOTAL)  # the margin of one model on a GPU, and of two
SHARED = MARGIN_BYTES + ALONE
LOADED = cast(Decoder, object())  # a decoder that only a real meter would call


class FakeMeter:
    """``free`` by device name; every forward of a device takes ``peaks``, and none is computed."""

    def __init__(self, free: Mapping[str, int], peaks: Mapping[str, int] | None = None) -> None:
        self._free, self._peaks = free, peaks or {}

    def free_bytes(self, device: torch.device) -> int:
        return self._free[str(device)]

    def total_bytes(self, device: torch.device) -> int:
        return TOTAL

    def peak_bytes(self, device: torch.device, prepare: Callable[[], Callable[[], object]]) -> int:
        return self._peaks[str(device)]


class Exhausted(FakeMeter):
    def peak_bytes(self, device: torch.device, prepare: Callable[[], Callable[[], object]]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(autouse=True)
def four_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def options(**changes: Any) -> EngineConfig:
    return EngineConfig(
        **{"max_num_seqs": SEQUENCES, "window": WINDOW, "page_size": PAGE, "enforce_eager": True, "device": "cuda"}
        | changes
    )


def pages(config: EngineConfig, meter: FakeMeter, target: ModelConfig = TARGET, draft: ModelConfig = DRAFT) -> int:
    shares = shares_of(config, target, draft if config.uses_draft_model else None)
    loaded = None if config.target_parallel > 1 else LOADED
    return decide_pages(config, shares, loaded, LOADED if config.uses_draft_model else None, CONTEXT, meter)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_sum_that_was_given_is_all_there_is(device: str) -> None:
    """Nothing is measured then: this meter knows no device."""
    budget = 10 * (TARGET_PAGE + DRAFT_PAGE)
    assert pages(options(device=device, kv_cache_memory=budget), FakeMeter({})) == 10
    assert pages(options(device=device, kv_cache_memory=budget - 1), FakeMeter({})) == 9
    assert pages(options(device=device, kv_cache_memory=budget, method="autoregressive"), FakeMeter({})) == 15


def test_cpus_get_one_gibibyte() -> None:
    wide = replace(TARGET, head_dim=8 * 1024)
    both = (TARGET_PAGE + DRAFT_PAGE // 2) * 1024  # the draft's heads are half as wide
    assert pages(options(device="cpu"), FakeMeter({}), wide, replace(DRAFT, head_dim=4096)) == DEFAULT_BYTES // both


def test_on_one_gpu_the_models_add_up() -> None:
    needed = 2 * 7000 + LOGPROBS + RING + DRAWN + SHARED  # each model's forward takes 7000
    room = 100 * (TARGET_PAGE + DRAFT_PAGE)
    assert pages(options(), FakeMeter({"cuda:0": needed + room}, {"cuda:0": 7000})) == 100
    assert pages(options(), FakeMeter({"cuda:0": needed + room - 1}, {"cuda:0": 7000})) == 99
    coupled = options(verification="coupled")  # keeps no logits of the draft
    assert pages(coupled, FakeMeter({"cuda:0": needed - RING + room}, {"cuda:0": 7000})) == 100
    alone = options(method="autoregressive")
    logprobs = (2 * SEQUENCES + 2) * VOCAB * 4
    assert pages(alone, FakeMeter({"cuda:0": 7000 + logprobs + ALONE + room}, {"cuda:0": 7000})) == 150


def test_graphs_hold_a_second_working_set() -> None:
    free = {"cuda:0": 2 * 7000 + LOGPROBS + RING + DRAWN + SHARED + 100 * (TARGET_PAGE + DRAFT_PAGE)}
    more = {"cuda:0": free["cuda:0"] + 2 * 7000}
    assert pages(options(enforce_eager=False), FakeMeter(more, {"cuda:0": 7000})) == 100
    assert pages(options(enforce_eager=False), FakeMeter(free, {"cuda:0": 7000})) < 100


@pytest.mark.parametrize(("target_room", "draft_room", "expected"), [(100, 200, 100), (300, 200, 200)])
def test_on_two_gpus_each_limits_on_its_own(target_room: int, draft_room: int, expected: int) -> None:
    config = options(draft_device="cuda:1", target_device="cuda:3")
    free = {
        "cuda:1": 5000 + RING + DRAWN + ALONE + draft_room * DRAFT_PAGE,
        "cuda:3": 9000 + RING + LOGPROBS + ALONE + target_room * TARGET_PAGE,  # the draft's logits come as a copy
    }
    assert pages(config, FakeMeter(free, {"cuda:1": 5000, "cuda:3": 9000})) == expected


@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_model_on_the_cpu_has_its_gibibyte(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two is tighter: what the CPU has (here 1 MiB, 2**9 / 2**10 pages), or what the GPU has."""
    assert DEFAULT_BYTES == GIB
    monkeypatch.setattr("pearl.engine.kv_budget.DEFAULT_BYTES", 2**20)
    config = options(**{f"{role}_device": "cpu"}, max_num_seqs=2**10)
    page_bytes = {"draft": DRAFT_PAGE, "target": TARGET_PAGE}
    gpu_page = page_bytes["target" if role == "draft" else "draft"]
    assert pages(config, FakeMeter({"cuda:0": 64 * GIB}, {"cuda:0": 0})) == 2**20 // page_bytes[role]
    ring = (2 * WINDOW * 2**10 + 1) * VOCAB * 2
    # What a verdict takes in fp32 on the GPU of the other one.
    rows = (2 * 2**10 + 2) * (WINDOW + 1) if role == "draft" else 2**10
    meter = FakeMeter({"cuda:0": ring + rows * VOCAB * 4 + ALONE + 50 * gpu_page}, {"cuda:0": 0})
    assert pages(config, meter) == 50


def test_before_weights_are_read_the_cpu_is_asked_even_beside_a_gpu() -> None:
    config = options(draft_device="cpu")
    shares, meter = shares_of(config, TARGET, DRAFT), FakeMeter({"cuda:0": 64 * GIB})
    longest = PAGE * (DEFAULT_BYTES // DRAFT_PAGE)
    require_one_sequence(config, shares, longest, meter)
    with pytest.raises(ConfigurationError, match=rf"a model on cpu gets 1024\.0 MiB; .* at most {longest}"):
        require_one_sequence(config, shares, longest + 1, meter)


def test_no_more_than_all_sequences_can_fill() -> None:
    config = options(max_num_seqs=5)
    assert pages(config, FakeMeter({"cuda:0": 8 * GIB}, {"cuda:0": 0})) == 5 * CONTEXT // PAGE


def test_one_sequence_does_not_fit_and_what_would() -> None:
    needed = LOGPROBS + RING + DRAWN + SHARED
    with pytest.raises(ConfigurationError) as error:
        pages(options(), FakeMeter({"cuda:0": needed + 3 * (TARGET_PAGE + DRAFT_PAGE)}, {"cuda:0": 0}))
    assert str(error.value) == (
        "one sequence of 64 tokens needs 0.0 MiB of KV cache, cuda:0 has beside weights and forwards 0.0 MiB; lower "
        "max_num_batched_tokens, max_num_seqs or max_window, place a model on another device, or lower max_model_len "
        "to at most 48"
    )
    with pytest.raises(ConfigurationError, match=r"no max_model_len is short enough"):
        pages(options(), FakeMeter({"cuda:0": needed - GIB}, {"cuda:0": 0}))
    with pytest.raises(ConfigurationError, match=r"kv_cache_memory allows 0\.0 MiB; raise it, or .* at most 16"):
        pages(options(device="cpu", kv_cache_memory=TARGET_PAGE + DRAFT_PAGE), FakeMeter({}))


def test_ranks_are_estimated_before_they_load() -> None:
    """Rank 1 shares its GPU with the draft, and is the tightest; each rank has half of the KV heads."""
    config = options(target_parallel=2, draft_device="cuda:1")
    rank = shares_of(config, TARGET, DRAFT).target[1]
    estimated = rank.weight_bytes + RANK_BYTES + estimated_bytes(config, rank, Largest.of(config, "target", CONTEXT))
    shared = 5000 + RING + DRAWN + LOGPROBS + SHARED + estimated
    free = {"cuda:0": 9 * GIB, "cuda:1": shared + 70 * (TARGET_PAGE // 2 + DRAFT_PAGE)}
    assert pages(config, FakeMeter(free, {"cuda:1": 5000})) == 70


def test_an_estimate_covers_what_a_forward_surely_holds() -> None:
    """At the end of its first half a layer's feed-forward has residual, input, gate, up and their product."""
    config = options(target_parallel=2)
    rank, largest = shares_of(config, TARGET, None).target[0], Largest.of(config, "target", CONTEXT)
    held = largest.tokens * (2 * TARGET.hidden + 3 * TARGET.ffn // 2) + largest.rows * 2 * VOCAB
    assert held * 2 < estimated_bytes(config, rank, largest) < 10 * held * 2


def test_the_profiled_batches_are_the_largest_and_can_be_computed() -> None:
    config = EngineConfig(device="cpu", window=3, max_num_seqs=5, max_num_batched_tokens=300, max_model_len=120)
    path = str(bundled_path("draft"))
    shape = ModelConfig.from_pretrained(path)
    decoder = load_model(
        path, device=torch.device("cpu"), dtype=shape.dtype, max_model_len=120, kernels=select()
    )  # fmt: skip
    share = shares_of(config, shape, None).target[0]
    calls: list[Any] = []

    class Computing(FakeMeter):
        def peak_bytes(self, device: torch.device, prepare: Callable[[], Callable[[], object]]) -> int:
            call = cast(Any, prepare())
            logits = call()
            calls.append((call.args[0], logits.shape))
            return len(calls)

    assert measured_bytes(config, decoder, share, Largest.of(config, "target", 120), Computing({})) == 4
    for (batch, logits), tokens, sequences, rows in zip(calls, (300, 20), (3, 5), (64, 20), strict=True):
        assert batch.input_ids.shape == (tokens,)
        assert batch.context_lens.tolist() == [120] * sequences
        assert batch.slot_mapping.unique().shape == (tokens,)
        assert tuple(logits) == (rows, shape.vocab_size)


@pytest.mark.parametrize(
    ("changes", "role", "tokens", "rows", "windows"),
    [
        ({}, "target", 512, 64, [4] * 10),  # prompts may have more rows of logits than verdicts, these may not
        ({"max_num_seqs": 20}, "target", 512, 80, [4] * 20),
        ({}, "draft", 512, 10, [2] * 10),
        ({"prepared_windows": 3}, "draft", 515, 13, [2] * 10 + [1] * 3),  # branches come with windows and with prompts
        ({"method": "autoregressive"}, "target", 512, 64, [1] * 10),
        ({"max_num_batched_tokens": 8}, "target", 56, 56, [4] * 10),  # decoding rows, and a page of a prompt
        ({"max_num_seqs": 1, "max_num_batched_tokens": 900}, "target", 120, 64, [4]),  # as long as a sequence can be
    ],
)
def test_what_the_scheduler_can_ask_for(
    changes: dict[str, Any], role: Any, tokens: int, rows: int, windows: list[int]
) -> None:
    largest = Largest.of(options(**{"max_num_seqs": 10} | changes), role, 120)
    assert (largest.tokens, largest.rows) == (tokens, rows)
    assert largest.batches[1] == windows
    assert sum(largest.batches[0]) == tokens
    assert max(largest.batches[0]) <= 120


def unread(path: str, **_: object) -> Decoder:
    raise AssertionError(f"weights of {path} were read")


@pytest.mark.parametrize(
    ("changes", "free", "names"),
    [
        ({}, {"cuda:0": 1000}, "the draft does not fit on cuda:0"),
        ({"method": "autoregressive"}, {"cuda:0": 1000}, "the target does not fit on cuda:0"),
        ({"draft_device": "cuda:1"}, {"cuda:1": GIB, "cuda:0": 1000}, "the target does not fit on cuda:0"),
        ({"draft_device": "cpu", "target_parallel": 2}, {"cuda:0": GIB, "cuda:1": 1000}, "the rank 1 of the target"),
    ],
)
def test_weights_that_cannot_fit_are_not_read(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], free: dict[str, int], names: str
) -> None:
    monkeypatch.setattr(model_loading, "load_model", unread)
    monkeypatch.setattr(model_loading, "make_parallel_runner", unread)
    with pytest.raises(ConfigurationError, match=r"its weights need 0\.\d\d GiB.* 0\.00 GiB are free; choose") as error:
        load_models(options(**changes), FakeMeter(free))
    assert names in str(error.value)


def test_weights_that_fit_alone_but_not_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loading, "load_model", unread)
    sizes = [ModelConfig.from_pretrained(str(bundled_path(role))) for role in ("target", "draft")]
    target, draft = (shares_of(options(method="autoregressive"), size, None).target[0] for size in sizes)
    both = target.weight_bytes + draft.weight_bytes
    with pytest.raises(ConfigurationError, match=r"the target does not fit on cuda:0: .* of weights before it"):
        load_models(options(), FakeMeter({"cuda:0": both - 1}))
    # And nothing is left for KV: what a verdict keeps, the margins, and one sequence of 2,048 tokens.
    largest = max(size.vocab_size for size in sizes)
    kept = (RING + LOGPROBS + DRAWN) * largest // VOCAB  # the bundled pair is in bf16, as these are in fp16
    page = sum(share.page_bytes for share in (target, draft))
    needed = both + kept + SHARED + 128 * page
    with pytest.raises(ConfigurationError, match=r"one sequence of 2048 tokens .* cuda:0 has beside weights .* 2032"):
        load_models(options(), FakeMeter({"cuda:0": needed - 1}))
    with pytest.raises(AssertionError, match="were read"):
        load_models(options(), FakeMeter({"cuda:0": needed}))


def test_running_out_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> Decoder:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model_loading, "load_model", exhausted)
    with pytest.raises(ConfigurationError, match=r"the draft '.*draft' does not fit on cuda:0: its weights need"):
        load_models(options(draft=str(bundled_path("draft"))), FakeMeter({"cuda:0": 4 * GIB}))


def test_running_out_while_profiling() -> None:
    with pytest.raises(
        ConfigurationError, match=r"a forward of \d+ tokens needs more .*; lower max_num_batched_tokens"
    ):
        pages(options(), Exhausted({"cuda:0": GIB}))


def test_other_errors_stay_what_they_are() -> None:
    share = shares_of(options(), TARGET, None).target[0]
    with pytest.raises(RuntimeError, match="the cable"), explaining_out_of_memory(share, FakeMeter({"cuda:0": 1})):
        raise RuntimeError("the cable came loose")


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_filled_and_still_works() -> None:
    """On a GPU that is full but for the margin and less than all sequences want."""
    meter, device = CudaMeter(), torch.device("cuda", 0)
    left = 2 * MARGIN_BYTES + int(MARGIN_SHARE * meter.total_bytes(device)) + GIB * 2 // 5
    occupied = torch.empty(meter.free_bytes(device) - left, dtype=torch.uint8, device=device)
    with LLM(device="cuda", max_num_seqs=64) as llm:
        assert 2048 // 16 <= llm.models.num_pages < 64 * 2048 // 16
        outputs = llm.generate(["def gcd(a, b):\n"] * 64, SamplingParams(max_tokens=32, ignore_eos=True))
        assert meter.free_bytes(device) > MARGIN_BYTES
    assert occupied.numel() > 0
    assert [output.outputs[0].error for output in outputs] == [None] * 64
    assert [len(output.outputs[0].token_ids) for output in outputs] == [32] * 64
