"""What an output adds to the text of prompt and output, piece by piece, for every kind of decoder."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers
from tokenizers import models as backends
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pearl.models import Tokenizer, bundled_path

SPECIAL = ["<unk>", "<s>", "</s>"]
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
LEVEL = [bytes_to_unicode()[byte] for byte in range(256)]  # as GPT-2 writes them
BOS = 1


def wrapped(backend: Backend, decoder: decoders.Decoder) -> Tokenizer:
    backend.decoder = decoder
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())


def byte_fallback(*last: decoders.Decoder) -> Tokenizer:
    """Llama 2's form: what has no token of its own is a run of byte tokens. Gemma's has no last step."""
    tokens = [*SPECIAL, *FALLBACK, "▁", "▁a", "a", "b", "▁b", "\ufffd", "é", "▁é"]
    ids = {token: i for i, token in enumerate(tokens)}
    backend = Backend(backends.BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    return wrapped(backend, decoders.Sequence(steps))


def byte_level() -> Tokenizer:
    """A token for each byte, one for U+FFFD, one for a character with the begin of another."""
    several = ["".join(LEVEL[byte] for byte in data) for data in ("\ufffd".encode(), "語".encode() + b"\xe8")]
    ids = {token: i for i, token in enumerate([*SPECIAL, *LEVEL, *several])}
    return wrapped(Backend(backends.BPE(ids, [])), decoders.ByteLevel())


def words() -> Tokenizer:
    """A space between words comes from the decoder."""
    ids = {token: i for i, token in enumerate([*SPECIAL, "▁a", "▁bc", "d", "\ufffd"])}
    return wrapped(Backend(backends.WordLevel(ids, unk_token="d")), decoders.Metaspace())


TOKENIZERS = {
    "llama-2": byte_fallback(decoders.Strip(" ", 1, 0)),
    "gemma": byte_fallback(),
    "byte-level": byte_level(),
    "words": words(),
    "bundled": Tokenizer.from_pretrained(str(bundled_path("target"))),
}
of_bytes = pytest.mark.parametrize("name", ["llama-2", "gemma", "byte-level"])


def byte_ids(name: str, data: bytes) -> list[int]:
    return [len(SPECIAL) + byte for byte in data] if name != "byte-level" else ids(name, *(LEVEL[b] for b in data))


def ids(name: str, *tokens: str) -> list[int]:
    vocabulary = TOKENIZERS[name]._tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def pieces(name: str, prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    detokenizer = TOKENIZERS[name].detokenizer(prompt)
    return [*(detokenizer.feed((token,)) for token in output), detokenizer.flush()]


@pytest.mark.parametrize("name", ["llama-2", "gemma", "byte-level", "bundled"])
@settings(max_examples=50, deadline=None)
@given(
    text=st.text("ab é語😀\ufffd\n", max_size=10) | st.text(max_size=6),
    split=st.integers(0, 20),
    special=st.lists(st.integers(0, 20), max_size=3),
)
def test_pieces_join_to_what_the_output_adds(name: str, text: str, split: int, special: list[int]) -> None:
    """Wherever the prompt ends, and with special tokens anywhere, even inside a character."""
    decode = TOKENIZERS[name].decode
    if name == "byte-level":
        tokens = byte_ids(name, text.encode())
        before = len(text.encode()[:split].decode(errors="ignore"))
    else:
        text = text.replace("\ufffd", "" if name == "bundled" else "\ufffd")  # no mistake for half a character
        tokens = TOKENIZERS[name].encode(text)
        starts = [decode(tokens[:end]) for end in range(min(split, len(tokens)) + 1)]
        before = max(len(start) for start in starts if decode(tokens).startswith(start))
    for at in special:
        tokens.insert(at, 0 if name == "bundled" else BOS)
        split += at < split
    assert "".join(pieces(name, tokens[:split], tokens[split:])) == decode(tokens)[before:]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bytes_that_are_no_text_are_replaced_as_in_decoding(data: st.DataObject) -> None:
    several = byte_ids("byte-level", b"a \xe8\xaa\x9e\xf0\x9f\x98\x80\xff\xed")
    tokens = data.draw(st.lists(st.sampled_from(several) | st.integers(0, 260), max_size=16))
    split = data.draw(st.integers(0, len(tokens)))
    before, whole = (TOKENIZERS["byte-level"].decode(ids) for ids in (tokens[:split], tokens))
    if not whole.startswith(before):  # a last character that was not complete
        assert before.endswith("\ufffd")
        before = before[:-1]
    assert "".join(pieces("byte-level", tokens[:split], tokens[split:])) == whole[len(before) :]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_may_be_fed_several_at_once(name: str, data: st.DataObject) -> None:
    """Each verdict's text is the same as token by token, after every prompt, whatever its bytes."""
    several = (
        [0, 1, *byte_ids(name, b"a \xe8\xaa\x9e\xc3\xa9\xff")] if name in ("llama-2", "gemma", "byte-level") else [0, 1]
    )
    known = st.sampled_from(several) | st.integers(0, len(TOKENIZERS[name]._tokenizer) - 1)
    prompt = data.draw(st.lists(known, max_size=4))
    one_by_one, at_once = (TOKENIZERS[name].detokenizer(prompt) for _ in range(2))
    for verdict in data.draw(st.lists(st.lists(known, max_size=5), max_size=6)):
        assert at_once.feed(verdict) == "".join(one_by_one.feed((token,)) for token in verdict)
    assert at_once.flush() == one_by_one.flush()


