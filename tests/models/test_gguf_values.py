"""The numbers of stored tensors: those of the package gguf, whichever part of them is asked for, in whatever order."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="writes files with the package gguf")

import gguf
from gguf import GGMLQuantizationType
from gguf_files import GgufFile, encoded

from pearl.errors import ConfigurationError, UnsupportedModelError
from pearl.models.gguf import values
from pearl.models.gguf.header import StoredTensor, read_header
from pearl.models.gguf.package import decode, require_decodable, tensor_type
from pearl.models.gguf.values import TensorValues
from pearl_kernels.reference import dequantize

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
ROWS, COLUMNS = 12, 512


def stored(folder: Path, kind: str, rows: int = ROWS) -> tuple[StoredTensor, torch.Tensor]:
    """A random matrix, and what it decodes to."""
    generator = np.random.default_rng(1)
    data = encoded(generator.standard_normal((rows, COLUMNS), np.float32), kind, generator)
    file = GgufFile("llama", {}, {"before": (np.ones(3, np.float32), "F32"), "m": (data, kind)})
    numbers = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
    return read_header(Path(file.write(folder / "model.gguf"))).tensors["m"], torch.from_numpy(numbers.copy())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_parts_of_the_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded two rows at a time."""
    monkeypatch.setattr(values, "_DECODED", 2 * COLUMNS)
    tensor, numbers = stored(tmp_path, kind)
    matrix = TensorValues(tensor)
    assert matrix.get_shape() == (ROWS, COLUMNS)
    assert matrix[...].dtype == DTYPES.get(kind, torch.float32)
    for part in (..., slice(3, 8), slice(5, 5), (slice(0, 7),), (slice(2, 9), slice(100, 333))):
        assert torch.equal(matrix[part].float(), numbers[part])


@pytest.mark.parametrize(("kind", "heads"), [("F32", 3), ("Q8_0", 2), ("Q4_K", 6)])
def test_rows_of_queries_and_keys_are_put_in_order(kind: str, heads: int, tmp_path: Path) -> None:
    tensor, numbers = stored(tmp_path, kind)
    whole = numbers.view(heads, ROWS // heads // 2, 2, COLUMNS).transpose(1, 2).reshape(ROWS, COLUMNS)
    assert torch.equal(TensorValues(tensor, heads)[...], whole)
    assert torch.equal(TensorValues(tensor, heads)[4:9, 7:11], whole[4:9, 7:11])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("heads", [0, 3])
def test_few_bits_mean_the_same_numbers(kind: str, heads: int, tmp_path: Path) -> None:
    """Offsets are added up otherwise: the last bit of an fp32 number may differ."""
    tensor, _ = stored(tmp_path, kind)
    values = TensorValues(tensor, heads)
    matrix = values.quantized()
    assert matrix is not None
    assert (matrix.bits, matrix.group) == (8 if kind == "Q8_0" else 4, 32)
    assert (matrix.offset is not None) == (kind in ("Q4_1", "Q4_K"))
    torch.testing.assert_close(dequantize(matrix), values[...], rtol=0 if matrix.offset is None else 1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q5_K", "Q6_K"])
def test_other_types_are_decoded(kind: str, tmp_path: Path) -> None:
    assert TensorValues(stored(tmp_path, kind)[0]).quantized() is None


def test_what_transformers_adds_is_taken_off(tmp_path: Path) -> None:
    tensor, numbers = stored(tmp_path, "F32")
    assert torch.equal(TensorValues(tensor, shift=-1.0)[...], numbers - 1.0)


def test_a_type_that_cannot_be_decoded(tmp_path: Path) -> None:
    kind = tensor_type(int(GGMLQuantizationType.Q8_K))
    assert kind is not None
    with pytest.raises(UnsupportedModelError, match=r"'blk\.0\.ffn_up\.weight' is stored as Q8_K, which cannot"):
        require_decodable(kind, "blk.0.ffn_up.weight")
    with pytest.raises(UnsupportedModelError, match=r"^stored as Q8_K, which cannot be decoded"):
        decode(np.zeros((1, kind.size), np.uint8), kind)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(GgufFile("llama", {}, {"one": (np.ones(3, np.float32), "F32")}).write(tmp_path / "model.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigurationError, match=r"need the package gguf: pip install 'pearl-engine\[gguf\]'"):
        read_header(path)
