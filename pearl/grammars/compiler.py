"""From what a user asks for to a grammar over the model's tokens."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.grammars.grammar import Grammar, one_line
from pearl.models import Tokenizer
from pearl.structured_output import StructuredOutput

_PARAM = "structured"
# Else a text that the grammar leaves no choice about could be spelled in one way only, the tokenizer's.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# What one request may cost the others, whose round waits for its masks; the library's own limits hold for the rest.
_LIMITS = {"max_items_in_row": 600, "step_max_items": 10_000, "max_lexer_states": 50_000, "verbose_errors": False}
# Between the parts of JSON. Without a bound a model may write line breaks for ever.
_WHITESPACE = r" |\r?\n[ \t]{0,64}"
_NAMES = {
    "json": "the JSON schema",
    "json_object": "json_object",
    "regex": "the regular expression",
    "choice": "the choice",
    "grammar": "the grammar",
}


class GrammarCompiler:
    """Of one model's tokens. Any thread may use it, several at a time; what takes long lets others run Python."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size``: ids that the model may draw."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._known: Any = None  # the tokens as llguidance's LLTokenizer

    def compile(self, structured: StructuredOutput) -> Grammar:
        """A new one each time: its matchers share what they have found out, and limits that they come to, so that it
        should be one request's. InvalidRequestError: it cannot be compiled, nothing matches it, or llguidance is not
        installed.
        """
        library = _llguidance()
        tokens = self._tokens(library)
        name = _NAMES[structured.kind]
        try:
            text = _OPTIONS + _lark(library, structured)
        except ValueError as error:
            raise InvalidRequestError(f"{name} cannot be used: {one_line(str(error))}", _PARAM) from error
        start = library.LLMatcher(tokens, text, log_level=0, limits=library.LLParserLimits(**_LIMITS))
        if start.is_error():
            raise InvalidRequestError(f"{name} cannot be used: {_said(start)}", _PARAM)
        first = start.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise InvalidRequestError(f"{name} cannot be used: {_said(first)}", _PARAM)
        return Grammar(start, self._vocab_size)

    def _tokens(self, library: Any) -> Any:
        """Made when they are first asked for, which takes half a second for 128k."""
        with self._lock:
            if self._known is None:
                self._known = self._make_tokens(library)
            return self._known

    def _make_tokens(self, library: Any) -> Any:
        """Each id with its bytes. Special tokens and ids without a meaning have none, so that no text contains them."""
        tokenizer = self._tokenizer
        known = tokenizer.vocabulary.tokens.keys() - tokenizer.special_texts.keys()
        words = [tokenizer.token_bytes(token) if token in known else b"" for token in range(self._vocab_size)]

        class Words:
            eos_token_id = self._vocab_size
            bos_token_id = None
            tokens = (*words, b"<end>")
            special_token_ids = (self._vocab_size,)

            def __call__(self, text: str | bytes) -> list[int]:
                return tokenizer.encode(text.decode() if isinstance(text, bytes) else text, add_special_tokens=False)

        return library.LLTokenizer(library.TokenizerWrapper(Words()), n_vocab=self._vocab_size + 1)


def _lark(library: Any, structured: StructuredOutput) -> str:
    """ValueError: a GBNF grammar that is none."""
    if structured.json is not None or structured.json_object:
        return f"start: %json {_schema(structured)}"
    if structured.regex is not None:
        return f"start: /(?:{library.regex_to_lark(structured.regex, '')})/"
    if structured.choice is not None:
        texts = " | ".join(_quoted(text) for text in structured.choice)
        return f"start: CHOICE\nCHOICE: {texts}"  # a terminal: one expression, however many there are
    assert structured.grammar is not None
    if "%llguidance" in structured.grammar:
        raise ValueError("%llguidance, the library's options, are not a request's to set")
    return str(library.grammar_from("grammar", structured.grammar)).removeprefix("%llguidance {}")


def _schema(structured: StructuredOutput) -> str:
    if structured.json_object:
        schema: Any = {"type": "object"}
    else:
        assert isinstance(structured.json, str)
        schema = json.loads(structured.json)
    if schema is False:
        return "false"
    options = {} if schema is True else dict(schema)
    own = options.get("x-guidance", {})
    if isinstance(own, dict):
        options["x-guidance"] = {"whitespace_pattern": _WHITESPACE, **own}
    return _quoted(options)


def _quoted(value: Any) -> str:
    """JSON as the library reads it in a grammar: without a character that JSON allows and it does not."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _said(matcher: Any) -> str:
    """Places are in a text that begins with a line of ours."""
    error = one_line(matcher.get_error())
    return "no text matches it" if error.startswith("NoExtension") else re.sub(r"^at \d+\(\d+\): ", "", error)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        sentence = "structured output needs llguidance, which is not installed: pip install 'pearl-engine[structured]'"
        raise InvalidRequestError(sentence, _PARAM) from error
    return llguidance
