"""What is fetched of a repository: what will be read. A stand-in for the hub filters names as its client does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import INDEX, SINGLE, edit_config, save
from families import build, load
from huggingface_hub.utils import filter_repo_objects

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.hub import fetch_gguf, fetch_weights

NOISE = [
    "README.md", "consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5",
    "model.fp16-00001-of-00002.safetensors", "onnx/config.json", "onnx/model.safetensors", "original/model.safetensors",
    "checkpoint-10/model.safetensors", "tokenizer.json", "adapter_model.safetensors",
]  # fmt: skip
COMMIT = "0123abcd"


class FakeHub:
    """One repository, "org/model": a folder. ``cache`` holds what was fetched of it."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.cache = folder / "repository", folder / "cache" / COMMIT
        self.repository.mkdir()
        self.cache.mkdir(parents=True)
        self.revisions: list[str | None] = []
        for name in NOISE:
            self.add(name)

    def add(self, name: str, text: str = "x") -> None:
        (self.repository / name).parent.mkdir(exist_ok=True)
        (self.repository / name).write_text(text)

    def names(self, path: str, revision: str | None = None) -> list[str]:
        if path != "org/model":
            raise OSError("401 Client Error")
        self.revisions.append(revision)
        return [str(p.relative_to(self.repository)) for p in self.repository.rglob("*") if p.is_file()]

    def snapshot(self, path: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        for name in filter_repo_objects(self.names(path, revision), allow_patterns=allow_patterns):
            (self.cache / name).parent.mkdir(exist_ok=True)
            shutil.copy(self.repository / name, self.cache / name)
        return str(self.cache)

    def fetched(self) -> set[str]:
        return {str(p.relative_to(self.cache)) for p in self.cache.rglob("*") if p.is_file()}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", fake.names)
    return fake


def test_one_file_is_fetched_and_no_shards_beside_it(there: FakeHub) -> None:
    save("llama", there.repository)
    there.add(INDEX, json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    there.add("model-00001-of-00001.safetensors")
    load(Path("org/model"))
    assert there.fetched() == {"config.json", SINGLE}


def test_shards_are_fetched_as_their_index_names_them(there: FakeHub) -> None:
    build("llama").save_pretrained(there.repository, max_shard_size="30KB")
    shards = {path.name for path in there.repository.glob("model-*")}
    there.add("model-00009-of-00009.safetensors")
    load(Path("org/model"))
    assert len(shards) > 2
    assert there.fetched() == {"config.json", INDEX, *shards}


def test_a_name_is_no_pattern(there: FakeHub) -> None:
    there.add("config.json", "{}")
    there.add(INDEX, json.dumps({"weight_map": {"x": "*.safetensors", "y": "part[1].safetensors"}}))
    there.add("part[1].safetensors")
    fetch_weights("org/model")
    assert there.fetched() == {"config.json", INDEX, "part[1].safetensors"}


def test_a_file_that_the_configuration_names(there: FakeHub) -> None:
    save("llama", there.repository)
    (there.repository / SINGLE).rename(there.repository / "best.safetensors")
    edit_config(there.repository, transformers_weights="best.safetensors")
    load(Path("org/model"))
    assert there.fetched() == {"config.json", "best.safetensors"}


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_a_quantised_model_is_refused_before_its_weights_are_fetched(name: str, there: FakeHub) -> None:
    save("llama", there.repository)
    settings = {"quantization_config": {"quant_method": "aqlm"}, "quantization": {"quant_algo": "NVFP4"}}
    there.add(name, json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match=r"quantised with .*(aqlm|NVFP4)"):
        load(Path("org/model"))
    assert SINGLE not in there.fetched()


def test_what_the_repository_has_instead_is_named_and_not_fetched(there: FakeHub) -> None:
    """Its folders are not looked into: onnx/model.safetensors is no weights of this model."""
    there.add("config.json", "{}")
    for path in there.repository.glob("*.*"):
        if path.suffix in {".safetensors", ".h5"}:
            path.unlink()
    with pytest.raises(
        ModelLoadError, match=r"'org/model' holds no model\.safetensors.*pickled \(pytorch_model\.bin\)"
    ):
        fetch_weights("org/model")
    (there.repository / "pytorch_model.bin").unlink()
    with pytest.raises(ModelLoadError, match="there are no weights"):
        fetch_weights("org/model")
    assert there.fetched() == {"config.json"}


def test_all_files_are_of_one_commit(there: FakeHub) -> None:
    save("llama", there.repository)
    fetch_weights("org/model")
    first, *others = there.revisions
    assert first is None
    assert set(others) == {COMMIT}


def test_a_repository_that_cannot_be_reached(there: FakeHub) -> None:
    with pytest.raises(ModelLoadError, match=r"'org/other' is no folder.*give a folder with a config\.json.*401"):
        fetch_weights("org/other")


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "../org/model", "~/model", "folder/of/models"])
def test_what_can_be_no_hub_id_is_a_folder_that_is_not_there(there: FakeHub, path: str) -> None:
    with pytest.raises(ModelLoadError, match=f"there is no folder '{path}': give one with a config.json"):
        fetch_weights(path)
    assert there.revisions == [], "the hub was asked"


@pytest.fixture
def with_gguf(there: FakeHub) -> FakeHub:
    """Two files of one model, of which one is in parts, and a folder with a third."""
    for name in ("m-Q8_0.gguf", "m-F32-00001-of-00002.gguf", "m-F32-00002-of-00002.gguf", "more/m-Q8_0.gguf"):
        there.add(name, f"of {name}")
    return there


def test_a_gguf_file_is_fetched_alone(with_gguf: FakeHub) -> None:
    assert fetch_gguf("org/model:m-Q8_0.gguf").read_text() == "of m-Q8_0.gguf"
    assert with_gguf.fetched() == {"m-Q8_0.gguf"}
    assert fetch_gguf("org/model:more/m-Q8_0.gguf").read_text() == "of more/m-Q8_0.gguf"


def test_a_gguf_file_is_fetched_with_its_parts(with_gguf: FakeHub) -> None:
    assert fetch_gguf("org/model:m-F32-00001-of-00002.gguf").name == "m-F32-00001-of-00002.gguf"
    assert with_gguf.fetched() == {"m-F32-00001-of-00002.gguf", "m-F32-00002-of-00002.gguf"}


def test_gguf_files_that_are_not_there(with_gguf: FakeHub, tmp_path: Path) -> None:
    known = r"its GGUF files are m-F32-00001-of-00002\.gguf, m-F32-00002-of-00002\.gguf, m-Q8_0\.gguf"
    for name in ("other.gguf", "m-F32-00001-of-00003.gguf"):
        with pytest.raises(ModelLoadError, match=rf"'org/model' holds no .*\.gguf; {known}"):
            fetch_gguf(f"org/model:{name}")
    with pytest.raises(ModelLoadError, match=r"'org/other' is no folder.*hub could not provide it.*401"):
        fetch_gguf("org/other:m.gguf")
    with pytest.raises(ModelLoadError, match=r"there is no file '.*m\.gguf'; of the hub give repository:file\.gguf"):
        load(tmp_path / "m.gguf")


def test_a_repository_of_gguf_files_is_no_folder_of_a_model(with_gguf: FakeHub) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json: .*of the hub: repository:file\.gguf"):
        load(Path("org/model"))
