"""Python code in a model's folder is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import ast
import io
import re
import shutil
from pathlib import Path

import pytest
from config_support import write_config

from pearl import LLM
from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models import ModelConfig, Tokenizer, bundled_path

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=["closed", "yes"])
def stdin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = io.StringIO("y\n" * 100)
    if request.param == "closed":
        answers.close()
    monkeypatch.setattr("sys.stdin", answers)


def add_code(folder: Path, name: str, trace: Path) -> None:
    """A module that leaves a trace when it is imported."""
    (folder / f"{name}.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'words'\n"
        "class Model: pass\nclass Words(PreTrainedTokenizerFast): pass\n"
    )


@pytest.mark.usefixtures("stdin")
def test_a_model_made_of_code_is_refused_at_once(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(bundled_path("target"), folder)
    add_code(folder, "code", trace)
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    write_config(folder, model_type="words", auto_map=auto_map)
    with pytest.raises(UnsupportedModelError, match=r"'words' is defined by Python code .* never runs code"):
        LLM(target=str(folder), draft="ngram", device="cpu")
    assert not trace.exists()


@pytest.mark.usefixtures("stdin")
def test_code_beside_a_known_family_is_ignored(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    add_code(tmp_path, "code", trace)
    folder = write_config(tmp_path, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    assert ModelConfig.from_pretrained(folder).architecture == "LlamaForCausalLM"
    assert not trace.exists()


@pytest.mark.usefixtures("stdin")
def test_a_tokenizer_made_of_code_is_refused_at_once(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(bundled_path("target"), folder)
    add_code(folder, "code", trace)
    add_tokenizer_map(folder)
    with pytest.raises(ModelLoadError, match=r"no tokenizer could be loaded .* never runs code from there"):
        Tokenizer.from_pretrained(str(folder))
    assert not trace.exists()


def add_tokenizer_map(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["code.Words", null]}, "tokenizer_class": "Words"}'
    )


def test_no_call_leaves_the_choice_to_transformers() -> None:
    """Where it is left out transformers asks on standard input."""
    texts = {file: file.read_text("utf-8") for name in ("pearl", "bench") for file in (REPOSITORY / name).rglob("*.py")}
    trees = [ast.parse(text, str(file)) for file, text in texts.items() if ".from_pretrained(" in text]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    auto = [call for call in calls if re.match(r"Auto\w+\.from_pretrained$", ast.unparse(call.func))]
    assert len(auto) >= 4
    assert not [ast.unparse(call) for call in auto if "trust_remote_code=False" not in ast.unparse(call)]
