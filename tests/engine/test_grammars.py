"""Grammars over tokens: which may follow a text, whatever was consumed and taken back before, and for any tokenizer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from transformers import PreTrainedTokenizerFast

from pearl.engine.grammar_masks import GrammarMasks, MaskedRow
from pearl.errors import InvalidRequestError
from pearl.grammars import Grammar, Matcher
from pearl.grammars.compiler import GrammarCompiler
from pearl.grammars.grammar import has
from pearl.messages import SequenceState
from pearl.models import Tokenizer, bundled_path
from pearl.sampling_params import SamplingParams
from pearl.structured_output import StructuredOutput


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.from_pretrained(str(bundled_path("target")))


@pytest.fixture(scope="module")
def compiler(bundled: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(bundled, bundled.vocab_size)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: bytes as a fallback, a space in front of words; two ids of one text, and a special token whose name
    is one."""
    words = ["▁", "a", "b", "▁ab", "ab", "é", "▁a"]
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    vocabulary |= {word: 258 + i for i, word in enumerate(words)}
    backend = Backend(backends.BPE(vocabulary, [("▁", "a"), ("a", "b"), ("▁", "ab")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("bab", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), frozenset({1}))


def allowed(mask: Any, vocab_size: int) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[: vocab_size + 1]).tolist())


def texts_of(tokenizer: Tokenizer) -> list[bytes]:
    special = tokenizer.special_texts
    return [b"" if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]


@pytest.mark.parametrize("make", [sentencepiece, lambda: Tokenizer.from_pretrained(str(bundled_path("target")))])
def test_masks_are_those_of_trying_every_token(make: Callable[[], Tokenizer]) -> None:
    tokenizer, choices = make(), (" ab a", "ab", "abé€", "babb", 'a "x\\\n/', "😀")
    texts, end = texts_of(tokenizer), tokenizer.vocab_size
    grammar = GrammarCompiler(tokenizer, end).compile(StructuredOutput(choice=choices))
    rng, matcher, reached = random.Random(1), grammar.matcher(), set[bytes]()
    for _ in range(80):
        output: list[int] = []
        while True:
            text = b"".join(texts[i] for i in output)
            reached.add(text)
            mask = matcher.mask(output)
            assert mask is not None
            whole = [choice.encode() for choice in choices]
            right = {i for i in range(end) if texts[i] and any(c.startswith(text + texts[i]) for c in whole)}
            right |= {end} if text in whole else set()
            assert allowed(mask, end) == right
            ways = sorted(right - {end}, key=lambda token: (len(texts[token]), token))
            if not ways:
                break
            output.append(rng.choice(ways))
    assert {choice.encode() for choice in choices} <= reached


