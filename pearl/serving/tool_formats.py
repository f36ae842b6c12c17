"""How models write calls of tools, and which of these ways a chat template teaches."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

_CALL, _CALL_END, _TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_OTHERS = ("<function=", "<arg_key>")  # begin calls that are no JSON, behind the same tag


class Opening(NamedTuple):
    """Where a call may begin in a text."""

    start: int  # of what belongs to it
    keep: int  # up to here it is content if there is no call
    call: int  # where the JSON begins
    tagged: bool  # a tag says that there is a call


@dataclass(frozen=True)
class ToolFormat:
    """``opening``: the tag that opens a call. ``bare``: an object at the beginning of a line may be a call without it.

    ``closing``: the tag that ends a call, "" if none does; ``separators``: characters that may follow a call.
    ``key``: of the arguments.
    """

    name: str
    opening: str
    closing: str
    separators: str
    bare: bool
    key: str

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.opening, self.closing)))

    def find(self, text: str, at_line_start: bool) -> Opening | None:
        """The first place. ``at_line_start``: only spaces come before the text, in its line."""
        start = text.find(self.opening)
        brace = _bare_brace(text, at_line_start) if self.bare else -1
        if brace >= 0 and (start < 0 or brace < start):
            return Opening(brace, brace + 1, brace, tagged=False)
        if start < 0:
            return None
        end = start + len(self.opening)
        return Opening(start, end, end, tagged=True)


HERMES = ToolFormat("hermes", _CALL, _CALL_END, "}", bare=False, key="arguments")
LLAMA3_JSON = ToolFormat("llama3_json", _TAG, "", ";", bare=True, key="parameters")
FORMATS = {form.name: form for form in (HERMES, LLAMA3_JSON)}


def _bare_brace(text: str, at_line_start: bool) -> int:
    found = re.search(r"^[^\S\n]*(\{)", text if at_line_start else f".{text}", re.MULTILINE)
    return -1 if found is None else found.start(1) - (not at_line_start)


def held_back(text: str, tags: Collection[str]) -> int:
    """How many characters at the end may begin one of the tags."""
    longest = 0
    for tag in tags:
        for size in range(min(len(tag) - 1, len(text)), longest, -1):
            if text.endswith(tag[:size]):
                longest = size
                break
    return longest


def format_of_template(template: str) -> ToolFormat | None:
    """The format that a chat template, by its words, asks for. None: none that is known here."""
    if any(mark in template for mark in _OTHERS):
        return None
    if _CALL in template and "arguments" in template:
        return HERMES
    if '"parameters":' in template and ("<|python_tag|>" in template or "<|start_header_id|>" in template):
        return LLAMA3_JSON
    return None
