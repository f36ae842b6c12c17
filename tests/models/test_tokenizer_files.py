"""What a folder must hold for its tokenizer to load, and what is said where it does not; which ids end a text."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from config_support import ABSENT, write_config
from transformers import AutoTokenizer

from pearl.errors import ModelLoadError
from pearl.models import Tokenizer, bundled_path, tokenizer_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\xff\xff"  # begins as one, and is cut off
RANKS = [bytes([i]) for i in range(256)] + [b"he", b"the"]
TIKTOKEN = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(RANKS))


def tekken() -> bytes:
    special = [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(["<unk>", "<s>", "</s>"])]
    vocabulary = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(RANKS)]
    config = {"pattern": r"\s*\S+", "default_vocab_size": len(RANKS) + 3, "default_num_special_tokens": 3}
    return json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special}).encode()


def message(folder: str) -> str:
    with pytest.raises(ModelLoadError) as raised:
        Tokenizer.from_pretrained(folder)
    text = str(raised.value)
    assert text.startswith(f"no tokenizer could be loaded from {folder!r}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("content", "form", "lacking", "packages"),
    [
        (SENTENCEPIECE, "sentencepiece", {"sentencepiece", "google.protobuf"}, "sentencepiece and protobuf"),
        (SENTENCEPIECE, "sentencepiece", {"google.protobuf"}, "protobuf"),
        (TIKTOKEN[:-3], "tiktoken", {"tiktoken"}, "tiktoken"),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_packages_that_a_tokenizer_model_needs_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    content: bytes,
    form: str,
    lacking: set[str],
    packages: str,
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None if name in lacking else object())
    said = message(write_config(tmp_path, model_type=model_type))
    assert f"is in {form}'s form, which needs {packages}: pip install 'pearl-engine[sentencepiece]'; or give" in said


def test_a_damaged_tokenizer_model_is_not_taken_for_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: object())
    assert "tokenizer.model is damaged, or in no form" in message(write_config(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_tekken_alone_is_converted_as_transformers_does(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "tekken.json").write_bytes(tekken())
    folder = write_config(tmp_path, model_type=model_type, eos_token_id=2)
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("the é")
    assert ids == AutoTokenizer.from_pretrained(folder).encode("the é")
    assert ids[0] == 3 + RANKS.index(b"the")
    assert tokenizer.decode(ids) == "the é"
    assert 2 in tokenizer.eos_ids


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tekken.json", b"{}", "does not hold a tokenizer that transformers can read (KeyError: 'config')"),
        ("tekken.json", b"[", "is not JSON in UTF-8"),
        ("tekken.json", POINTER, "is a Git LFS pointer"),
        ("tokenizer.json", b"{}", "does not hold a tokenizer that transformers can read"),
        ("tokenizer.json", b"{", "is not JSON in UTF-8"),
        ("tokenizer.json", b'{"model": "\xff"}', "is not JSON in UTF-8"),
        ("tokenizer.json", POINTER, "is a Git LFS pointer"),
        ("tokenizer.model", POINTER, "is a Git LFS pointer"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} {expected}" in message(write_config(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"[1]", POINTER])
def test_bad_settings_beside_a_good_vocabulary_are_named(tmp_path: Path, content: bytes) -> None:
    shutil.copy(bundled_path("target") / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert f"{tmp_path / 'tokenizer_config.json'} " in message(write_config(tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}])
def test_no_vocabulary_at_all(tmp_path: Path, model_type: str, settings: dict[str, str] | None) -> None:
    """transformers makes empty tokenizers for some classes, which would encode every prompt as nothing."""
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has none of tokenizer.json, tokenizer.model, " in message(write_config(tmp_path, model_type=model_type))


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_a_dtype_of_the_configuration_is_no_matter_of_the_tokenizer(tmp_path: Path, dtype: str) -> None:
    """transformers reads the configuration for its tokenizer, and would stumble over the name."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_path("target") / name, tmp_path)
    assert Tokenizer.from_pretrained(write_config(tmp_path, dtype=dtype)).encode("def f():")


ENDS: list[tuple[Any, Any, set[int]]] = [
    (7, ABSENT, {0, 7}),
    ([7, 8], ABSENT, {0, 7, 8}),
    (None, ABSENT, {0}),
    (-1, ABSENT, {0}),
    (ABSENT, ABSENT, {0, 2}),  # the default of Llama's class, as in transformers
    (ABSENT, [9], {0, 9}),
    (ABSENT, None, {0}),
    (7, [8, 9], {0, 7, 8, 9}),
]


@pytest.mark.parametrize(("config", "generation", "expected"), ENDS, ids=repr)
def test_ids_that_end_a_text(tmp_path: Path, config: Any, generation: Any, expected: set[int]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_path("target") / name, tmp_path)
    if generation is not ABSENT:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert Tokenizer.from_pretrained(write_config(tmp_path, eos_token_id=config)).eos_ids == expected


def test_beside_a_generation_config_the_class_default_ends_no_text(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_path("target") / name, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true}')
    assert Tokenizer.from_pretrained(write_config(tmp_path)).eos_ids == {0}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id must be an integer or a list of integers, not '</s>'"),
        ('{"eos_token_id": [1, 2.0]}', "eos_token_id must be an integer or a list of integers, not [1, 2.0]"),
        ('{"eos_token_id": true}', "eos_token_id must be an integer or a list of integers, not True"),
        ("{", "is not JSON"),
        ("[2]", "must hold a JSON object, not a list"),
    ],
)
def test_a_bad_generation_config_is_named(tmp_path: Path, content: str, expected: str) -> None:
    """Ignored, it would take the ends of texts with it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_path("target") / name, tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelLoadError) as raised:
        Tokenizer.from_pretrained(write_config(tmp_path))
    assert "generation_config.json" in str(raised.value)
    assert expected in str(raised.value)
