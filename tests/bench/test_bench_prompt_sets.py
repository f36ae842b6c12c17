"""Prompt sets: what is read, and that everything else is refused in a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pearl import ConfigurationError
from pearl.bench import prompt_sets
from pearl.bench.prompt_sets import BUILT_IN, HUB_SETS, load_prompts


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEARL_DATA", raising=False)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_the_built_in_set_holds_different_prompts_of_some_length() -> None:
    prompts = load_prompts(BUILT_IN)
    assert len(prompts) >= 8
    assert len(set(prompts)) == len(prompts)
    assert min(map(len, prompts)) > 20


def test_limit_takes_the_first_prompts() -> None:
    prompts = load_prompts(BUILT_IN)
    assert load_prompts(BUILT_IN, 3) == prompts[:3]
    assert load_prompts(BUILT_IN, 10_000) == prompts


@pytest.mark.parametrize("key", ["prompt", "question", "turns", "text", "instruction"])
def test_each_known_key_holds_the_text(tmp_path: Path, key: str) -> None:
    path = jsonl(tmp_path / "set.jsonl", {"id": 1, key: "one"}, {key: "zwei\n\u0995"})
    assert load_prompts(str(path)) == ["one", "zwei\n\u0995"]
    assert load_prompts(str(path), 1) == ["one"]


def test_the_first_turn_is_the_prompt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "set.jsonl", {"turns": ["first", "second"]}, {"prompt": ["list", "of prompts"]})
    assert load_prompts(str(path)) == ["first", "list"]


def test_the_first_key_that_holds_something_wins(tmp_path: Path) -> None:
    rows = ({"text": "t", "question": "q", "prompt": "p"}, {"text": "t", "question": "q", "prompt": ""})
    assert load_prompts(str(jsonl(tmp_path / "set.jsonl", *rows))) == ["p", "q"]


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": "b"}')
    assert load_prompts(str(path)) == ["a", "b"]


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert load_prompts(str(path)) == ["a", "b"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    """JSON strings may hold Unicode's other line separators as they are."""
    path = tmp_path / "set.jsonl"
    path.write_text(f'{{"prompt": "a{separator}b"}}\n{{"prompt": "c"}}\n', "utf-8")
    assert load_prompts(str(path)) == [f"a{separator}b", "c"]


@pytest.mark.parametrize("name", sorted(HUB_SETS))
def test_a_known_set_is_read_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    jsonl(tmp_path / f"{name}.jsonl", {"prompt": f"of {name}"}, {"prompt": "more"})
    monkeypatch.setenv("PEARL_DATA", str(tmp_path))
    monkeypatch.setattr(prompt_sets, "_from_hub", lambda name: pytest.fail("a local file was there"))
    assert load_prompts(name) == [f"of {name}", "more"]
    assert load_prompts(name, 1) == [f"of {name}"]


def test_a_path_is_not_looked_up_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "mine.jsonl", {"prompt": "of the folder"})
    path = jsonl(tmp_path / "mine", {"prompt": "of the path"})
    monkeypatch.setenv("PEARL_DATA", str(tmp_path / "data"))
    assert load_prompts(str(path)) == ["of the path"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a"}\n', "utf-8-sig")
    assert load_prompts(str(path)) == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 5}', "line 1: prompt is int, not text"),
        ('{"turns": [["a"]]}', "line 1: turns is list, not text"),
        (r'{"text": "a\ud83d"}', "line 1: text holds half a surrogate pair"),
    ],
)
def test_what_is_no_text(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigurationError, match=message):
        load_prompts(str(path))


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]


def test_a_known_set_without_a_file_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(repository: str, configuration: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((repository, configuration, split))
        return [{"question": "one"}, {"question": "two"}]

    hub(monkeypatch, load_dataset)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEARL_DATA", str(tmp_path))
    assert load_prompts("gsm8k", 1) == ["one"]
    assert load_prompts("gsm8k") == ["one", "two"]
    assert asked == [("openai/gsm8k", "main", "test")] * 2


def refusal(name: str | Path) -> str:
    with pytest.raises(ConfigurationError) as error:
        load_prompts(str(name))
    return str(error.value)


def test_what_is_no_file_and_no_set_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing.jsonl", tmp_path, "humanevil"):
        message = refusal(name)
        assert repr(str(name)) in message
        for known in (BUILT_IN, *HUB_SETS):
            assert known in message


def test_what_is_not_json_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "fine"}\n\n{"prompt": \n')
    message = refusal(path)
    assert f"{path}, line 3 is not JSON" in message


@pytest.mark.parametrize("row", [{"answer": "42"}, {"prompt": ""}, {"prompt": None}, {"turns": []}, ["prompt"], 7])
def test_a_line_without_a_text_is_refused_with_its_line(tmp_path: Path, row: Any) -> None:
    path = jsonl(tmp_path / "set.jsonl", {"prompt": "fine"}, row)
    message = refusal(path)
    assert f"{path}, line 2" in message
    for key in ("prompt", "question", "turns", "text", "instruction"):
        assert key in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    assert refusal(path) == f"{path} holds no prompts"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    message = refusal(path)
    assert str(path) in message
    assert "UTF-8" in message


def test_without_datasets_the_hub_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]  # makes its import fail
    monkeypatch.chdir(tmp_path)
    message = refusal("humaneval")
    for part in ("humaneval.jsonl", "PEARL_DATA", "pip install datasets"):
        assert part in message


def test_a_hub_that_cannot_be_reached_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    hub(monkeypatch, load_dataset)
    monkeypatch.chdir(tmp_path)
    message = refusal("humaneval")
    for part in ("humaneval.jsonl", "PEARL_DATA", "no route to host"):
        assert part in message
