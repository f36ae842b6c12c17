"""Tokenizers built of a GGUF file's metadata: the ids of the tokenizers that they were converted from, on real text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="writes files with the package gguf")

from gguf_files import GgufFile, byte_level_fields
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.tokenization_utils_base import generate_merges

from bench.roofline.gguf_export import write_gguf
from pearl.errors import InvalidRequestError, ModelLoadError, UnsupportedModelError
from pearl.models import Tokenizer, bundled_path

ROOT = Path(__file__).resolve().parents[2]
PROSE = (ROOT / "README.md").read_text("utf-8")
CODE = Path(__file__).read_text("utf-8")
TEXTS = (
    "", " ", "a", "  two  spaces ", "\n\n\r\n\t x", "don't I'LL we've", "1234567890 12 3", "Füße, naïve ÅÄÖ",
    "漢字かな 한국어 ١٢٣", "🙂👍🏽 e\u0301", "CamelCaseWords snake_case __init__", "a/b//c #!",
    "<|end|><think>x</think> <|end|>", "\0\x7f", PROSE[:4000], CODE[:4000],
)  # fmt: skip
ADDED = [AddedToken(text, special=text.startswith("<|")) for text in ("<|begin|>", "<|end|>", "<think>", "</think>")]
EMBEDDING = {"token_embd.weight": (np.ones((700, 4), np.float32), "F32")}


def trained(pre_tokenizer: Any, normalizer: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 600 tokens."""
    backend = Backend(models.BPE(**options))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [PROSE, CODE], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([token for token in ADDED if token.special])
    backend.add_tokens([token for token in ADDED if not token.special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


def splitting(*patterns: str, last: Any = None) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, last or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
ORIGINALS: Mapping[str, Any] = {
    "gpt-2": lambda: trained(GPT2),
    "smollm": lambda: trained(DIGITS),
    "starcoder": lambda: trained(DIGITS),
    "qwen2": lambda: trained(splitting(PRETOKENIZE_REGEX), normalizers.NFC()),
    "llama-bpe": lambda: trained(splitting(TikTokenConverter().pattern), ignore_merges=True),
}


def tokenizer_of(fields: Mapping[str, Any], folder: Path) -> Tokenizer:
    path = GgufFile("llama", fields, EMBEDDING).write(folder / "model.gguf")
    return Tokenizer.from_pretrained(path)


def assert_same(ours: Tokenizer, original: Any) -> None:
    for text in TEXTS:
        ids = original.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == original.backend_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    original = ORIGINALS[pre]()
    ours = tokenizer_of(byte_level_fields(original, 700, pre), tmp_path)
    assert_same(ours, original)
    assert ours.vocab_size == len(original) < 700
    assert set(ours.special_texts.values()) == {"<|begin|>", "<|end|>"}


def test_splittings_differ(tmp_path: Path) -> None:
    """A name is not decoration: most texts would be other ids under another one."""
    original = ORIGINALS["gpt-2"]()
    found = {
        pre: [tokenizer_of(byte_level_fields(original, 700, pre), tmp_path).encode(text, False) for text in TEXTS]
        for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "deepseek-coder")
    }
    assert len({str(ids) for ids in found.values()}) == len(found)


def test_what_stands_around_a_text(tmp_path: Path) -> None:
    original = ORIGINALS["llama-bpe"]()
    fields = byte_level_fields(original, 700, "llama-bpe")
    begin, end, plain = original.bos_token_id, original.eos_token_id, original.encode("x")
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"tokenizer.ggml.add_bos_token": None}, [begin, *plain]),  # as llama.cpp, for this splitting
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [begin, *plain, end]),
        ({"tokenizer.ggml.add_eos_token": True}, [*plain, end]),
        ({}, plain),
    ]
    for changes, ids in cases:
        ours = tokenizer_of({k: v for k, v in {**fields, **changes}.items() if v is not None}, tmp_path)
        assert ours.encode("x") == ids
        assert ours.encode("x", add_special_tokens=False) == plain


def test_ids_that_end_a_text(tmp_path: Path) -> None:
    fields = byte_level_fields(ORIGINALS["gpt-2"](), 700)
    tokens, end = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.eos_token_id"]
    assert tokenizer_of(fields, tmp_path).eos_ids == {end}
    more = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert tokenizer_of({**fields, **more}, tmp_path).eos_ids == {5, 6, end}
    begin = tokens.index("<|begin|>")
    turns = {**fields, "tokenizer.ggml.tokens": [*tokens[:begin], "<|im_end|>", *tokens[begin + 1 :]]}
    assert tokenizer_of(turns, tmp_path).eos_ids == {end, begin}
    normal = [*fields["tokenizer.ggml.token_type"]]
    normal[begin] = np.int32(1)  # spelt like an end of turn, and none
    assert tokenizer_of({**turns, "tokenizer.ggml.token_type": normal}, tmp_path).eos_ids == {end}


