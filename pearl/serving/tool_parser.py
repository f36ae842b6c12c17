"""Calls of tools in a text that comes in pieces. However it is cut, the pieces join to the same content and calls."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pearl.serving.json_pieces import JsonScanner, call_head, cannot_be_call, whole_call
from pearl.serving.tool_formats import Opening, ToolFormat, held_back

_MOST_SPACE = 64  # characters before a call that are the markup's and no content
_AT_ONCE = 256  # characters: what is read again after each call that is none stays short


class Content(NamedTuple):
    text: str


class CallBegins(NamedTuple):
    name: str


class CallArguments(NamedTuple):
    """A piece of the JSON of the latest call."""

    text: str


Event = Content | CallBegins | CallArguments


class ToolCallParser:
    """A call has begun when its name and the first key of its arguments are there; then the arguments come as they are
    written. What breaks off before is content, as it is written.

    Spaces before a call, and at the end behind the last one, are not content. A call without a tag must be of one of
    the tools ``names``: else it is an answer in JSON.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], forced: bool = False) -> None:
        """``forced``: the text is a call from its first character on, without a tag."""
        self._form, self._names = form, frozenset(names)
        self._text = ""  # not yet understood; begins with ``opening``'s call while there is one
        self._events: list[Event] = []
        self._line_start, self._after_call = True, False
        self._opening = Opening(0, 0, 0, tagged=True) if forced else None
        self._scanner, self._scanned = JsonScanner(), 0
        self._step = self._read_call if forced else self._read_content
        self.is_open = False  # whether a call has begun whose arguments have not ended

    def feed(self, text: str) -> list[Event]:
        for start in range(0, len(text), _AT_ONCE):
            self._text += text[start : start + _AT_ONCE]
            while self._step():
                pass
        return self._taken_events()

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text. Not to be fed again."""
        only_spaces = self._after_call and self._text.isspace()
        if self._step == self._read_call or (self._step == self._read_content and not only_spaces):
            self._say(self._text)
        self._text = ""
        return self._taken_events()

    def _taken_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _say(self, text: str) -> None:
        if not text:
            return
        self._events.append(Content(text))
        _, newline, line = text.rpartition("\n")
        self._line_start = (bool(newline) or self._line_start) and not line.strip()
        self._after_call = self._after_call and text.isspace()

    # Each step reads what it can and returns whether the next one can go on.

    def _read_content(self) -> bool:
        text, found = self._text, self._form.find(self._text, self._line_start)
        end = len(text) - held_back(text, [self._form.opening]) if found is None else found.start
        kept = len(text[max(0, end - _MOST_SPACE) : end].rstrip())
        spoken = max(0, end - _MOST_SPACE) + kept
        self._say(text[:spoken])
        self._text = text[spoken:]
        if found is None:
            return False
        start, keep, call, tagged = found
        self._opening = Opening(start - spoken, keep - spoken, call - spoken, tagged)
        self._scanner, self._scanned = JsonScanner(), call - spoken
        self._step = self._read_call
        return True

    def _read_call(self) -> bool:
        """Before it is sure that there is one."""
        assert self._opening is not None
        _, keep, call, tagged = self._opening
        if cannot_be_call(self._text, call):
            return self._give_up(keep)
        if (head := call_head(self._text, call)) is not None:
            name, begin = head
            if not self._knows(name, tagged):
                return self._give_up(keep)
            self._begin(name)
            self._text, self._scanner = self._text[begin:], JsonScanner()
            self.is_open, self._step = True, self._read_arguments
            return True
        _, end = self._scanner.feed(self._text, self._scanned)
        self._scanned = len(self._text)
        if end is None:
            return False
        found = whole_call(self._text, call, end)
        if found is None or not self._knows(found.name, tagged):
            return self._give_up(end)
        self._begin(found.name)
        self._events.append(CallArguments(found.arguments))
        self._text, self._step = self._text[end:], self._read_after
        return True

    def _knows(self, name: str, tagged: bool) -> bool:
        return tagged or name in self._names

    def _begin(self, name: str) -> None:
        self._events.append(CallBegins(name))
        self._line_start = self._after_call = True

    def _give_up(self, keep: int) -> bool:
        self._say(self._text[:keep])
        self._text, self._step = self._text[keep:], self._read_content
        return True

    def _read_arguments(self) -> bool:
        written, end = self._scanner.feed(self._text)
        if written:
            self._events.append(CallArguments(written))
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self.is_open, self._step = False, self._read_members
        return end is not None

    def _read_members(self) -> bool:
        """Behind the arguments: other members of the object, which say nothing, and its end."""
        rest = self._past_space()
        if rest == "":
            return False
        self._step = self._read_after
        if rest is not None and rest[0] == ",":
            self._text, self._scanner, self._step = rest, JsonScanner(depth=1), self._skip_members
        elif rest is not None and rest[0] == "}":
            self._text = rest[1:]
        return True

    def _skip_members(self) -> bool:
        _, end = self._scanner.feed(self._text)
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._step = self._read_after
        return end is not None

    def _read_after(self) -> bool:
        """Behind the object: the closing tag, and what separates calls."""
        closing, rest = self._form.closing, self._past_space()
        while rest and rest[0] in self._form.separators:
            self._text = rest[1:]
            rest = self._past_space()
        if rest == "" or (rest is not None and closing.startswith(rest) and rest != closing):
            return False
        if rest and closing and rest.startswith(closing):
            self._text = rest[len(closing) :]
        self._step = self._read_content
        return True

    def _past_space(self) -> str | None:
        """None: there is more than the markup has."""
        rest = self._text.lstrip()
        return rest if len(self._text) - len(rest) <= _MOST_SPACE else None
