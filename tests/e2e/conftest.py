"""Models on disk, built once for the whole run. Everything here is deterministic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from e2e_support import FAMILIES, KNOWN, VOCAB, Pair, byte_tokenizer, perturbed, random_model, save

from pearl import LLM

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
