"""What users bring as prompts, as a list of texts and token ids: all the forms that other engines take.

One prompt: a text; token ids in a list, an array or a tensor of one dimension; a dict with ``prompt`` or
``prompt_token_ids``; what a tokenizer returned for one text. Several: a list, tuple or generator of these, an array of
two dimensions, what a tokenizer returned for several texts. Anything else is refused by its type, because the nearest
guess would be another prompt without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.user_values import as_integer, lone_surrogate, shown

_WANTED = "a prompt is text or a list of token ids"
_PROMPT_KEYS = ("prompt", "prompt_token_ids")
# Of a tokenizer's output, what says nothing that ids and mask do not.
_ENCODING_KEYS = (
    "input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length",
)  # fmt: skip


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt: its text, its token ids (integers, not yet looked up in a vocabulary), or both."""

    text: str | None = None
    token_ids: list[int] | None = None


AnyPrompts = str | ReadPrompt | Mapping[str, Any] | Iterable[Any]


def read_prompts(given: Any) -> list[ReadPrompt]:
    """Whatever a user brings as one prompt or several. Raises InvalidRequestError."""
    if isinstance(given, (str, ReadPrompt)):
        return [_read_one(given, "")]
    if isinstance(given, Mapping):
        return _from_mapping(given, "")
    if _has_dimensions(given):
        return _from_array(given)
    items = _items(given, "")
    if items and _is_number(items[0]):
        return [ReadPrompt(token_ids=_token_ids(items, ""))]
    return [_read_one(item, f"prompts[{index}]: ") for index, item in enumerate(items)]


def read_prompt(given: Any) -> ReadPrompt:
    """Likewise, where exactly one is wanted."""
    prompts = read_prompts(given)
    if len(prompts) > 1:
        raise InvalidRequestError(f"one prompt is wanted here, these are {len(prompts)}; llm.generate takes several")
    return prompts[0] if prompts else ReadPrompt(token_ids=[])


def _read_one(given: Any, where: str) -> ReadPrompt:
    if isinstance(given, ReadPrompt):
        return given
    if isinstance(given, str):
        return ReadPrompt(text=_text(given, where))
    if isinstance(given, Mapping):
        prompts = _from_mapping(given, where)
        if len(prompts) != 1:
            raise InvalidRequestError(f"{where}a tokenizer's output for {len(prompts)} texts; bring it alone")
        return prompts[0]
    return ReadPrompt(token_ids=_token_ids(_items(given, where), where))


def _from_array(given: Any) -> list[ReadPrompt]:
    """An array or tensor: one dimension is a prompt, two are one in each row; arrays of objects are lists."""
    values = _listed(given, "")
    if given.ndim == 1 and values and not _is_number(values[0]):
        return [_read_one(value, f"prompts[{index}]: ") for index, value in enumerate(values)]
    if given.ndim == 1:
        return [ReadPrompt(token_ids=_token_ids(values, ""))]
    if given.ndim == 2:
        return [ReadPrompt(token_ids=_token_ids(row, f"prompts[{i}]: ")) for i, row in enumerate(values)]
    raise InvalidRequestError(f"{_WANTED}, several a list or an array of two dimensions; this has {given.ndim}")


def _from_mapping(given: Mapping[Any, Any], where: str) -> list[ReadPrompt]:
    _refuse_messages(given, where)
    given = {key: value for key, value in given.items() if value is not None}
    known = _ENCODING_KEYS if "input_ids" in given else _PROMPT_KEYS
    if unknown := [key for key in given if key not in known]:
        raise InvalidRequestError(
            f"{where}a dict with {shown(unknown[0])} is no prompt that this engine understands; bring a dict with "
            "'prompt' (text) or 'prompt_token_ids', or what a tokenizer returned, with nothing else in it"
        )
    if "input_ids" in given:
        return _from_encoding(given["input_ids"], given.get("attention_mask"), where)
    text, ids = given.get("prompt"), given.get("prompt_token_ids")
    if text is None and ids is None:
        raise InvalidRequestError(f"{where}a dict needs 'prompt' (text) or 'prompt_token_ids'")
    if text is not None and not isinstance(text, str):
        advice = "token ids belong under 'prompt_token_ids', several prompts into a list of dicts"
        raise InvalidRequestError(f"{where}'prompt' is a text, not {shown(text)}; {advice}")
    ids = None if ids is None else _token_ids(_items(ids, where), where)
    return [ReadPrompt(None if text is None else _text(text, where), ids)]