def test_chat_templates(tmp_path: Path) -> None:
    fields = byte_level_fields(ORIGINALS["gpt-2"](), 700)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        tokenizer_of(fields, tmp_path).chat_text(messages)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    fields |= {"tokenizer.chat_template": template}
    ours = tokenizer_of(fields, tmp_path)
    assert ours.chat_text(messages) == "<|begin|>[user]hi"
    assert ours.render_chat(messages)[0] == fields["tokenizer.ggml.bos_token_id"]
    assert ours.settings()["chat_template"] == template
    named = {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools: {{ tools | length }}",
    }
    ours = tokenizer_of({**fields, **named}, tmp_path)
    assert ours.chat_text(messages) == "<|begin|>[user]hi"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert ours.chat_text(messages, {"tools": [tool]}) == "tools: 1"


@pytest.mark.parametrize("role", ["target", "draft"])
def test_the_bundled_pair(role: str, tmp_path: Path) -> None:
    """Its tokenizer splits as no name says: the file holds its tokenizer.json."""
    folder = bundled_path(role)  # type: ignore[arg-type]
    write_gguf(folder, tmp_path / "model.gguf", torch.bfloat16)
    ours, original = (Tokenizer.from_pretrained(str(path)) for path in (tmp_path / "model.gguf", folder))
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text)
    assert (ours.eos_ids, ours.vocab_size) == (original.eos_ids, original.vocab_size)
    assert ours.vocabulary == original.vocabulary


