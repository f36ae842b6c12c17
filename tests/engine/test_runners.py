"""Which runner a model gets: captured where the queue is asynchronous and every operator is, else eager, or refused."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from pearl.config import EngineConfig, Role
from pearl.engine import runners
from pearl.engine.runners import kernels_for, make_runner
from pearl.errors import ConfigurationError
from pearl.models import Decoder, KVCache, ModelConfig, bundled_path, load_model
from pearl.workers import GraphRunner, HostQueue, model_runner, why_not_captured
from pearl.workers.shapes import ShapeLimits

CPU = torch.device("cpu")
ON_A_GPU = {"verify_attention": "triton", "rope_and_cache": "cuda", "sample": "triton"}


class Asynchronous(HostQueue):
    asynchronous = True


@pytest.fixture(scope="module")
def draft() -> Decoder:
    path = bundled_path("draft")
    kernels = kernels_for(EngineConfig(device="cpu"), "draft", ModelConfig.from_pretrained(str(path)))
    return load_model(path, device=CPU, dtype=torch.bfloat16, max_model_len=64, kernels=kernels)


@pytest.fixture
def cache(draft: Decoder) -> KVCache:
    return KVCache.allocate(draft.config, 4, 16, torch.bfloat16, CPU)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "open_queue", lambda name, device, **_: Asynchronous(device))


def captured(draft: Decoder) -> Decoder:
    """As if its operators ran on a GPU."""
    kernels = replace(draft.kernels, providers={**draft.kernels.providers, **ON_A_GPU})
    return Decoder(draft.config, draft.weights, draft.cos_sin, kernels)


def test_on_a_cpu_nothing_is_captured(draft: Decoder, cache: KVCache) -> None:
    assert not isinstance(make_runner(EngineConfig(device="cpu"), "draft", draft, cache), GraphRunner)


@pytest.mark.parametrize(("role", "threads"), [("draft", (8, 2)), ("target", (8, None))])
def test_a_draft_gets_more_threads_while_the_target_rests(
    role: Role, threads: tuple[int, int | None], draft: Decoder, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    asked = list[tuple[int, int | None]]()
    monkeypatch.setattr(model_runner, "FusedDecoder", lambda model, cache, *counts: asked.append(counts))
    make_runner(EngineConfig(device="cpu"), role, draft, cache)
    assert asked == [threads]


@pytest.mark.usefixtures("asynchronous")
def test_forwards_are_captured_unless_eager_mode_is_asked_for(draft: Decoder, cache: KVCache) -> None:
    config = EngineConfig(device="cpu", max_num_seqs=3, window=4)
    runners = [make_runner(config, role, captured(draft), cache) for role in ("draft", "target")]
    limits = [runner.limits for runner in runners if isinstance(runner, GraphRunner)]
    assert limits == [ShapeLimits(4, 1, 3, 4, 16), ShapeLimits(16, 5, 3, 4, 16)]  # of the target five rows a request
    assert not isinstance(
        make_runner(replace(config, enforce_eager=True), "draft", captured(draft), cache), GraphRunner
    )


@pytest.mark.usefixtures("asynchronous")
def test_an_operator_that_may_wait_is_named_not_skipped(draft: Decoder, cache: KVCache) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_runner(EngineConfig(device="cpu"), "draft", draft, cache)
    assert str(error.value).startswith("no CUDA graphs of the draft: verify_attention runs on 'cpu', which may wait")
    assert str(error.value).endswith("; use enforce_eager=True")
    make_runner(EngineConfig(device="cpu", enforce_eager=True), "draft", draft, cache)


@pytest.mark.parametrize("op", ON_A_GPU)
def test_each_operator_of_a_captured_call_counts(draft: Decoder, op: str) -> None:
    kernels = captured(draft).kernels
    assert why_not_captured(kernels) is None
    reason = why_not_captured(replace(kernels, providers={**kernels.providers, op: "reference"}))
    assert reason is not None
    assert reason.startswith(f"{op} runs on 'reference'")


@pytest.mark.parametrize(
    ("options", "draft", "target"),
    [
        ({}, {"urgent": True}, {"spare": None}),
        ({"draft_sms": 16}, {"urgent": True}, {"spare": 16}),
        ({"draft_device": "cuda:1"}, {"urgent": False}, {"spare": None}),
    ],
    ids=str,
)
def test_on_a_shared_gpu_the_draft_goes_first_and_the_target_leaves_it_a_part(
    options: dict[str, Any], draft: dict[str, Any], target: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runners, "open_queue", lambda name, device, **how: opened.update({name: how}))
    config = EngineConfig(device="cuda:0", **options)
    for role in ("draft", "target"):
        runners._queue(config, role)  # type: ignore[arg-type]
    assert opened == {"draft": draft, "target": target}