def _from_encoding(input_ids: Any, mask: Any, where: str) -> list[ReadPrompt]:
    """A tokenizer's output, padded or not; without a mask every id counts."""
    rows = _items(input_ids, where)
    if not rows or _is_number(rows[0]):
        rows, mask = [rows], None if mask is None else [_items(mask, where)]
    elif mask is not None:
        mask = _items(mask, where)
    if mask is not None and len(mask) != len(rows):
        raise InvalidRequestError(f"{where}attention_mask has {len(mask)} rows, input_ids {len(rows)}")
    prompts = []
    for index, row in enumerate(rows):
        row_name = f"prompts[{index}]: " if len(rows) > 1 else where
        ids = _token_ids(_items(row, row_name), row_name)
        if mask is not None:
            ids = _without_padding(ids, _items(mask[index], row_name), row_name)
        prompts.append(ReadPrompt(token_ids=ids))
    return prompts


def _without_padding(ids: list[int], mask: Sequence[Any], where: str) -> list[int]:
    if len(mask) != len(ids):
        raise InvalidRequestError(f"{where}attention_mask has {len(mask)} entries for {len(ids)} token ids")
    kept = [index for index, seen in enumerate(mask) if seen]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise InvalidRequestError(f"{where}attention_mask leaves out ids amid the prompt; padding is at its ends only")
    return [ids[index] for index in kept]


def _token_ids(items: Sequence[Any], where: str) -> list[int]:
    if all(type(item) is int for item in items):
        return list(items)
    if items and isinstance(items[0], Mapping):
        _refuse_messages(items[0], where)
    ids = []
    for position, item in enumerate(items):
        plain = item.tolist() if getattr(item, "ndim", None) == 0 and hasattr(item, "tolist") else item
        token = None if isinstance(plain, float) else as_integer(plain)
        if token is None:
            raise InvalidRequestError(f"{where}token id {shown(item)} at position {position} is no integer; {_WANTED}")
        ids.append(token)
    return ids


def _text(given: str, where: str) -> str:
    if (at := lone_surrogate(given)) is not None:
        raise InvalidRequestError(
            f"{where}the text has half a character (U+{ord(given[at]):04X}) at position {at}; read it as UTF-8 or with "
            "errors='replace'"
        )
    return str(given)


def _items(given: Any, where: str) -> list[Any]:
    """The items of a list, an array or anything that can be iterated over in an order of its own."""
    if isinstance(given, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(f"{where}{_WANTED}, not {type(given).__name__}; decode it: prompt.decode()")
    if isinstance(given, (set, frozenset)):
        raise InvalidRequestError(f"{where}{_WANTED}; a {type(given).__name__} has no order, bring a list")
    if _has_dimensions(given):
        return _listed(given, where)
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise InvalidRequestError(f"{where}{_WANTED}, not {shown(given)} ({type(given).__name__})")
    return list(given)


def _listed(array: Any, where: str) -> list[Any]:
    if array.ndim == 0 or not hasattr(array, "tolist"):  # a number; a table, which would give its columns' names
        raise InvalidRequestError(f"{where}{_WANTED}, not a {type(array).__name__}; bring a list or an array of ids")
    values: list[Any] = array.tolist()
    return values


def _has_dimensions(given: Any) -> bool:
    """Whether it is of numpy, torch, pandas or their like."""
    return hasattr(given, "ndim") and not isinstance(given, memoryview)


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or getattr(value, "ndim", None) == 0


def _refuse_messages(given: Mapping[Any, Any], where: str) -> None:
    if "role" in given or "messages" in given:
        raise InvalidRequestError(f"{where}these are chat messages; use llm.chat(messages), which applies the template")