def sentencepiece_fields(seed: int = 0) -> dict[str, Any]:
    """Pieces of a BPE that was trained on text with blanks written as U+2581, with scores; every byte; gaps in ids."""
    text = [f"\u2581{word}" for word in (PROSE + CODE).split()]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, limit_alphabet=80, show_progress=False))
    pieces = [*sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__), "\u2581\u2581"]
    scores = [-float(i) for i in range(len(pieces))]
    random.Random(seed).shuffle(scores)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *([6] * 256), *([1] * len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*first, *pieces, "<tool>"],
        "tokenizer.ggml.token_type": [np.int32(kind) for kind in (*kinds, 4)],
        "tokenizer.ggml.scores": [0.0] * len(first) + scores + [0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def pieces_of(text: str, fields: Mapping[str, Any]) -> list[int]:
    """SentencePiece's BPE as it is defined: join the neighbours with the highest score, the leftmost first."""
    ids = {piece: i for i, piece in enumerate(fields["tokenizer.ggml.tokens"])}
    scores, kinds = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
    parts = list(text.replace(" ", "\u2581"))
    while True:
        joined = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts))
                  if a in ids and b in ids and a + b in ids and kinds[ids[a + b]] == 1]  # fmt: skip
        if not joined:
            break
        place = -max(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


EMBEDDING_OF_ALL = {"token_embd.weight": (np.ones((1000, 4), np.float32), "F32")}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    fields = {**sentencepiece_fields(), "tokenizer.ggml.add_space_prefix": prefix}
    ours = Tokenizer.from_pretrained(GgufFile("llama", fields, EMBEDDING_OF_ALL).write(tmp_path / "model.gguf"))
    for text in (*TEXTS[1:12], PROSE[:600], CODE[:600]):
        ids = pieces_of(" " * prefix + text, fields)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == text
    tool = fields["tokenizer.ggml.tokens"].index("<tool>")
    after = pieces_of(" " * prefix + "b", fields)
    assert ours.encode("a<tool>b</s>", False) == [*pieces_of(" " * prefix + "a", fields), tool, *after, 2]
    assert ours.eos_ids == {2}


def test_gemma(tmp_path: Path) -> None:
    """As transformers makes Gemma's of pieces: they merge in the order of their ids, several blanks are one piece."""
    fields = {**sentencepiece_fields(), "tokenizer.ggml.add_space_prefix": False}
    pieces = list(fields["tokenizer.ggml.tokens"])
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [
        *first,
        "\u2581\u2581",
        "\u2581\u2581\u2581",
        "\n\n",
        *(p for p in pieces[3:-1] if p != "\u2581\u2581"),
        "\n",
    ]
    blanks = [text.replace("\u2581", " ") if set(text) == {"\u2581"} and len(text) > 1 else text for text in tokens]
    fields |= {
        "tokenizer.ggml.tokens": blanks,
        "tokenizer.ggml.token_type": [
            np.int32(3 if t in first else 6 if t.startswith("<0x") else 4 if t.isspace() and len(t) > 1 else 1)
            for t in blanks
        ],
        "tokenizer.ggml.scores": [-1000.0 * (t.isspace() and len(t) > 1) for t in blanks],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.eos_token_id": 1,
    }
    vocab = {text: i for i, text in enumerate(tokens)}
    original = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab))
    ours = Tokenizer.from_pretrained(GgufFile("gemma2", fields, EMBEDDING_OF_ALL).write(tmp_path / "model.gguf"))
    for text in (*TEXTS, "a    b   c  d", "x\n\n\ny", "<bos>hi<eos>"):
        ids = original.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [2, *ids]


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"tokenizer.ggml.model": None}, r"it has no tokenizer \(tokenizer\.ggml\.model"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, r"it has no tokenizer"),
    "another kind": ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.ggml\.model is 't5': known are gpt2"),
    "no splitting": ({"tokenizer.ggml.pre": None}, r"the metadata has no tokenizer\.ggml\.pre"),
    "an unknown splitting": ({"tokenizer.ggml.pre": "viking"}, r"tokenizer\.ggml\.pre is 'viking': how it splits"),
    "no merges": ({"tokenizer.ggml.merges": None}, r"the metadata has no tokenizer\.ggml\.merges"),
    "other merges": (
        {"tokenizer.ggml.merges": ["qq zz"]},
        r"tokenizer\.ggml\.merges do not fit tokenizer\.ggml\.tokens",
    ),
    "half a merge": ({"tokenizer.ggml.merges": ["qq"]}, r"tokenizer\.ggml\.merges do not fit"),
    "few types": ({"tokenizer.ggml.token_type": [np.int32(1)]}, r"tokenizer\.ggml\.token_type must be a list of 700"),
    "wrong types": (
        {"tokenizer.ggml.token_type": [np.int32(9)] * 700},
        r"tokenizer\.ggml\.token_type has a type 9, which",
    ),
    "no type": (
        {"tokenizer.ggml.token_type": [np.int32(1)] * 699 + [np.int32(0)]},
        r"tokenizer\.ggml\.token_type has a type 0, which",
    ),
    "a token twice": (
        {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": None},
        r"has 'a' twice, as 0 and 1",
    ),
    "more tokens than rows": ({"tokenizer.ggml.tokens": ["a"] * 701}, r"has 701 tokens, token_embd\.weight 700 rows"),
    "an end beyond all": ({"tokenizer.ggml.eos_token_id": 700}, r"tokenizer\.ggml\.eos_token_id is 700; there are 700"),
    "a text for an id": ({"tokenizer.ggml.bos_token_id": "1"}, r"tokenizer\.ggml\.bos_token_id must be an integer"),
    "a number for a flag": (
        {"tokenizer.ggml.add_bos_token": 1},
        r"tokenizer\.ggml\.add_bos_token must be true or false",
    ),
    "no token to begin with": (
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
        r"tokenizer\.ggml\.add_bos_token, but no tokenizer\.ggml\.bos_token_id",
    ),
    "no tokenizer.json": (
        {"tokenizer.huggingface.json": "{}"},
        r"tokenizer\.huggingface\.json is none that can be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_wrong_is_named(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    fields = {**byte_level_fields(ORIGINALS["gpt-2"](), 700), **changes}
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=message) as error:
        tokenizer_of({k: v for k, v in fields.items() if v is not None}, tmp_path)
    assert "model.gguf: " in str(error.value)


def test_a_tokenizer_json_of_other_tokens(tmp_path: Path) -> None:
    original = ORIGINALS["gpt-2"]()
    fields = byte_level_fields(original, 700) | {"tokenizer.huggingface.json": original.backend_tokenizer.to_str()}
    assert tokenizer_of(fields, tmp_path).encode("hello") == original.encode("hello")
    tokens = fields["tokenizer.ggml.tokens"]
    fields["tokenizer.ggml.tokens"] = [*tokens[:300], "other", *tokens[301:]]
    with pytest.raises(
        ModelLoadError, match=r"token 300 is 'other' in tokenizer\.ggml\.tokens and '.+' in tokenizer\.hugg"
    ):
        tokenizer_of(fields, tmp_path)