def test_a_mask_depends_on_the_output_alone(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    """Whatever was looked at before: longer and shorter outputs, others, and such as are none of the grammar's."""
    grammar = compiler.compile(StructuredOutput(json={"type": "object", "properties": {"a": {"type": "integer"}}}))
    whole = bundled.encode('{"a": 12, "b": [true, "x"]}')
    rng, used = random.Random(0), grammar.matcher()
    for _ in range(60):
        output = whole[: rng.randrange(len(whole) + 1)]
        if rng.random() < 0.3:
            output = [*output[:-1], rng.randrange(bundled.vocab_size), *whole[:2]]
        found, fresh = used.mask(output), grammar.matcher().mask(output)
        assert (found is None) == (fresh is None)
        assert found is None or np.array_equal(found, fresh)
    assert used.mask([*whole, *bundled.eos_ids]) is None
    assert used.mask([*whole, whole[0]]) is None


def test_choices_are_as_many_as_you_like(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    """The library has a limit for ways to go on at one place."""
    matcher, end = compiler.compile(StructuredOutput(choice=[f"no. {i}" for i in range(2000)])).matcher(), []
    for ids in (bundled.encode("no. 1"), bundled.encode("no. 1999"), bundled.encode("no. 2000")):
        masks = [matcher.mask(ids[:size]) for size in range(len(ids) + 1)]
        assert matcher.failure is None
        end.append(masks[-1] is not None and has(masks[-1], bundled.vocab_size))
    assert end == [True, True, False]


@pytest.mark.parametrize("text", ["\x7f", 'a"\\\n\x00', "\N{SNOWMAN}\N{GRINNING FACE}\x85\u2028"])
def test_any_character_may_be_chosen(compiler: GrammarCompiler, bundled: Tokenizer, text: str) -> None:
    for form in (StructuredOutput(choice=[text, "b"]), StructuredOutput(json={"const": text})):
        written = text if form.choice else json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
        mask = compiler.compile(form).matcher().mask(bundled.encode(written))
        assert mask is not None
        assert has(mask, bundled.vocab_size)


class Contradicting:
    """Of the library's interface as much as is used: it allows what it then refuses."""

    def deep_copy(self) -> Contradicting:
        return self

    def is_error(self) -> bool:
        return False

    def try_consume_tokens(self, tokens: list[int]) -> int:
        return 0

    def compute_bitmask(self) -> bytes:
        return b"\xff" * 8


def test_what_is_refused_against_its_mask_is_no_end() -> None:
    """Behind an end anything goes: an output that is not at its end must not get there."""
    matcher = Grammar(Contradicting(), 40).matcher()
    mask = matcher.mask([3])
    assert mask is not None
    assert not mask.any()
    assert "refused" in str(matcher.failure)


def state_of(grammar: Grammar, request_id: int = 1, lane: int = 0, **params: Any) -> SequenceState:
    return SequenceState(request_id, lane, SamplingParams(**params), 0, 0, (), grammar)


def test_an_output_ends_only_where_its_grammar_may(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    """Also with stop_token_ids: of those that are text, too."""
    size, (eos,) = bundled.vocab_size, bundled.eos_ids
    grammar = compiler.compile(StructuredOutput(regex="aa|aaba"))
    a, b = bundled.encode("a")[0], bundled.encode("b")[0]
    masks = GrammarMasks(size, {eos})

    def left(output: list[int], **params: Any) -> set[int]:
        rows = torch.zeros(2, size + 3)
        masks.apply(rows, [MaskedRow(1, state_of(grammar, **params), output)])
        assert not rows[0].any()
        assert not rows[1, size:].any()
        return set((rows[1, :size] == 0).nonzero().flatten().tolist())

    assert eos not in left([a])
    assert eos in left([a, a])
    assert b in left([a, a])
    assert left([a, a], ignore_eos=True, stop_token_ids=[b, 9]) >= {b, 9}
    assert not {eos, b, 9} & left([a], ignore_eos=True, stop_token_ids=[b, 9])
    assert left([a, a, b, a]) == {eos}
    assert left([a, a, eos, 5]) == set(range(size))


def test_a_lane_that_changes_hands(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    size = bundled.vocab_size
    masks = GrammarMasks(size, bundled.eos_ids)
    for request_id, choice in enumerate(("first", "second", "third")):
        grammar = compiler.compile(StructuredOutput(choice=choice))
        rows = torch.zeros(1, size)
        masks.apply(rows, [MaskedRow(0, state_of(grammar, request_id), [])])
        left = (rows[0] == 0).nonzero().flatten().tolist()
        assert left
        assert all(choice.encode().startswith(bundled.token_bytes(i)) for i in left)


def test_what_one_request_exhausts_is_not_anothers(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    """Matchers of one grammar share what they find out, and a limit of the library's that they come to."""
    form = StructuredOutput(regex="((a{1,1000}){1,1000}){1,1000}")
    first, (a,) = compiler.compile(form), bundled.encode("a")
    used, next_one = first.matcher(), first.matcher()
    lengths = [n for n in range(100) if used.mask([a] * n) is not None and not used.failure]
    assert 2 < len(lengths) < 60
    exhausted = next_one.mask([])
    assert exhausted is not None
    assert not exhausted.any()
    assert "too many" in str(next_one.failure)
    other = compiler.compile(form).matcher().mask([])
    assert other is not None
    assert other.any()


def test_threads_may_compile_and_match_at_the_same_time(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    grammar = compiler.compile(StructuredOutput(json_object=True))
    ids = bundled.encode('{"k": [1, {"x": null}], "long name": "text"}')

    def follow(number: int) -> list[bytes]:
        assert isinstance(compiler.compile(StructuredOutput(regex=f"x{number}")).matcher(), Matcher)
        matcher = grammar.matcher()
        masks = [matcher.mask(ids[:i]) for i in range(len(ids) + 1)]
        return [mask.tobytes() for mask in masks if mask is not None]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(follow, range(12)))
    assert len(found[0]) == len(ids) + 1
    assert found == [found[0]] * 12


def test_json_has_bounded_whitespace(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    value = {"a": [1, {"b": None}], "c": "d"}

    def fits(schema: Any, text: str) -> bool:
        return compiler.compile(StructuredOutput(json=schema)).matcher().mask(bundled.encode(text)) is not None

    for schema in ({"type": "object"}, True, {}):
        assert fits(schema, json.dumps(value))
        assert fits(schema, json.dumps(value, indent=8))
        assert fits(schema, json.dumps(value, separators=(",", ":")))
        assert not fits(schema, "{\n\n")
        assert not fits(schema, " {}")
    assert fits({"type": "object", "x-guidance": {"whitespace_pattern": "\\n+"}}, "{\n\n\n")


# Of 20 pairs of alternatives there are 2 ** 20 combinations.
PAIRS = [{"anyOf": [{"properties": {f"p{i}": {"type": t}}} for t in ("integer", "string")]} for i in range(20)]


@pytest.mark.parametrize(
    ("structured", "says"),
    [
        (StructuredOutput(json={"allOf": PAIRS}), "too large"),
        (StructuredOutput(json='{"items":' * 900 + "{}" + "}" * 900), "recursion limit"),
        (StructuredOutput(regex="(" * 5000 + ")" * 5000), "nest"),
        (StructuredOutput(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
    ],
    ids=("products", "deep schema", "deep expression", "deep grammar"),
)
def test_what_is_too_complex_is_refused(compiler: GrammarCompiler, structured: StructuredOutput, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        compiler.compile(structured)


def test_what_turns_out_to_be_too_complex_fails_there(compiler: GrammarCompiler, bundled: Tokenizer) -> None:
    """Each further letter can be put together in more ways."""
    matcher, (a,) = (
        compiler.compile(StructuredOutput(grammar='start: start start | "a"')).matcher(),
        bundled.encode("a"),
    )
    for length in range(0, 1000, 100):
        mask = matcher.mask([a] * length)
        assert mask is not None
        if matcher.failure:
            break
    assert 100 < length < 900
    assert "600" in str(matcher.failure)
    assert not mask.any()
    beginning = matcher.mask([])  # what fails is the text so far
    assert beginning is not None
    assert beginning.any()
    assert matcher.failure is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "grammar": "b"}, "exactly one"),
        ({"json_object": False}, "exactly one"),
        ({"json_object": 1}, "True or False"),
        ({"json": "{"}, "no JSON schema"),
        ({"json": "[1]"}, "an object"),
        ({"json": {"a": float("nan")}}, "no JSON schema"),
        ({"json": {"a": {1, 2}}}, "no JSON schema"),
        ({"regex": 5}, "must be a text"),
        ({"grammar": "a\ud800"}, "half a character"),
        ({"choice": []}, "at least one"),
        ({"choice": ["a", 1]}, "list of texts"),
        ({"choice": ["a" * 1000] * 300}, "300000 characters"),
        ({"jsn": {}}, "did you mean 'json'"),
    ],
    ids=str,
)
def test_forms_that_cannot_be_used(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(says)) as caught:
        SamplingParams(structured=values)
    assert caught.value.param == "structured"


def test_forms_are_values() -> None:
    one, other = (StructuredOutput(json=schema) for schema in ({"a": 1, "b": [2]}, '{"a": 1,  "b": [2]}'))
    assert one == other
    assert hash(one) == hash(other)
    assert one != StructuredOutput(json={"b": [2], "a": 1})  # properties come in another order
    assert StructuredOutput(choice=iter(["a"])) == StructuredOutput(choice="a")
    assert SamplingParams(structured={"regex": ""}).structured == StructuredOutput(regex="")
    with pytest.raises(InvalidRequestError, match="StructuredOutput"):
        SamplingParams(structured="json")  # type: ignore[arg-type]