@pytest.mark.parametrize("name", ["llama-2", "gemma"])
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xe8\xaa\x9e\xff", "語\ufffd"),  # decode: four times U+FFFD, but 語 is already out
        (b"\xff\xe8\xaa\x9e", "\ufffd語"),
        (b"\xe8\xaaa", "\ufffd\ufffda"),
        (b"\xe8\xaa\xe8\xaa\x9e", "\ufffd\ufffd語"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\xe8\xaa", "\ufffd\ufffd"),
    ],
)
def test_an_invalid_byte_costs_no_other_character(name: str, data: bytes, text: str) -> None:
    assert "".join(pieces(name, [BOS], byte_ids(name, data))) == text
    assert "".join(pieces(name, ids(name, "a"), [*byte_ids(name, data), *ids(name, "▁b")])) == text + " b"


@of_bytes
@pytest.mark.parametrize("count", [1, 2, 3, 8, 20])
def test_a_prompt_that_ends_in_bytes_streams_on(name: str, count: int) -> None:
    prompt = byte_ids(name, ("x" + "語" * count).encode())
    output = byte_ids(name, "語é!".encode())
    assert pieces(name, prompt, output) == ["", "", "語", "", "é", "!", ""]


@of_bytes
@pytest.mark.parametrize("inside", [1, 2])
def test_a_prompt_that_ends_inside_a_character(name: str, inside: int) -> None:
    """What completes it is the output's; what does not was the prompt's own U+FFFD."""
    data = "x語語".encode()
    prompt = byte_ids(name, data[: -3 + inside])
    assert "".join(pieces(name, prompt, byte_ids(name, data[-3 + inside :]))) == "語"
    a = ids(name, "a")
    assert "".join(pieces(name, prompt, a)) == "a" == TOKENIZERS[name].decode([*prompt, *a])[-1]
    assert pieces(name, prompt, []) == [""]


@of_bytes
def test_what_completes_the_prompts_character_is_not_taken_for_its_replacement(name: str) -> None:
    """Nor is the next byte that is no character, which comes in the same verdict."""
    detokenizer = TOKENIZERS[name].detokenizer(byte_ids(name, b"x\xc3"))
    assert detokenizer.feed(byte_ids(name, b"\xa9\xff")) == "é\ufffd"


def test_a_character_is_given_out_though_its_token_begins_another() -> None:
    (both,) = ids("byte-level", "".join(LEVEL[byte] for byte in "語".encode() + b"\xe8"))
    assert pieces("byte-level", [], [both, *byte_ids("byte-level", b"\xaa\x9e")]) == ["語", "", "語", ""]


def test_a_token_that_is_a_replacement_character_holds_nothing_back() -> None:
    (level,) = ids("byte-level", "".join(LEVEL[byte] for byte in "\ufffd".encode()))
    assert pieces("byte-level", [], [level] * 3) == ["\ufffd"] * 3 + [""]
    assert pieces("llama-2", [BOS], ids("llama-2", "\ufffd") * 3) == ["\ufffd"] * 3 + [""]
    words = pieces("words", [BOS], ids("words", "\ufffd") * 50)
    assert "".join(words) == "\ufffd" * 50
    assert max(map(len, words)) <= 4  # its bytes are not known: it waits, but not for ever


@pytest.mark.parametrize("name", ["llama-2", "words"])
def test_only_the_first_word_of_all_loses_its_space(name: str) -> None:
    a = ids(name, "▁a")
    assert pieces(name, [BOS], a * 2) == ["a", " a", ""]
    assert pieces(name, [*a, *[BOS] * 12], a * 2) == [" a", " a", ""]
    assert pieces(name, [], [BOS, *a, BOS, *a]) == ["", "a", "", " a", ""]


def test_a_space_that_is_a_byte_is_the_first_one_too() -> None:
    for output in ([*byte_ids("llama-2", b" "), *ids("llama-2", "▁a")], byte_ids("llama-2", b"  a")):
        assert "".join(pieces("llama-2", [BOS], output)) == TOKENIZERS["llama-2"].decode(output) == " a"


@pytest.mark.parametrize("name", ["llama-2", "byte-level", "words"])
@pytest.mark.parametrize("what", ["text", "special", "bytes"])
def test_a_tokens_cost_does_not_grow(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the prompt's length matter: never are more than a few tokens decoded."""
    tokenizer, sizes = TOKENIZERS[name], []
    one = ids(name, {"llama-2": "a", "byte-level": "a", "words": "▁a"}[name])
    token = {"text": one, "special": [BOS], "bytes": one if name == "words" else byte_ids(name, b"\xe8")}[what]
    decode = type(tokenizer).decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: sizes.append(len(ids)) or decode(tokenizer, ids))
    pieces(name, one * 1000, token * 300)
    assert max(sizes, default=0) <= 12


@pytest.mark.parametrize("name", ["llama-2", "gemma", "byte-level"])
def test_bytes_of_tokens_alone(name: str) -> None:
    """Joined they are the text, however a character is cut, spaces before words among them."""
    tokenizer, text = TOKENIZERS[name], "a b é语\n"
    tokens = byte_ids(name, text.encode()) if name == "byte-level" else tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(token) for token in tokens)
    assert joined.decode().removeprefix(" ") == text
    assert tokenizer.token_bytes(BOS) == b"<s>"
    assert [tokenizer.token_bytes(token) for token in byte_ids(name, b"\xe8\xaa")] == [b"\xe8", b"\xaa"]


def test_bytes_of_words_have_their_space() -> None:
    assert [TOKENIZERS["words"].token_bytes(token) for token in ids("words", "▁bc", "d")] == [b" bc", b"d"]
