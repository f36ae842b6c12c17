"""A draft that can say some of its target's ids: its own logits there, -inf elsewhere; or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import edit_config, rewrite, save
from families import CONTEXT, load
from paged_harness import Harness, tokens_of
from safetensors.torch import load_file
from test_fused_decoder import CPU, assert_same_bits, both_dtypes
from test_weight_size import held_bytes

from pearl import LLM
from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.models import Decoder, ModelConfig, load_model
from pearl.models.checkpoint import stored_config
from pearl.models.draft_vocabulary import REDUCED_SIZE, TARGET_IDS
from pearl.models.model_features import features
from pearl.models.weight_size import read_bytes, weight_bytes
from pearl_kernels import Situation, select
from pearl_kernels.registry import OPERATORS

V, EMBEDDING, HEAD = 131, "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.tensor([130, 2, 5, *range(20, 90, 3)])  # in any order
FAMILIES = {"llama": False, "llama-tied": True, "gemma2": True}  # and whether they are tied


def reduced(family: str, folder: Path, keeps_embedding: bool = False) -> tuple[Path, Path]:
    """Folders of a whole model, and of the same one that can say IDS only."""
    whole, draft = folder / "whole", folder / "draft"
    tensors = save(family, whole)
    save(family, draft)
    tied = FAMILIES[family]
    rewrite(draft, {TARGET_IDS: IDS} | ({HEAD: None} if tied else {HEAD: tensors[HEAD][IDS]}))
    if not keeps_embedding:
        rewrite(draft, {EMBEDDING: None})
    edit_config(draft, **{REDUCED_SIZE: len(IDS)})
    return whole, draft


def load_draft(draft: Path, lender: Path | None, dtype: torch.dtype = torch.float32, provider: str = "") -> Decoder:
    kernels = select(Situation("cpu", dtype), dict.fromkeys(OPERATORS, provider) if provider else None)
    return load_model(draft, device=CPU, dtype=dtype, max_model_len=CONTEXT, kernels=kernels, lender=lender)


@pytest.mark.parametrize("provider", ["", "reference"])
@pytest.mark.parametrize("keeps_embedding", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_whole_models(tmp_path: Path, family: str, keeps_embedding: bool, provider: str) -> None:
    whole, draft = reduced(family, tmp_path, keeps_embedding)
    text = [*tokens_of(3, 30), 130, 0]  # most of which it cannot say
    lender = tmp_path / "nowhere" if keeps_embedding else whole
    models = load(whole), load_draft(draft, lender, provider=provider)
    expected, found = (Harness(model, [len(text)]).forward([(0, text, 0)])[0] for model in models)
    assert found.shape == (len(text), V)
    assert (found[:, IDS] - expected[:, IDS]).abs().max() <= 2e-5 * expected.abs().max()
    others = [token for token in range(V) if token not in IDS.tolist()]
    assert (found[:, others] == -torch.inf).all()


def test_a_gguf_file_lends_too(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writes files with the package gguf")
    from gguf_support import written

    whole, draft = reduced("llama-tied", tmp_path)
    written("llama-tied", tmp_path)
    lent = (load_draft(draft, lender).weights.embedding for lender in (whole, tmp_path / "model.gguf"))
    assert torch.equal(*lent)


@both_dtypes
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_in_one_call_has_the_same_bits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    whole, draft = reduced(family, tmp_path)
    assert_same_bits(load_draft(draft, whole, dtype), dtype, vocabulary=IDS)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_bytes(tmp_path: Path, family: str) -> None:
    """A token reads the head's rows, not the embedding."""
    whole, draft = reduced(family, tmp_path)
    config = stored_config(draft, ModelConfig.from_pretrained(str(draft)))
    assert config.borrows_embedding
    held = weight_bytes(config, torch.float32)
    assert held == held_bytes(load_draft(draft, whole, provider="reference"))
    embedding = load_file(whole / "model.safetensors")[EMBEDDING]
    assert read_bytes(config, torch.float32) == held - embedding.nbytes


@pytest.mark.parametrize(
    ("family", "keeps_embedding", "words"),
    [("llama", False, ["its target's"]), ("llama-tied", False, ["its target's", "rows are the embedding's"]),
     ("llama-tied", True, ["rows are the embedding's"])],
)  # fmt: skip
def test_what_is_recognised(tmp_path: Path, family: str, keeps_embedding: bool, words: list[str]) -> None:
    draft = reduced(family, tmp_path, keeps_embedding)[1]
    found = list(features(stored_config(draft, ModelConfig.from_pretrained(str(draft)))))
    begin = found.index("a draft that can say 27 of 131 ids")
    assert len(found) == begin + 1 + len(words)
    assert all(word in text for word, text in zip(words, found[begin + 1 :], strict=True))


Change = Callable[[Path], None]
SENTENCES: dict[str, tuple[Change, str]] = {
    "twice": (lambda f: rewrite(f, {TARGET_IDS: IDS.clone().index_fill_(0, torch.tensor([4]), 130)}), "another of the"),
    "none of the target's": (lambda f: rewrite(f, {TARGET_IDS: IDS + 1}), r"another of the target's 131"),
    "below 0": (lambda f: rewrite(f, {TARGET_IDS: IDS - 3}), "another of the"),
    "no integers": (lambda f: rewrite(f, {TARGET_IDS: IDS.float()}), "must hold integers"),
    "booleans": (lambda f: rewrite(f, {TARGET_IDS: IDS > 0}), r"must hold integers, not torch\.bool"),
    "too few": (lambda f: rewrite(f, {TARGET_IDS: IDS[1:]}), r"'draft_ids' has shape \(26,\)"),
    "no ids": (lambda f: rewrite(f, {TARGET_IDS: None}), "no tensor 'draft_ids'"),
    "no head": (lambda f: rewrite(f, {HEAD: None}), r"no tensor 'lm_head\.weight'"),
    "a whole head": (lambda f: rewrite(f, {HEAD: torch.ones(V, 48)}), r"'lm_head\.weight' has shape"),
    "nothing said of it": (lambda f: edit_config(f, **{REDUCED_SIZE: None}), r"has shape \(27, 48\)"),
    "nothing said of its ids": (
        lambda f: (
            rewrite(f, {EMBEDDING: torch.ones(V, 48), HEAD: torch.ones(V, 48)}),
            edit_config(f, **{REDUCED_SIZE: None}),
        )[1],
        "holds 'draft_ids', of which a LlamaForCausalLM .* makes no use",
    ),
    "more than there are": (lambda f: edit_config(f, **{REDUCED_SIZE: V + 1}), f"{REDUCED_SIZE}.*131"),
    "no number": (lambda f: edit_config(f, **{REDUCED_SIZE: "27"}), REDUCED_SIZE),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}),
        f"{REDUCED_SIZE} is not supported in a quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_what_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    whole, draft = reduced("llama", tmp_path)
    change, sentence = SENTENCES[case]
    change(draft)
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=sentence):
        load_draft(draft, whole)


def test_it_needs_the_target_that_it_was_made_for(tmp_path: Path) -> None:
    whole, draft = reduced("llama", tmp_path)
    with pytest.raises(ModelLoadError, match=r"no tensor 'model.embed_tokens.weight': it is a draft"):
        load_draft(draft, None)
    with pytest.raises(ConfigurationError, match="27 of its 131 ids only: it is a draft model"):
        LLM(target=str(draft), method="autoregressive", device="cpu")
    with pytest.raises(ConfigurationError, match="vocab_size=131, this one has 4096"):
        LLM(draft=str(draft), device="cpu")
    assert whole.exists()
