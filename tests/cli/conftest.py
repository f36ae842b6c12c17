"""Fixtures of the command line's tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pearl import LLM
from pearl.models import bundled_path


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The library itself, configured as ``cli_support.SETTLED`` configures the command."""
    with LLM(dtype="float32", window=3, max_model_len=512, max_num_seqs=2) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target with the plainest chat template."""
    return _with_template(tmp_path_factory.mktemp("chat"), "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")


@pytest.fixture(scope="session")
def mute_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target without a chat template."""
    return _with_template(tmp_path_factory.mktemp("mute"), None)


def _with_template(folder: Path, template: str | None) -> Path:
    for file in bundled_path("target").iterdir():
        if file.name not in ("tokenizer_config.json", "chat_template.jinja"):
            (folder / file.name).symlink_to(file)
    config = json.loads((bundled_path("target") / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    return folder
