"""Index arrays of a forward, and their padding to a bucket; transfers that carry many arrays at once."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from pearl.host_tensors import Layout, array, start_download, upload
from pearl.messages import ForwardWork, SequenceState
from pearl.models import ForwardBatch
from pearl.sampling_params import SamplingParams
from pearl.workers.batch_arrays import DTYPES, BatchLists
from pearl.workers.shapes import ShapeLimits

hypothesis = pytest.importorskip("hypothesis", reason="some arrays here are hypothesis's examples")
given, st = hypothesis.given, hypothesis.strategies
PAGE = 4
CPU = torch.device("cpu")


def work(start: int, count: int, wanted: int, table: tuple[int, ...]) -> ForwardWork:
    state = SequenceState(0, 0, SamplingParams(), 0, 0, None)
    return ForwardWork(state, tuple(range(100, 100 + count)), start, wanted, table)


def test_the_arrays_are_the_fields_of_a_batch() -> None:
    assert [*DTYPES, "most_rows"] == [field.name for field in fields(ForwardBatch)]
    lists = BatchLists.of([work(0, 3, 0, (5,)), work(6, 2, 2, (7, 2))], PAGE)
    found = {name: values.tolist() for name, values in lists.arrays().items()}
    assert found == {
        "input_ids": [100, 101, 102, 100, 101],
        "positions": [0, 1, 2, 6, 7],
        "slot_mapping": [20, 21, 22, 10, 11],
        "block_tables": [[5, -1], [7, 2]],
        "query_start": [0, 3, 5],
        "context_lens": [3, 8],
        "logits_rows": [3, 4],
    }
    assert {name: torch.from_numpy(a).dtype for name, a in lists.arrays().items()} == DTYPES


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=9))
def test_padding_is_a_valid_batch_that_writes_nothing(items: list[tuple[int, int]]) -> None:
    """Real rows stay where they are; the others belong to sequences whose every key and page exists."""
    batch = [work(start, count, count, tuple(range(1, 2 + (start + count - 1) // PAGE))) for start, count in items]
    plain = BatchLists.of(batch, PAGE).arrays()
    lists = BatchLists.of(batch, PAGE)
    longest = max(len(item.block_table) for item in batch)
    shape = ShapeLimits(96, 9, 9, 20, PAGE).shape(len(lists.input_ids), len(batch), longest)
    lists.pad(shape)
    padded = lists.arrays()
    rows, sequences = len(plain["input_ids"]), len(batch)
    assert len(padded["input_ids"]) == len(padded["positions"]) == len(padded["slot_mapping"]) == shape.rows
    assert padded["block_tables"].shape == (shape.sequences + 1, shape.pages)
    assert padded["query_start"].shape == (shape.sequences + 2,)
    for name in ("input_ids", "positions", "slot_mapping"):
        assert (padded[name][:rows] == plain[name]).all()
    assert (padded["slot_mapping"][rows:] == -1).all()
    assert (padded["context_lens"][:sequences] == plain["context_lens"]).all()
    assert padded["query_start"][-1] == shape.rows
    lengths, counts = padded["context_lens"], np.diff(padded["query_start"])
    assert (counts >= 0).all()
    assert (counts <= lengths).all()
    pages = -(-lengths // PAGE)
    assert (pages <= shape.pages).all()
    for table, count in zip(padded["block_tables"], pages, strict=True):
        assert (table[:count] >= 0).all()


def test_a_layout_keeps_arrays_apart_and_aligned() -> None:
    arrays = [array([1, 2, 3], torch.int64), array([[1.5], [2.5]], torch.float32), array([], torch.int32),
              array([7], torch.int32)]  # fmt: skip
    layout = Layout.of(arrays)
    assert layout.offsets == (0, 32, 48, 48, 64)
    buffer = layout.pack(arrays, pinned=False)
    assert buffer.dtype == torch.uint8
    for view, a in zip(layout.views(buffer), arrays, strict=True):
        assert view.data_ptr() % 16 == buffer.data_ptr() % 16
        assert view.numpy().dtype == a.dtype
        assert (view.numpy() == a).all()
        assert view.shape == a.shape


def test_on_cpu_nothing_is_copied() -> None:
    values = array([1, 2], torch.int64)
    (tensor,) = upload([values], CPU)
    values[0] = 9
    assert tensor.tolist() == [9, 2]
    assert start_download([tensor])[0] is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_transfers_to_a_gpu_and_back() -> None:
    device = torch.device("cuda")
    arrays = [array(range(1000), torch.int64), array([[0.5, 1.5]], torch.float32), array([3], torch.int32)]
    back = start_download(upload(arrays, device))
    torch.cuda.synchronize()
    for tensor, a in zip(back, arrays, strict=True):
        assert (tensor.numpy() == a).all()
