"""Where an output ends, and what text may be given out before it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from engine_requests import PieceDetokenizer
from hypothesis import given
from hypothesis import strategies as st

from pearl.engine.output_processor import Accepted, OutputProcessor
from pearl.models import Tokenizer, bundled_path
from pearl.sampling_params import SamplingParams

END, OTHER_END = 9, 8


def processor(
    pieces: Sequence[str] = "0123456789",
    max_tokens: int = 100,
    tail: str = "",
    special: Mapping[int, str] | None = None,
    **params: Any,
) -> OutputProcessor:
    settings = SamplingParams(**{"max_tokens": 100, **params})
    return OutputProcessor(PieceDetokenizer(pieces, tail), settings, max_tokens, {END, OTHER_END}, special)


def accept(output: OutputProcessor, tokens: Sequence[int]) -> Accepted:
    return output.text(tokens, output.end(tokens))


def run(output: OutputProcessor, tokens: Sequence[int], sizes: Sequence[int] = ()) -> tuple[list[int], str, str | None]:
    """Feed ``tokens`` in verdicts of the given sizes (then one by one); returns kept tokens, text, finish reason."""
    kept: list[int] = []
    text, rest, splits = "", list(tokens), list(sizes)
    while rest:
        size = splits.pop(0) if splits else 1
        verdict, rest = rest[:size], rest[size:]
        accepted = accept(output, verdict)
        kept += verdict[: accepted.kept]
        text += accepted.text
        if accepted.finish_reason is not None:
            return kept, text, accepted.finish_reason
        assert accepted.kept == len(verdict)
    return kept, text, None


@pytest.mark.parametrize(
    ("verdict", "kept", "text"),
    [
        ((1, 2, END, 3, 4), 3, "12"),  # inside: what follows was committed but is never returned
        ((END, 1, 2), 1, ""),  # at its start
        ((1, 2, END), 3, "12"),  # at its end, as the correction or bonus token
        ((1, OTHER_END, END), 2, "1"),  # the first of several end tokens
    ],
)
def test_output_ends_at_the_first_end_token(verdict: tuple[int, ...], kept: int, text: str) -> None:
    accepted = accept(processor(), verdict)
    assert accepted == (kept, text, "stop")


def test_stop_token_ids_end_the_output_and_are_returned() -> None:
    assert accept(processor(stop_token_ids=[3]), (1, 3, 2)) == (2, "1", "stop")


def test_ignore_eos_still_honours_stop_token_ids() -> None:
    output = processor(stop_token_ids=[3], ignore_eos=True)
    assert accept(output, (END, 1)) == (2, "91", None)
    assert accept(output, (2, 3, 4)) == (2, "2", "stop")


def test_no_end_in_the_first_min_tokens() -> None:
    output = processor(min_tokens=2, stop="1")
    assert accept(output, (1, END)) == (2, "19", None)
    assert accept(output, (END, 2)) == (1, "", "stop")  # the third token may end it
    assert accept(processor(min_tokens=1), (END, END)) == (2, "9", "stop")


def test_min_tokens_are_counted_over_verdicts() -> None:
    output = processor(min_tokens=2)
    assert accept(output, (1,)) == (1, "1", None)
    assert accept(output, (END,)) == (1, "9", None)
    assert accept(output, (END, 2)) == (1, "", "stop")


@pytest.mark.parametrize("stop", [None, "2", "56"])
@pytest.mark.parametrize("min_tokens", [0, 4])
def test_text_may_be_made_verdicts_after_the_ends_were_found(stop: str | None, min_tokens: int) -> None:
    verdicts = [(1, 2), (3, END, 4), (5, 6, 7), (END, 8)]
    late, at_once = (processor(stop=stop, min_tokens=min_tokens) for _ in range(2))
    ends = []
    for verdict in verdicts:
        ends.append(late.end(verdict))
        if ends[-1][1] is not None:
            break
    for verdict, end in zip(verdicts, ends, strict=False):
        expected = accept(at_once, verdict)
        assert late.text(verdict, end) == expected
        if expected.finish_reason is not None:
            break


@pytest.mark.parametrize("others", [(), ("ofx",), ("x", " ofy", "fz")])
@pytest.mark.parametrize("sizes", [(), (3, 2, 5), (10,)])
def test_text_of_the_first_min_tokens_is_never_searched(others: Sequence[str], sizes: Sequence[int]) -> None:
    """Nor when it was held back as the begin of another stop string."""
    pieces = ("a", " of", "b")
    tokens = [0, 1, 2, 0, 1, 0, 0, 1, 2]
    output = processor(pieces, min_tokens=5, stop=[" of", *others])
    assert run(output, tokens, sizes) == (tokens[:8], "a ofba ofaa", "stop")


@pytest.mark.parametrize(
    ("min_tokens", "kept", "text"), [(1, 2, "x"), (2, 4, "xabc"), (3, 4, "xabc"), (4, 6, "xabcabc")]
)
def test_a_stop_string_counts_if_it_ends_after_min_tokens(min_tokens: int, kept: int, text: str) -> None:
    """As in vLLM: what it begins with may be of the first ones, whose text it then takes away."""
    tokens = [0, 1, 2, 1, 2, 1]
    output = processor(("xab", "c", "ab"), min_tokens=min_tokens, stop="abc")
    assert run(output, tokens) == (tokens[:kept], text, "stop")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_cut_at_max_tokens_inside_a_verdict(size: int) -> None:
    assert run(processor(max_tokens=3), (1, 2, 3, 4, 5), [size] * 5) == ([1, 2, 3], "123", "length")


def test_end_token_after_the_last_allowed_one_is_not_seen() -> None:
    assert accept(processor(max_tokens=2), (1, 2, END)) == (2, "12", "length")


def test_end_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert accept(processor(max_tokens=2), (1, END, 2)) == (2, "1", "stop")


def test_stop_string_as_the_last_allowed_token_is_a_stop() -> None:
    assert accept(processor(max_tokens=2, stop="2"), (1, 2, 3)) == (2, "1", "stop")


@pytest.mark.parametrize("sizes", [(), (2, 2), (4,)])
def test_stop_string_across_tokens_and_verdicts(sizes: Sequence[int]) -> None:
    assert run(processor(("x", "ab", "cd", "ef"), stop="bcde"), (0, 1, 2, 3), sizes) == ([0, 1, 2, 3], "xa", "stop")


def test_text_that_may_begin_a_stop_string_is_held_back_and_then_given_out() -> None:
    output = processor(("a", "b", "c"), stop="abb")
    assert accept(output, (0,)).text == ""
    assert accept(output, (1,)).text == ""
    assert accept(output, (2,)).text == "abc"


def test_overlapping_prefix_is_not_lost() -> None:
    """Find "aab" in "aaab": after "aaa" the last two characters may still begin the stop string."""
    assert run(processor(("a", "b"), stop="aab"), (0, 0, 0, 1)) == ([0, 0, 0, 1], "a", "stop")
    assert run(processor(("ab", "ac", "x"), stop="abac"), (0, 0, 1, 2)) == ([0, 0, 1], "ab", "stop")


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert accept(processor(("xcdabz",), stop=["ab", "cd"]), (0,)) == (1, "x", "stop")
    assert run(processor(("x", "c", "d", "a", "b"), stop=["ab", "cd"]), (0, 1, 2, 3, 4))[1] == "x"


def test_the_longest_possible_stop_prefix_is_held() -> None:
    output = processor(("xab", "c", "q"), stop=["bz", "abcd"])
    assert accept(output, (0,)).text == "x"
    assert accept(output, (1,)).text == ""
    assert accept(output, (2,)).text == "abcq"


@pytest.mark.parametrize("last", [END, 2])
def test_stop_string_in_the_flushed_remainder_is_cut(last: int) -> None:
    """Bytes that the detokenizer held until the end may complete a stop string."""
    output = processor(max_tokens=3, tail="b!", stop="2b" if last == 2 else "1b")
    assert run(output, (0, 1, last)) == ([0, 1, last], "01" if last == 2 else "0", "stop")


@pytest.mark.parametrize(("last", "reason"), [(END, "stop"), (2, "length")])
def test_flushed_remainder_and_held_text_are_given_out_at_the_end(last: int, reason: str) -> None:
    output = processor(max_tokens=3, tail="!", stop="12x")
    text = "01!" if last == END else "012!"
    assert run(output, (0, 1, last)) == ([0, 1, last], text, reason)


def cut(stops: Sequence[str], pieces: Sequence[str], min_tokens: int) -> str:
    """The specification: the text up to the first token after which it contains a stop string that counts, cut at the
    earliest."""
    exempt = len("".join(pieces[:min_tokens]))
    for count in range(min_tokens + 1, len(pieces) + 1):
        seen = "".join(pieces[:count])
        found = [at for stop in stops for at in range(len(seen)) if seen[at:].startswith(stop)
                 and at + len(stop) > exempt]  # fmt: skip
        if found:
            return seen[: min(found)]
    return "".join(pieces)


@given(
    pieces=st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=8),
    data=st.data(),
    stops=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 6),
)
def test_streamed_text_is_the_full_text_cut_at_the_stop(
    pieces: list[str], data: st.DataObject, stops: list[str], min_tokens: int
) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=20))
    sizes = data.draw(st.lists(st.integers(1, 5), max_size=20))
    output = processor(pieces, max_tokens=len(tokens), stop=stops, min_tokens=min_tokens)
    kept, text, _ = run(output, tokens, sizes)
    assert text == cut(stops, [pieces[token] for token in tokens], min_tokens)
    assert "".join(pieces[token] for token in kept).startswith(text)
    assert min_tokens > 0 or not any(stop in text for stop in stops)


SPECIAL = {7: "<|end|>", 6: "<|", 5: "<|start|>"}  # without text in the output


@pytest.mark.parametrize(
    ("stop", "tokens", "kept", "text"),
    [
        ("<|end|>", (1, 7, 2), 2, "1"),
        ("<|end|>", (5, 1, 6, 7), 4, "1"),  # others are left out as ever
        ("2<|end|>", (7, 2, 1, 2, 7, 1), 5, "21"),
        ("<|end|>1<|start|>", (7, 1, 2, 7, 1, 5), 6, "12"),
        (["x", "<|end|>", "12"], (7, 1, 2), 1, ""),
        (["<|end|>3", "12"], (1, 7, 7, 1, 2), 5, "1"),
    ],
)
@pytest.mark.parametrize("sizes", [(), (2, 3), (6,)])
def test_a_special_tokens_text_in_a_stop_string_is_the_token(
    stop: str | list[str], tokens: tuple[int, ...], kept: int, text: str, sizes: Sequence[int]
) -> None:
    pieces = ["0", "1", "2", "3", "4", "", "", "", "8", "9"]
    assert run(processor(pieces, stop=stop, special=SPECIAL), tokens, sizes) == (list(tokens[:kept]), text, "stop")


def test_it_is_its_text_as_well_and_not_before_min_tokens() -> None:
    pieces = ["<|e", "nd|>", "2", "3", "4", "", "", ""]
    assert run(processor(pieces, stop="<|end|>", special=SPECIAL), (2, 0, 1)) == ([2, 0, 1], "2", "stop")
    assert run(processor(pieces, stop="<|end|>", special=SPECIAL, min_tokens=2), (7, 2, 3, 7)) == (
        [7, 2, 3, 7], "23", "stop",
    )  # fmt: skip


def test_bytes_before_a_special_token_that_stops_are_given_out() -> None:
    output = OutputProcessor(Utf8Detokenizer(), SamplingParams(stop="<|end|>"), 9, (), {7: "<|end|>"})
    assert run(output, (0x61, 0xE8, 7, 0x61)) == ([0x61, 0xE8, 7], "a\ufffd", "stop")


def test_held_back_marks_of_special_tokens_are_never_given_out() -> None:
    output = processor(["0", "1", "", "", "", "", "", ""], stop="1<|end|>0", special=SPECIAL, max_tokens=4)
    assert run(output, (1, 7, 7, 1)) == ([1, 7, 7, 1], "11", "length")


class Utf8Detokenizer:
    """Tokens are bytes: a character appears with its last one."""

    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, tokens: Sequence[int]) -> str:
        return "".join(map(self._feed, tokens))

    def _feed(self, token: int) -> str:
        self._bytes += bytes([token])
        try:
            text, self._bytes = self._bytes.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


@given(st.text("aé€😀", min_size=1, max_size=12), st.lists(st.integers(1, 6), max_size=30), st.text("aé€", max_size=2))
def test_streamed_bytes_give_whole_characters(text: str, sizes: list[int], stop: str) -> None:
    tokens = text.encode()
    output = OutputProcessor(Utf8Detokenizer(), SamplingParams(stop=stop or None), len(tokens), ())
    assert run(output, tokens, sizes)[1] == (text.partition(stop)[0] if stop else text)


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.from_pretrained(str(bundled_path("target")))


@given(
    text=st.text("a b\né€😀def(", max_size=12),
    ids=st.lists(st.integers(0, 600), max_size=12),
    sizes=st.lists(st.integers(1, 6), max_size=30),
    stop=st.text("a b(é", max_size=2),
)
def test_streaming_with_the_real_tokenizer_gives_the_whole_text(
    bundled: Tokenizer, text: str, ids: list[int], sizes: list[int], stop: str
) -> None:
    """Also for ids that no encoder would put side by side: the pieces joined are the decoded text, cut at the stop."""
    prompt = bundled.encode("x = 1")
    tokens = [token for token in (*bundled.encode(text), *ids) if token not in bundled.eos_ids]
    output = OutputProcessor(
        bundled.detokenizer(prompt), SamplingParams(stop=stop or None), len(tokens), bundled.eos_ids
    )
    kept, streamed, _ = run(output, tokens, sizes)
    whole = bundled.decode([*prompt, *kept])[len(bundled.decode(prompt)) :]
    if stop and stop in whole:
        assert streamed == whole.partition(stop)[0]
        assert stop not in bundled.decode([*prompt, *kept[:-1]])[len(bundled.decode(prompt)) :].rstrip("\ufffd")
    else:
        assert streamed == whole
        assert kept == tokens
