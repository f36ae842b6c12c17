"""Models on disk, built once for the whole run. Everything here is deterministic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from e2e_support import FAMILIES, KNOWN, VOCAB, Pair, Rounds, byte_tokenizer, perturbed, prompts, random_model, save
from graphed_llm import Graphed, OpenGraphed, on_devices
from plain_heads import (
    PlainEagle,
    Tensors,
    eagle_shape,
    random_eagle,
    random_medusa,
    save_head,
    teach_eagle,
    teach_medusa,
)
from recording_queue import RecordingQueue

from pearl import LLM
from pearl.config import EngineConfig
from pearl.engine.model_loading import load_models

_PERTURBATION = {"llama": 0.03, "mistral": 0.03, "qwen2": 0.04, "qwen3": 0.04}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """One pair for each family; Mistral's and Qwen3's have padded vocabularies, of different sizes."""
    tokenizer = byte_tokenizer()
    built = {}
    for name, config in FAMILIES.items():
        root = tmp_path_factory.mktemp(name)
        judge = random_model(config, seed=0)
        draft = perturbed(judge, _PERTURBATION[name])
        if name == "qwen3":
            draft.resize_token_embeddings(VOCAB + 4)
        target = save(judge, tokenizer, root / "target")
        built[name] = Pair(name, target, save(draft, tokenizer, root / "draft"), judge, tokenizer)
    return built


@pytest.fixture(scope="session")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


@pytest.fixture(scope="session")
def narrow(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Drafts that lack the ids from KNOWN on. Qwen2's head is its embedding; Mistral's target has padding."""
    built = {}
    for name in ("llama", "qwen2", "mistral"):
        draft = perturbed(pairs[name].judge, 0.03)
        draft.resize_token_embeddings(KNOWN)
        path = save(draft, byte_tokenizer(KNOWN), tmp_path_factory.mktemp(name))
        built[name] = replace(pairs[name], draft=path)
    return built


@pytest.fixture(scope="session")
def unrelated_draft(llama: Pair, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A draft that knows nothing of its target: almost everything it proposes is wrong."""
    return save(random_model(FAMILIES["qwen2"], seed=99), llama.tokenizer, tmp_path_factory.mktemp("unrelated"))


@pytest.fixture
def open_llm() -> Iterator[Callable[..., LLM]]:
    """``open_llm(pair, **options)``: an LLM that is closed when the test ends."""
    opened: list[LLM] = []

    def build(pair: Pair | None = None, **options: Any) -> LLM:
        options = {"capture_seconds": 0, **options}
        llm = pair.llm(**options) if pair is not None else LLM(**{"device": "cpu", **options})
        opened.append(llm)
        return llm

    yield build
    for llm in opened:
        llm.close()


@pytest.fixture
def open_graphed() -> Iterator[OpenGraphed]:
    """``open_graphed(pair, on="target draft", **options)``: the models named work on a recording device each; "apart":
    the target's is another one."""
    with ExitStack() as stack:

        def build(
            pair: Pair,
            on: str = "target draft",
            most_rows: int = 40,
            most: tuple[int, int] = (0, 0),
            **options: Any,
        ) -> Graphed:
            paths = {"target": pair.target, "draft": pair.draft}
            config = EngineConfig(**{**paths, "device": "cpu", "dtype": "float32", "capture_seconds": 0, **options})
            models, rounds = load_models(config), Rounds()
            # To torch "cpu:0" is the CPU, but it is not the device of the other model's tensors.
            elsewhere = torch.device("cpu", 0) if "apart" in on else torch.device("cpu")
            target = RecordingQueue(elsewhere) if "target" in on else None
            draft = RecordingQueue() if "draft" in on and models.draft else None
            models = on_devices(models, target, draft, most_rows, most)
            return Graphed(stack.enter_context(LLM.from_models(models, config, rounds)), target, draft, rounds)

        yield build


@dataclass(frozen=True)
class Headed:
    """A target with a head as its draft, which has seen the continuations of ``batch``."""

    pair: Pair
    plain: PlainEagle | Tensors
    batch: list[list[int]]


HEADED_LENGTHS = (1, 2, 3, 15, 16, 17, 40)


@pytest.fixture(scope="session")
def headed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Headed]:
    """``eagle`` drafts seven eighths of the ids; ``medusa`` are three heads of two blocks."""
    root, tokenizer = tmp_path_factory.mktemp("headed"), byte_tokenizer()
    config = copy.deepcopy(FAMILIES["llama"])
    config.num_hidden_layers = 4
    judge, batch = random_model(config, seed=0), prompts(HEADED_LENGTHS)
    pair = Pair("headed", save(judge, tokenizer, root / "target"), "", judge, tokenizer)
    texts = [prompt + pair.greedy(prompt, 24) for prompt in batch]
    shape = eagle_shape(judge)
    tensors = random_eagle(shape, seed=1)
    plain = PlainEagle(shape, tensors, judge.get_input_embeddings().weight.data)
    teach_eagle(plain, judge, texts)
    heads = random_medusa(judge, heads=3, blocks=2, seed=1)
    teach_medusa(heads, 2, judge, texts)
    medusa_shape = {"medusa_num_heads": 3, "medusa_num_layers": 2}
    eagle_path = save_head(root / "eagle", shape, tensors)
    medusa_path = save_head(root / "medusa", medusa_shape, heads, "medusa_lm_head.pt")
    return {
        "eagle": Headed(replace(pair, draft=eagle_path), plain, batch),
        "medusa": Headed(replace(pair, draft=medusa_path), heads, batch),
    }
