"""Prompts in every form: the right texts and ids, or a refusal that says what would be right."""

from __future__ import annotations

from collections import UserDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pearl.errors import InvalidRequestError
from pearl.prompts import ReadPrompt, read_prompt, read_prompts

MESSAGE = {"role": "user", "content": "Hello"}


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding."""


class Table:
    """As a pandas DataFrame: iterating over it gives the columns' names."""

    ndim = 2

    def __iter__(self) -> Any:
        return iter(["prompt", "answer"])


def texts(*prompts: str) -> list[ReadPrompt]:
    return [ReadPrompt(text=prompt) for prompt in prompts]


def ids(*prompts: list[int]) -> list[ReadPrompt]:
    return [ReadPrompt(token_ids=prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("ab", texts("ab")),
        (np.str_("ab"), texts("ab")),
        (["ab", "c"], texts("ab", "c")),
        (("ab",), texts("ab")),
        (deque(["ab", "c"]), texts("ab", "c")),
        ((text for text in ("ab", "c")), texts("ab", "c")),
        ({"x": "ab"}.values(), texts("ab")),
        (np.array(["ab", "c"]), texts("ab", "c")),
        (np.array(["ab", [1, 2]], dtype=object), [*texts("ab"), *ids([1, 2])]),
        ([1, 2], ids([1, 2])),
        ((1, 2), ids([1, 2])),
        (range(3), ids([0, 1, 2])),
        ((i for i in (1, 2)), ids([1, 2])),
        ([np.int32(1), 2, torch.tensor(3)], ids([1, 2, 3])),
        (np.array([1, 2], dtype=np.uint16), ids([1, 2])),
        (torch.tensor([1, 2]), ids([1, 2])),
        (np.array([[1, 2], [3, 4]]), ids([1, 2], [3, 4])),
        (torch.tensor([[1, 2]], dtype=torch.int32), ids([1, 2])),
        ([[1, 2], "ab", (3,), np.array([4])], [*ids([1, 2]), *texts("ab"), *ids([3], [4])]),
        ([], []),
        ([[]], ids([])),
        (np.array([], dtype=int), ids([])),
        ({"prompt": "ab"}, texts("ab")),
        ({"prompt": "ab", "multi_modal_data": None}, texts("ab")),
        ({"prompt_token_ids": (1, 2)}, ids([1, 2])),
        ({"prompt_token_ids": np.array([1, 2]), "prompt": "ab"}, [ReadPrompt("ab", [1, 2])]),
        ([{"prompt": "ab"}, "c", {"prompt_token_ids": [1]}], [*texts("ab", "c"), *ids([1])]),
        (Encoding(input_ids=[1, 2], attention_mask=[1, 1], token_type_ids=[0, 0]), ids([1, 2])),
        (Encoding(input_ids=[[1, 2], [3]]), ids([1, 2], [3])),
        (Encoding(input_ids=[[0, 1], [2, 3]], attention_mask=[[0, 1], [1, 1]]), ids([1], [2, 3])),
        (Encoding(input_ids=torch.tensor([[1, 0]]), attention_mask=torch.tensor([[1, 0]])), ids([1])),
        (Encoding(input_ids=np.array([9, 1, 9]), attention_mask=np.array([False, True, False])), ids([1])),
        ([Encoding(input_ids=[1, 2]), Encoding(input_ids=torch.tensor([[3, 4]]))], ids([1, 2], [3, 4])),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_form_gives_the_same_prompts(given: Any, wanted: list[ReadPrompt]) -> None:
    read = read_prompts(given)
    assert read == wanted
    assert all(type(token) is int for prompt in read for token in prompt.token_ids or ())
    if len(read) == 1:
        assert [read_prompt(read[0])] == wanted


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "a prompt is text or a list of token ids, not None"),
        (5, "not 5 (int)"),
        (True, "not True (bool)"),
        (1.5, "not 1.5 (float)"),
        (np.int64(5), "not a int64"),
        (torch.tensor(5), "not a Tensor"),
        (b"ab", "not bytes; decode it: prompt.decode()"),
        (memoryview(b"ab"), "not memoryview"),
        ([b"ab"], "prompts[0]: a prompt is text or a list of token ids, not bytes"),
        (Path("prompt.txt"), "PosixPath"),
        ({"ab", "c"}, "a set has no order"),
        ([{1, 2}], "prompts[0]: a prompt is text or a list of token ids; a set has no order"),
        (Table(), "not a Table"),
        (np.zeros((1, 1, 1), int), "this has 3"),
        ([1, "a"], "token id 'a' at position 1 is no integer"),
        ([True, 2], "token id True at position 0"),
        ([1, 2.0], "token id 2.0 at position 1"),
        (np.array([1.0]), "token id 1.0 at position 0"),
        ([[3], [1, None]], "prompts[1]: token id None at position 1"),
        (torch.tensor([[True]]), "prompts[0]: token id True at position 0"),
        (["ab", 1], "prompts[1]: a prompt is text or a list of token ids, not 1"),
        ([["ab"]], "prompts[0]: token id 'ab' at position 0"),
        ([[["ab"]]], "prompts[0]: token id ['ab'] at position 0"),
        ("a\udcffb", "half a character (U+DCFF) at position 1"),
        (["a", "\ud800"], "prompts[1]: the text has half a character"),
        (MESSAGE, "these are chat messages; use llm.chat(messages)"),
        ([MESSAGE], "these are chat messages; use llm.chat(messages)"),
        ([[MESSAGE], [MESSAGE]], "these are chat messages; use llm.chat(messages)"),
        ({"messages": [MESSAGE]}, "these are chat messages; use llm.chat(messages)"),
        ({}, "a dict needs 'prompt' (text) or 'prompt_token_ids'"),
        ({"prompt": None}, "a dict needs 'prompt'"),
        ({"text": "ab"}, "a dict with 'text' is no prompt"),
        ({"prompt": "ab", "multi_modal_data": {"image": 1}}, "a dict with 'multi_modal_data' is no prompt"),
        ({"prompt": ["ab", "c"]}, "several prompts into a list of dicts"),
        ({"prompt": [1, 2]}, "token ids belong under 'prompt_token_ids'"),
        ({"prompt_token_ids": "12"}, "not '12' (str)"),
        ({"prompt_token_ids": [[1], [2]]}, "token id [1] at position 0"),
        ({"input_ids": [1], "pixel_values": [0]}, "a dict with 'pixel_values'"),
        (Encoding(input_ids=[[1, 2]], attention_mask=[[1]]), "1 entries for 2 token ids"),
        (Encoding(input_ids=[[1], ["2"]]), "prompts[1]: token id '2' at position 0"),
        (Encoding(input_ids=[[1], [2]], attention_mask=[[1]]), "attention_mask has 1 rows, input_ids 2"),
        (Encoding(input_ids=[1, 2, 3], attention_mask=[1, 0, 1]), "attention_mask leaves out ids amid the prompt"),
        ([Encoding(input_ids=[[1], [2]])], "prompts[0]: a tokenizer's output for 2 texts; bring it alone"),
    ],
)
def test_what_is_no_prompt_is_refused_by_what_it_is(given: Any, says: str) -> None:
    for read in (read_prompts, read_prompt):
        with pytest.raises(InvalidRequestError) as error:
            read(given)
        assert says in str(error.value)
        assert len(str(error.value)) < 300


def test_where_one_is_wanted_several_are_refused() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"one prompt is wanted here, these are 2; llm\.generate takes several"
    ):
        read_prompt(["a", "b"])
