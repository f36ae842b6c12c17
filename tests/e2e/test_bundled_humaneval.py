"""The bundled pair in fp32 on real prompts: every method returns what transformers' ``generate`` returns.

HumanEval is no part of the repository: it is read from $PEARL_DATA or from ../shared/data beside the repository, and
where neither exists the beginnings of standard library modules take its place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_support import ALL_SETTINGS, Reference, acceptance, assert_at_rest, greedy_reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from pearl import LLM, SamplingParams
from pearl.models import bundled_path

OpenLLM = Callable[..., LLM]
PROMPTS, TOKENS = 52, 32
ROTATION = [
    *("autoregressive", "speculative-1", "speculative-5", "speculative-auto"),
    *("pearl-1", "pearl-2", "pearl-3", "pearl-5", "pearl-8"),
    *("pearl-no-pre-3", "pearl-no-post-3", "pearl-neither-4", "ngram-pearl"),
]


def humaneval_file() -> Path | None:
    roots = [Path(os.environ["PEARL_DATA"])] if "PEARL_DATA" in os.environ else []
    roots.append(Path(__file__).resolve().parents[3] / "shared" / "data")
    return next((root / "humaneval.jsonl" for root in roots if (root / "humaneval.jsonl").exists()), None)


def real_prompts() -> list[str]:
    if (path := humaneval_file()) is not None:
        lines = path.read_text("utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines[:PROMPTS]]
    texts = []
    for name in sorted(sys.stdlib_module_names):
        spec = importlib.util.find_spec(name) if not name.startswith("_") else None
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            texts.append("\n".join(Path(spec.origin).read_text("utf-8").splitlines()[:15]) + "\n")
    return [text for text in texts if len(text) > 100][:PROMPTS]


class Bundled:
    def __init__(self) -> None:
        path = str(bundled_path("target"))
        self.texts = real_prompts()
        tokenizer = AutoTokenizer.from_pretrained(path)
        judge = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        self.ids: list[list[int]] = [tokenizer.encode(text) for text in self.texts]
        eos = judge.generation_config.eos_token_id
        self.references = [greedy_reference(judge, ids, TOKENS, margin=1e-3, eos_token_id=eos) for ids in self.ids]


@pytest.fixture(scope="module")
def bundled() -> Bundled:
    return Bundled()


def assert_equal_while_decisive(tokens: list[int], reference: Reference) -> None:
    """Exact up to the first near-tie of the target, which no two implementations need to decide alike."""
    if reference.decisive == len(reference.tokens):
        assert tokens == reference.tokens
    assert tokens[: reference.decisive] == reference.tokens[: reference.decisive]


def test_there_are_enough_prompts_and_hardly_any_near_ties(bundled: Bundled) -> None:
    assert len(bundled.texts) >= 50
    total = sum(len(reference.tokens) for reference in bundled.references)
    assert sum(reference.decisive for reference in bundled.references) > 0.95 * total


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_pearl_with_its_defaults_equals_transformers(bundled: Bundled, open_llm: OpenLLM, verification: Any) -> None:
    llm = open_llm(dtype="float32", verification=verification, max_num_seqs=8)
    outputs = llm.generate(bundled.texts, SamplingParams(max_tokens=TOKENS))
    assert [output.prompt_token_ids for output in outputs] == bundled.ids
    for output, reference in zip(outputs, bundled.references, strict=True):
        assert_equal_while_decisive(output.outputs[0].token_ids, reference)
    assert 0.4 < acceptance(outputs) < 0.98
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", ROTATION)
def test_every_method_equals_transformers(bundled: Bundled, open_llm: OpenLLM, setting: str) -> None:
    """Each setting takes every fourth prompt, starting elsewhere: one batch of mixed lengths, in chunks."""
    chosen = range(ROTATION.index(setting) % 4, PROMPTS, 4)
    llm = open_llm(dtype="float32", **ALL_SETTINGS[setting], max_num_batched_tokens=128)
    outputs = llm.generate([bundled.texts[i] for i in chosen], SamplingParams(max_tokens=TOKENS))
    for output, i in zip(outputs, chosen, strict=True):
        assert_equal_while_decisive(output.outputs[0].token_ids, bundled.references[i])
    assert_at_rest(llm)
