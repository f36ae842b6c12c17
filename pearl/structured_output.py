"""What form an output must have: users' words for it, checked as far as that goes without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.user_values import as_flag, as_items, lone_surrogate, shown, unknown_names

_PARAM = "structured"
_LONGEST = 256 * 1024  # characters: more would keep a thread compiling for seconds


@dataclass(frozen=True)
class StructuredOutput:
    """Exactly one of these. InvalidRequestError says what cannot be used; whether it can be compiled is found at
    submission.

    json: a JSON schema, as an object or as JSON's text; its properties come in the schema's order.
    json_object: any JSON object.
    regex: the whole output matches it, in the syntax of Rust's ``regex``, without look-around and back-references.
    choice: the output is one of these texts.
    grammar: a context-free grammar in llguidance's dialect of Lark (it has a rule ``start``), or in GBNF (``root``).
    """

    json: str | bool | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        flag = as_flag(self.json_object)
        if flag is None:
            raise _refusal(f"json_object must be True or False; got {shown(self.json_object)}")
        self._set("json_object", flag)
        given = self._given()
        if len(given) != 1:
            names, found = ", ".join(f.name for f in fields(self)), ", ".join(given) or "none"
            raise _refusal(f"must have exactly one of {names}; got {found}")
        if self.json is not None:
            self._set("json", _schema_text(self.json))
        if self.choice is not None:
            self._set("choice", _checked_choice(self.choice))
        texts = [text for text in (self.regex, self.grammar) if text is not None]
        for text in texts:
            if not isinstance(text, str):
                raise _refusal(f"{given[0]} must be a text; got {shown(text)}")
        self._require_text([*texts, *(self.choice or ()), *([self.json] if isinstance(self.json, str) else ())])

    @staticmethod
    def _require_text(texts: Iterable[str]) -> None:
        size = 0
        for text in texts:
            if lone_surrogate(text) is not None:
                raise _refusal("has half a character (a lone surrogate)")
            size += len(text)
        if size > _LONGEST:
            raise _refusal(f"has {size} characters; at most {_LONGEST} are compiled")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not f.default]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> StructuredOutput:
        """Build from untrusted keys."""
        if sentence := unknown_names("names", values, [f.name for f in fields(cls)]):
            raise _refusal(f"has {sentence}")
        return cls(**values)


def _schema_text(schema: object) -> str:
    """JSON on one line. A text is read, so that what is compiled is JSON."""
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(read, (Mapping, bool)):
            raise _refusal(f"json must be a JSON schema, an object, or its text; got {shown(read)}")
        return json.dumps(read, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(f"json is no JSON schema: {error}") from error


def _checked_choice(choice: object) -> tuple[str, ...]:
    texts = [choice] if isinstance(choice, str) else as_items(choice)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _refusal(f"choice must be a list of texts, at least one; got {shown(choice if texts is None else texts)}")
    return tuple(texts)


def _refusal(words: str) -> InvalidRequestError:
    return InvalidRequestError(f"{_PARAM} {words}", _PARAM)
