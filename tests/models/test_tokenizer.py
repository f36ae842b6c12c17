"""Text that comes piece by piece must be the text that comes at once."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as backends
from transformers import PreTrainedTokenizerFast, PythonBackend

from pearl.errors import InvalidRequestError
from pearl.models import Tokenizer, bundled_path


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.from_pretrained(str(bundled_path("target")))


def bytes_only() -> Tokenizer:
    """One token a byte: every character beyond ASCII is split."""
    backend = Backend(backends.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())


def words() -> Tokenizer:
    """A space between words comes from the decoder, as in sentencepiece: a first word decodes without it."""
    backend = Backend(backends.WordLevel({"▁a": 0, "▁bc": 1, "d": 2}, unk_token="d"))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), frozenset())


def pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.feed((token,)) for token in output), detokenizer.flush()]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), split=st.integers(0, 30))
def test_pieces_join_to_the_whole_text(text: str, split: int) -> None:
    for tokenizer in (bytes_only(), Tokenizer.from_pretrained(str(bundled_path("target")))):
        ids = tokenizer.encode(text)
        found = "".join(pieces(tokenizer, [], ids))
        assert found == tokenizer.decode(ids) == text


def test_an_incomplete_character_is_never_given_out() -> None:
    tokenizer = bytes_only()
    ids = tokenizer.encode("a🙂é")
    assert pieces(tokenizer, [], ids) == ["a", "", "", "", "🙂", "", "é", ""]


def test_an_output_may_complete_the_prompts_last_character() -> None:
    tokenizer = bytes_only()
    ids = tokenizer.encode("x🙂y")
    assert "".join(pieces(tokenizer, ids[:3], ids[3:])) == "🙂y"


def test_an_output_that_ends_inside_a_character_shows_it_at_the_end_only() -> None:
    tokenizer = bytes_only()
    assert pieces(tokenizer, [], tokenizer.encode("a🙂")[:3]) == ["a", "", "", "\ufffd"]


def test_a_genuine_replacement_character_survives() -> None:
    tokenizer = bytes_only()
    assert "".join(pieces(tokenizer, [], tokenizer.encode("a\ufffdb"))) == "a\ufffdb"


def test_the_space_before_an_outputs_first_word_is_kept() -> None:
    assert pieces(words(), [0], [1, 2, 0]) == [" bc", "d", " a", ""]


def test_special_tokens_have_no_text(bundled: Tokenizer) -> None:
    (end,) = bundled.eos_ids
    ids = [*bundled.encode("def f"), end, *bundled.encode("x")]
    assert "".join(pieces(bundled, [], ids)) == bundled.decode(ids) == "def fx"


def test_special_tokens_that_are_to_show_have_their_name(bundled: Tokenizer) -> None:
    (end,) = bundled.eos_ids
    half = bundled.encode("🙂")[:1]
    detokenizer = bundled.detokenizer(bundled.encode("x"), [end])
    assert detokenizer.feed([*bundled.encode("a"), *half]) == "a"
    assert detokenizer.feed([end, *bundled.encode("b"), end]) == "\ufffd<|endoftext|>b<|endoftext|>"
    assert detokenizer.feed(half) == ""
    assert detokenizer.flush() == "\ufffd"


def test_vocabulary_size_and_ends_of_text(bundled: Tokenizer) -> None:
    assert bundled.vocab_size == 4096
    assert bundled.eos_ids == {0}


class Slow(PythonBackend):
    """Without a Rust backend; ids 2 and 3 are a gap."""

    tokens: ClassVar = {"a": 0, "b": 1, "c": 4}

    def get_vocab(self) -> dict[str, int]:
        return {**self.tokens, **self.added_tokens_encoder}

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.tokens[token]

    def _convert_id_to_token(self, index: int) -> str:
        return {i: token for token, i in self.tokens.items()}[index]


def test_ids_in_a_gap_have_no_text_and_lie_within_the_vocabulary() -> None:
    backend = Backend(backends.BPE({"a": 0, "b": 1, "c": 4}, []))
    backend.decoder = decoders.Fuse()
    for plain in (PreTrainedTokenizerFast(tokenizer_object=backend), Slow()):
        tokenizer = Tokenizer(plain, frozenset())
        assert (len(plain), tokenizer.vocab_size) == (3, 5)
        assert "".join(pieces(tokenizer, [3, 0], [1, 2, 3, 4, 2])).replace(" ", "") == "bc"


def test_a_text_that_the_tokenizer_cannot_encode_is_its_requests_error() -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot encode this text: .*UNK"):
        Tokenizer(
            PreTrainedTokenizerFast(tokenizer_object=Backend(backends.WordLevel({"a": 0}, unk_token="?"))), frozenset()
        ).encode("b")


def test_a_missing_chat_template_is_an_error_that_says_so() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        bytes_only().render_chat([{"role": "user", "content": "hello"}])
