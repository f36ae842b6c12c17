"""The engine's configuration is refused as a whole before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pearl.config import EngineConfig
from pearl.errors import ConfigurationError
from pearl.llm import LLM


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"method": "medusa"}, ["method must be one of pearl, speculative, autoregressive", "'medusa'"]),
        ({"verification": "exact"}, ["verification must be one of rejection, coupled", "'exact'"]),
        ({"dtype": "int8"}, ["dtype must be one of auto, float32, bfloat16, float16", "'int8'"]),
        ({"target_weights": "int4"}, ["target_weights must be one of full, int8", "'int4'"]),
        ({"draft_weights": "bfloat16"}, ["draft_weights must be one of full, int8", "'bfloat16'"]),
        ({"device": "cpu", "target_weights": "int8", "target_parallel": 2}, ["target_weights='int8'", "exclude"]),
        ({"window": 0}, ['window must be "auto" or an integer >= 1', "0"]),
        ({"window": -1}, ['window must be "auto" or an integer >= 1', "-1"]),
        ({"window": 2.5}, ['window must be "auto" or an integer >= 1', "2.5"]),
        ({"window": "large"}, ['window must be "auto" or an integer >= 1', "'large'"]),
        ({"max_window": 0}, ["max_window must be an integer >= 1"]),
        ({"max_num_seqs": 0}, ["max_num_seqs must be an integer >= 1"]),
        ({"max_num_batched_tokens": 0}, ["max_num_batched_tokens must be an integer >= 1"]),
        ({"page_size": 0}, ["page_size must be an integer >= 1"]),
        ({"max_waiting": 0}, ["max_waiting must be an integer >= 1"]),
        ({"max_model_len": 0}, ["max_model_len must be an integer >= 1"]),
        ({"kv_cache_memory": 1.5}, ["kv_cache_memory must be an integer >= 1", "1.5"]),
        ({"window": True}, ['window must be "auto" or an integer >= 1', "True"]),
        ({"window": 10**9}, ["at most 256", "1000000000"]),
        ({"max_window": 10**9}, ["at most 256"]),
        ({"max_num_seqs": 10**9}, ["at most 4096"]),
        ({"max_num_seqs": 1024, "window": 65}, ["max_num_seqs=1024 times a window of 65", "lower one of them"]),
        ({"max_num_seqs": True}, ["max_num_seqs must be an integer >= 1"]),
        ({"max_num_batched_tokens": 10**9}, ["at most 1048576"]),
        ({"page_size": 10**9}, ["at most 1024"]),
        ({"target_parallel": 10**9}, ["at most 1024"]),
        ({"target_threads": 10**9}, ["at most 1024"]),
        ({"kv_cache_memory": 10**18}, ["at most"]),
        ({"max_model_len": "2048"}, ["max_model_len must be an integer >= 1", "'2048'"]),
        ({"max_model_len": math.nan}, ["max_model_len must be an integer >= 1", "nan"]),
        ({"seed": 1.5}, ["seed must be None or a 64-bit integer", "1.5"]),
        ({"seed": 2**64}, ["seed must be None or a 64-bit integer"]),
        ({"seed": True}, ["seed must be None or a 64-bit integer"]),
        ({"pre_verify": 1}, ["pre_verify must be True or False", "1"]),
        ({"prefix_caching": None}, ["prefix_caching must be True or False"]),
        ({"enforce_eager": "no"}, ["enforce_eager must be True or False"]),
        ({"method": np.array(["pearl", "pearl"])}, ["method must be one of"]),
        ({"dtype": torch.float64}, ["dtype must be one of auto, float32, bfloat16, float16", "float64"]),
        ({"dtype": None}, ["dtype must be one of"]),
        ({"device": 0}, ["device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not 0"]),
        ({"device": None}, ["device must be 'auto'"]),
        ({"target": ""}, ["target must be a folder, a hub id or a GGUF file", "None is the bundled model"]),
        ({"draft": b"model"}, ["draft must be a folder, a hub id or a GGUF file"]),
        ({"draft": 5}, ["draft must be a folder, a hub id or a GGUF file, not 5"]),
        ({"draft_threads": 0}, ["draft_threads must be an integer >= 1"]),
        ({"target_threads": -2}, ["target_threads must be an integer >= 1", "-2"]),
        ({"method": "speculative", "pre_verify": False}, ["pre_verify and post_verify are PEARL's"]),
        ({"method": "speculative", "post_verify": False}, ["pre_verify and post_verify are PEARL's"]),
        ({"device": "cpu", "draft_sms": 16}, ["draft_sms is for a GPU that both models share"]),
        ({"device": "gpu"}, ["unknown device 'gpu'", "use 'auto', 'cpu', 'cuda' or 'cuda:N'"]),
        ({"draft_device": "meta"}, ["device 'meta' is not supported", "use 'cpu' or 'cuda'"]),
    ],
)
def test_bad_option_says_what_is_wrong_and_what_would_be_right(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        EngineConfig(**options)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("window", np.int64(3), 3),
        ("window", 3.0, 3),
        ("max_num_seqs", np.uint16(4), 4),
        ("kv_cache_memory", 1.5e9, 1_500_000_000),
        ("seed", np.int32(-1), -1),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("pre_verify", np.bool_(False), False),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("device", torch.device("cpu"), "cpu"),
        ("target", Path("/models/x"), "/models/x"),
        ("draft", Path("ngram"), "./ngram"),  # a folder of that name
        ("draft", "ngram", "ngram"),
    ],
)
def test_what_is_meant_becomes_the_fields_own_type(name: str, value: Any, wanted: Any) -> None:
    held = getattr(EngineConfig(**{name: value}), name)
    assert held == wanted
    assert type(held) is type(wanted)


_EDGES = [
    0,
    1,
    -1,
    2,
    16,
    257,
    1 << 20,
    2**31,
    2**63,
    2**64,
    10**5000,
    0.5,
    4.0,
    -0.0,
    math.inf,
    math.nan,
    1e300,
    5e-324,
]
_THINGS = [
    None, True, False, "", "auto", "cpu", "ngram", "int8", "\ud800", b"auto", [], {}, [1], 1j, object(), np.int64(3),
    np.bool_(True), np.float32(2), np.array([1, 2]), np.array(3), torch.tensor(2), torch.float16, torch.device("meta"),
    Path("x"), EngineConfig,
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(EngineConfig.__dataclass_fields__)), st.sampled_from(_EDGES + _THINGS)))
@example({"target_parallel": 257.0, "target_threads": np.int64(3)})
def test_any_value_of_any_option_is_refused_in_a_sentence_or_can_be_used(options: dict[str, Any]) -> None:
    options.setdefault("device", "cpu")
    refusal = None
    try:
        config = EngineConfig(**options)
    except ConfigurationError as error:
        refusal = str(error)
    if refusal is not None:
        assert 20 < len(refusal) < 400
        return
    assert all(type(getattr(config, name)) in (str, int, bool, type(None)) for name in options)
    assert config == dataclasses.replace(config)
    assert len(config.resolve_target_devices()) == config.target_parallel
    assert min(*config.resolve_threads(), config.largest_window) >= 1


@pytest.mark.parametrize("name", ["device", "draft_device", "target_device"])
def test_cuda_asked_for_but_absent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="torch sees no CUDA device; use device='cpu'"):
        EngineConfig(**{name: "cuda"})


def test_cuda_index_past_the_last_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    EngineConfig(device="cuda:1")
    with pytest.raises(ConfigurationError, match=r"'cuda:2' was asked for, but there are 2"):
        EngineConfig(device="cuda:2")


def test_unknown_option_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown options \['windw'\] \(did you mean 'window'\?\); known are"):
        LLM("/nowhere", "/nowhere", windw=3)


def test_every_field_is_documented() -> None:
    assert EngineConfig.__doc__ is not None
    missing = [name for name in EngineConfig.__dataclass_fields__ if name not in EngineConfig.__doc__]
    assert set(missing) <= {"page_size", "prefix_caching"}


@pytest.mark.parametrize(
    ("options", "draft", "draft_model"),
    [
        ({}, True, True),
        ({"method": "speculative"}, True, True),
        ({"draft": "ngram"}, True, False),
        ({"method": "autoregressive"}, False, False),
        ({"method": "autoregressive", "draft": "ngram"}, False, False),
    ],
)
def test_which_drafter_a_configuration_needs(options: dict[str, Any], draft: bool, draft_model: bool) -> None:
    config = EngineConfig(**options)
    assert (config.uses_draft, config.uses_draft_model) == (draft, draft_model)


def test_largest_window_bounds_every_buffer() -> None:
    assert EngineConfig(window=5, max_window=16).largest_window == 5
    assert EngineConfig(window=40, max_window=16).largest_window == 40
    assert EngineConfig(window="auto", max_window=7).largest_window == 7


def test_each_model_may_have_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    mixed = EngineConfig(draft_device="cpu")
    assert (mixed.resolve_device("draft").type, mixed.resolve_device("target").type) == ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert EngineConfig().resolve_device("target").type == "cpu"


@pytest.mark.parametrize(
    ("cores", "options", "threads", "torch_threads"),
    [
        (1, {}, (1, 1), 1),
        (2, {}, (1, 2), 1),
        (8, {}, (2, 8), 6),
        (12, {}, (3, 12), 9),
        (8, {"method": "autoregressive"}, (1, 8), 8),
        (8, {"draft": "ngram"}, (1, 8), 8),
        (8, {"draft_threads": 3}, (3, 8), 5),
        (8, {"target_threads": 2}, (2, 2), 2),
        (8, {"method": "speculative"}, (8, 8), 8),
        (8, {"method": "speculative", "draft_threads": 3}, (3, 8), 8),
        (8, {"method": "speculative", "draft": "ngram"}, (1, 8), 8),
    ],
)
def test_the_target_may_use_all_cores_but_where_its_threads_would_spin(
    cores: int, options: dict[str, Any], threads: tuple[int, int], torch_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    config = EngineConfig(**options)
    assert (config.resolve_threads(), config.target_torch_threads) == (threads, torch_threads)


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({}, 8),
        ({"method": "speculative"}, 8),
        ({"draft_threads": 3}, 3),
        ({"method": "autoregressive"}, 1),
        ({"draft": "ngram"}, 1),
    ],
)
def test_a_draft_whose_target_rests_has_all_cores(
    options: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert EngineConfig(**options).draft_threads_alone == threads


@pytest.mark.parametrize("role", ["target", "draft"])
def test_int8_weights_need_the_cpu(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    EngineConfig(**{f"{role}_device": "cpu", f"{role}_weights": "int8"})
    with pytest.raises(ConfigurationError, match=rf"{role}_weights='int8' runs on cpu only; use {role}_device='cpu'"):
        EngineConfig(**{f"{role}_weights": "int8"})


@pytest.mark.parametrize(("ranks", "fits"), [(2, True), (3, False)])
def test_ranks_need_as_many_gpus(monkeypatch: pytest.MonkeyPatch, ranks: int, fits: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    options = {"target_device": "cuda:1", "draft_device": "cpu", "target_parallel": ranks}
    if fits:
        devices = EngineConfig(**options).resolve_target_devices()
        assert [str(device) for device in devices] == ["cuda:1", "cuda:2"]
    else:
        with pytest.raises(ConfigurationError, match="needs as many GPUs from cuda:1 on; there are 3"):
            EngineConfig(**options)
