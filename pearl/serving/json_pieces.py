"""JSON objects of which only a beginning is there: where they end, and what a call of a tool in JSON says."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from pearl.user_values import lone_surrogate

_OUTSIDE = re.compile(r'[{}\[\]"]')
_INSIDE = re.compile(r'["\\\x00-\x1f]')  # models write control characters as they are, JSON wants them escaped
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder(strict=False)
_KEYS = ("name", "type", "id", "arguments", "parameters")  # what a call may begin with
_MOST_SPACE = 64
_HEAD = re.compile(
    r'~\{~(?:"type"~:~"function"~,~)?"name"~:~(STRING)~,~"(?:arguments|parameters)"~:~(?=\{~(?:STRING~:|\}))'.replace(
        "STRING", r'"(?:[^"\\]|\\.){0,256}"'
    ).replace("~", r"\s{0,64}"),
    re.DOTALL,
)


class JsonScanner:
    """Finds the end of an object or array, in pieces. Brackets are counted, not matched.

    ``depth``: brackets that are open already.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def feed(self, text: str, start: int = 0) -> tuple[str, int | None]:
        """The next piece, from ``start``. Returns it up to the end of the object, with control characters in strings
        escaped; and where in ``text`` that end is, None if it is still to come. Not again after an end.
        """
        parts, at, position = list[str](), start, start
        while True:
            if self._escaped and position < len(text):
                self._escaped, position = False, position + 1
            found = None if self._escaped else (_INSIDE if self._in_string else _OUTSIDE).search(text, position)
            if found is None:
                return "".join((*parts, text[at:])), None
            character, position = found[0], found.end()
            if character == '"':
                self._in_string = not self._in_string
            elif character == "\\":
                self._escaped = True
            elif self._in_string:
                parts += text[at : found.start()], json.dumps(character)[1:-1]
                at = position
            else:
                self._depth += 1 if character in "{[" else -1
                if self._depth <= 0:
                    return "".join((*parts, text[at:position])), position


class CallText(NamedTuple):
    """A call as it is written: the arguments are JSON."""

    name: str
    arguments: str


def cannot_be_call(text: str, start: int) -> bool:
    """Whether what begins at ``start`` is certainly no call, by its first key: however it goes on."""
    if (at := _past_space(text, start)) is None or at == len(text):
        return at is None
    if text[at] != "{":
        return True
    if (at := _past_space(text, at + 1)) is None or at == len(text):
        return at is None
    longest = max(map(len, _KEYS)) + 2
    key, closed, _ = text[at + 1 : at + longest].partition('"')
    if text[at] != '"':
        return True
    return key not in _KEYS if closed else not any(name.startswith(key) for name in _KEYS)


def _past_space(text: str, start: int) -> int | None:
    """None: there is more than a call has."""
    found = _SPACE.match(text, start, start + _MOST_SPACE + 1)
    end = start if found is None else found.end()
    return None if end - start > _MOST_SPACE else end


def call_head(text: str, start: int) -> tuple[str, int] | None:
    """The name of a call whose arguments have begun, with a first key or as {}; and where they begin."""
    found = _HEAD.match(text, start)
    if found is None:
        return None
    name = _read_name(found[1])
    return None if name is None else (name, found.end())


def whole_call(text: str, start: int, end: int) -> CallText | None:
    """Of a complete object, whatever the order of its keys; None if it is no call, or no JSON.

    Arguments may be left out, null, or a text that holds them.
    """
    try:
        members = _members(text[start:end])
    except (ValueError, RecursionError):
        return None
    name, _ = members.get("name", (None, ""))
    if not isinstance(name, str) or not _is_name(name):
        return None
    value, written = members.get("arguments") or members.get("parameters") or ({}, "{}")
    if value is None:
        value, written = {}, "{}"
    if isinstance(value, str):
        try:
            value, written = json.loads(value), value
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, dict) or lone_surrogate(written) is not None:
        return None
    return CallText(name, JsonScanner().feed(written)[0])


def _members(text: str) -> dict[str, tuple[object, str]]:
    """Of an object: its values, and how they are written. ValueError."""
    members = {}
    at = _skip(text, _skip(text, 0) + 1)
    while text[at : at + 1] == '"':
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise ValueError("no colon behind a key")
        begin = _skip(text, at + 1)
        value, end = _DECODER.raw_decode(text, begin)
        members[key] = value, text[begin:end]
        at = _skip(text, end)
        if text[at : at + 1] != ",":
            break
        at = _skip(text, at + 1)
    if text[at : at + 1] != "}":
        raise ValueError("no end of the object")
    return members


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _read_name(written: str) -> str | None:
    try:
        name = json.loads(written, strict=False)
    except ValueError:
        return None
    return name if _is_name(name) else None


def _is_name(name: str) -> bool:
    return bool(name) and lone_surrogate(name) is None
