"""``pearl plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pearl.cli.app import application
from pearl.errors import ConfigurationError


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(application(), ["plan", *arguments], env={"COLUMNS": "120"})


def test_measured_times_give_a_table_and_a_sentence() -> None:
    result = plan("--target-ms", "25", "--draft-ms", "3", "--acceptance", "0.8")
    assert result.exit_code == 0
    for part in ("8.3 steps in a forward", "speculative", "pearl", "Fastest should be", "times taking turns"):
        assert part in result.stdout
    worthless = plan("--target-ms", "1", "--draft-ms", "0.9", "--row-ms", "0.9")
    assert "Drafting is not worth it here" in worthless.stdout


def test_a_gpu_and_two_shapes_give_json() -> None:
    result = plan("--target", "70b", "--draft", "8b", "--gpu", "h200", "--target-gpus", "2", "--batch", "4", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    read = (70.55 - 128_256 * 8192e-9, 8.03 - 128_256 * 4096e-9)  # both have embeddings that are not the head
    assert found["ratio"] == pytest.approx(read[0] / read[1] / 2, rel=0.002)
    assert [one["method"] for one in found["forecasts"]] == ["autoregressive", "speculative", "two-halves", "pearl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give both"),
        (("--target-ms", "3"), "give both"),
        (("--target-ms", "3", "--draft-ms", "1", "--gpu", "h100"), "give both"),
        (("--target", "70b", "--draft", "1b", "--gpu", "tpu"), "known are a10"),
        (("--target", "70b", "--draft", "1b", "--gpu", "a10"), "share the target"),
        (("--target-ms", "3", "--draft-ms", "1", "--acceptance", "1.5"), "acceptance"),
        (("--target-ms", "-3", "--draft-ms", "1"), "the time of the target must be a number above 0, not -3 ms"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = plan(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigurationError)
    assert message in str(result.exception)


def test_heads_are_not_planned_as_models(tmp_path: Path) -> None:
    fields = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    result = plan("--target", "8b", "--draft", str(tmp_path), "--gpu", "h200")
    assert isinstance(result.exception, ConfigurationError)
    assert "is an EAGLE-3 head, whose steps are not planned from its size" in str(result.exception)


def test_models_of_both_backends_are_planned(tmp_path: Path) -> None:
    """Of the second there is a configuration alone: 12 layers of 12 matrices of 768 x 768."""
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    result = plan("--target", "8b", "--draft", str(tmp_path), "--gpu", "h200", "--json")
    assert result.exit_code == 0
    parameters = 12 * 12 * 768**2
    assert json.loads(result.stdout)["ratio"] == pytest.approx(8.0e9 / parameters, rel=0.1)
