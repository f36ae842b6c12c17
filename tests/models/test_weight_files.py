"""Which files of a folder are read, and what is said of a folder where none can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import INDEX, SINGLE, assert_as_transformers, edit_config, save, write
from families import build, load

from pearl.errors import ModelLoadError
from pearl.models.weight_files import weight_files

POINTER = "version https://git-lfs.example/spec/v1\noid sha256:4d7a\nsize 29\n"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def test_one_file_wins_over_an_older_index_with_its_shards(tmp_path: Path) -> None:
    build("llama-tied").save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / INDEX).is_file()
    changed = build("llama-tied").half().float()
    for parameter in changed.parameters():
        parameter.data.mul_(1.5)
    write(tmp_path, {name: value for name, value in changed.state_dict().items() if name != "lm_head.weight"})
    assert_as_transformers(tmp_path)
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    assert_as_transformers(tmp_path)


def test_a_file_that_the_configuration_names_wins_over_both(tmp_path: Path) -> None:
    """And so does an index. Of the model's other weights here every matrix is zero."""
    tensors = save("llama", tmp_path)
    write(tmp_path, {name: value * 0 for name, value in tensors.items()})
    write(tmp_path, tensors, "best.safetensors")
    edit_config(tmp_path, transformers_weights="best.safetensors")
    assert_as_transformers(tmp_path)
    (tmp_path / "best.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "best.safetensors"}})
    )
    edit_config(tmp_path, transformers_weights="best.safetensors.index.json")
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("gone.safetensors", r"no gone\.safetensors, which its config\.json names in transformers_weights"),
        ("../up.safetensors", r"transformers_weights is '\.\./up\.safetensors'; it must name"),
        (["model.safetensors"], r"transformers_weights is \['model\.safetensors'\]; it must name"),
        ("/up.safetensors", r"transformers_weights is '/up\.safetensors'; it must name"),
        ("model.bin", r"transformers_weights is 'model\.bin'; it must name a safetensors file"),
    ],
)
def test_a_file_that_the_configuration_names_wrongly(named: object, message: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    edit_config(tmp_path, transformers_weights=named)
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POINTER, "is a Git LFS pointer.*git lfs pull"),
        ("", "is not JSON in UTF-8: .*download it again"),
        ("\xff\x00", "is not JSON in UTF-8"),
        ("[1, 2]", "must hold a JSON object, not a list"),
        ("null", "must hold a JSON object, not a NoneType"),
        ("{}", r"has no weight_map .*name that model\.safetensors"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"x": 3}}', "gives 3 for 'x', not the name of a safetensors file"),
        ('{"weight_map": {"x": "../a.safetensors"}}', r"gives '\.\./a\.safetensors' for 'x'"),
        ('{"weight_map": {"x": "/a.safetensors"}}', r"gives '/a\.safetensors' for 'x'"),
        ('{"weight_map": {"x": "pytorch_model-1.bin"}}', r"gives 'pytorch_model-1\.bin' for 'x'"),
        (
            '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"}}',
            r"names b\.safetensors and 1 more, of 3 files, missing from the folder",
        ),
    ],
)
def test_an_index_that_cannot_be_used_is_a_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    touch(tmp_path, "a.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        weight_files(tmp_path)


def test_weights_that_are_a_pointer(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / SINGLE).write_text(POINTER)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is a Git LFS pointer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], r"pickled \(pytorch_model\.bin\).*save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], r"pickled \(pytorch_model-00001"),
        (["model.fp16.safetensors"], r"only the variant 'fp16' .*rename it to model\.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "only the variant 'fp16'"),
        (
            ["model.bf16-00001-of-00002.safetensors", "model.safetensors.index.bf16.json"],
            r"only the variant 'bf16' .*index to model\.safetensors\.index\.json",
        ),
        (["model-00001-of-00002.fp16.safetensors"], "only the variant 'fp16'"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            r"shards \(model-00001-of-00002\.safetensors, \.\.\.\) but not their index",
        ),
        (["adapter_model.safetensors"], r"it is an adapter \(adapter_model\.safetensors\)"),
        (["consolidated.safetensors", "params.json"], r"its consolidated\.safetensors is in the format of"),
        (["consolidated.00.pth"], r"its consolidated\.00\.pth is in the format of"),
        (["model-Q4_K_M.gguf", "training_args.bin"], r"GGUF \(model-Q4_K_M\.gguf\)"),
        (["model.pt"], r"pickled \(model\.pt\)"),
        (["flax_model.msgpack"], r"weights \(flax_model\.msgpack\) belong to another framework"),
        (["model.onnx"], r"weights \(model\.onnx\) belong to another framework"),
        (["tf_model.h5"], r"weights \(tf_model\.h5\) belong to another framework"),
        (["weights.safetensors"], r"rename weights\.safetensors to model\.safetensors"),
        (["README.md", "optimizer.pt"], "there are no weights; download"),
    ],
)
def test_what_is_there_instead_is_named_with_what_to_do(names: list[str], message: str, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ModelLoadError, match=rf"no model\.safetensors and no .*: .*{message}"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_a_link_whose_file_is_gone(name: str, tmp_path: Path) -> None:
    """So copies of a hub's cache are left that took its links and not its blobs."""
    (tmp_path / name).symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(ModelLoadError, match=r": model\.safetensors\S* is there, but is no file, or a link to one"):
        weight_files(tmp_path)
    (tmp_path / "blobs" / "0123").mkdir(parents=True)
    with pytest.raises(ModelLoadError, match=r": model\.safetensors\S* is there, but is no file, or a link to one"):
        weight_files(tmp_path)
