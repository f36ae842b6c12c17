"""What is read without transformers is what transformers reads; what is not plain is left to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from pearl.errors import ModelLoadError
from pearl.models import ModelConfig, Tokenizer, bundled_path, plain_files
from pearl.models.plain_files import plain_config, plain_tokenizer

ROLES = ("target", "draft")
TEXTS = (
    "",
    "def f(x):\n\treturn x",
    "<|endoftext|>a <|endoftext|>",
    "  spaces  and\r\nlines",
    "Ж≠é語 🙂",
    "\0\x7f",
    "a" * 300,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled target's small files, to change."""
    for file in bundled_path("target").glob("*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text("utf-8"))
    change(values)
    file.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize("role", ROLES)
def test_a_plain_configuration(role: str) -> None:
    path = str(bundled_path(role))  # type: ignore[arg-type]
    plain, whole = plain_config(path), AutoConfig.from_pretrained(path)
    assert plain is not None
    assert {name: getattr(whole, name) for name in vars(plain) if name != "transformers_version"} == {
        name: value for name, value in vars(plain).items() if name != "transformers_version"
    }
    assert ModelConfig.from_transformers(plain) == ModelConfig.from_transformers(whole)


@pytest.mark.parametrize("role", ROLES)
def test_a_plain_tokenizer(role: str) -> None:
    path = str(bundled_path(role))  # type: ignore[arg-type]
    plain, whole = (
        plain_tokenizer(path, lambda: AutoTokenizer.from_pretrained(path)),
        AutoTokenizer.from_pretrained(path),
    )
    assert plain is not None
    assert plain.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
    for text in TEXTS:
        for special in (True, False):
            assert plain.encode(text, add_special_tokens=special) == whole.encode(text, add_special_tokens=special)
    assert len(plain) == len(whole)
    for name in ("eos_token_id", "all_special_ids", "all_special_tokens", "chat_template", "bos_token_id"):
        assert getattr(plain, name) == getattr(whole, name), name
    assert plain.get_vocab() == whole.get_vocab()
    assert {i: str(token) for i, token in plain.added_tokens_decoder.items()} == {
        i: str(token) for i, token in whole.added_tokens_decoder.items()
    }
    messages = [{"role": "user", "content": "x"}]
    assert plain.apply_chat_template(messages, tokenize=False, chat_template="{{ messages[0]['content'] }}") == "x"


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {"hidden_act": "gelu"},
        {"hidden_size": 383},
        {"num_hidden_layers": "8"},
        {"num_hidden_layers": True},
        {"dtype": "auto"},
        {"dtype": {"": "bfloat16"}},
        {"dtype": ["bfloat16"]},
        {"pretraining_tp": 1.0},
        {"pretraining_tp": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"sliding_window": 16},
        {"eos_token_id": [0, 1]},
    ],
)
def test_a_configuration_that_only_transformers_understands(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "config.json", lambda values: values.update(change))
    assert plain_config(str(folder)) is None
    assert plain_tokenizer(str(folder), object) is None


def test_a_missing_field_has_transformers_default(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values.pop("num_key_value_heads"))
    assert plain_config(str(folder)) is None
    assert ModelConfig.from_pretrained(str(folder)).kv_heads == 6


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"add_bos_token": True},
        {"eos_token": "</s>"},
        {"eos_token": {"content": "<|endoftext|>"}},
        {"extra_special_tokens": ["<a>"]},
    ],
)
def test_a_tokenizer_that_only_transformers_understands(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "tokenizer_config.json", lambda values: values.update(change))
    assert plain_tokenizer(str(folder), object) is None


@pytest.mark.parametrize(
    "change",
    [
        {"post_processor": None},
        {
            "padding": {
                "strategy": {"Fixed": 9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<|endoftext|>",
            }
        },
        {"truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}},
    ],
)
def test_a_tokenizer_json_that_transformers_changes(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "tokenizer.json", lambda values: values.update(change))
    assert plain_tokenizer(str(folder), object) is None


def test_a_vocabulary_so_large_that_transformers_may_mend_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_files, "_MOST_TOKENS", 4096)
    assert plain_tokenizer(str(folder), object) is not None
    monkeypatch.setattr(plain_files, "_MOST_TOKENS", 4095)
    assert plain_tokenizer(str(folder), object) is None


def test_a_folder_with_more_tokenizer_files(folder: Path) -> None:
    (folder / "added_tokens.json").write_text("{}")
    assert plain_tokenizer(str(folder), object) is None


def test_a_chat_template_that_cannot_be_read_is_a_sentence(folder: Path) -> None:
    """It is read when it is asked for: generating does not need it."""
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    tokenizer = Tokenizer.from_pretrained(str(folder))
    assert tokenizer.encode("x")
    with pytest.raises(ModelLoadError, match=r"no tokenizer could be loaded .*can't decode byte 0xff"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_dtypes_are_torch_s(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values.update(dtype="float16"))
    config = plain_config(str(folder))
    assert config is not None
    assert config.dtype is torch.float16
