"""The tokenizer that a GGUF file describes: its tokens, how they merge, and what stands around a text.

A file may hold a whole tokenizer.json (``tokenizer.huggingface.json``), which is taken then. Else the tokenizer is made
with ``tokenizers`` from the metadata, exactly, or refused: one token more or less in a prompt is another prompt.
Byte-level BPE ("gpt2") and SentencePiece's BPE ("llama") are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from pearl.errors import ModelLoadError
from pearl.models.gguf.metadata import Metadata
from pearl.models.gguf.splitting import SPLITTINGS, Splitting
from pearl.models.plain_files import PlainTokenizer

_SPACE = "\u2581"
_NAMED = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
_ENDS = ("eos", "eot", "eom")
# Of files that say which id ends a text, but not which one ends a turn.
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


class Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class GgufVocabulary:
    """``metadata``: fields after "tokenizer.". ``rows``: of the model's embedding.

    ``by_place``: as transformers does with Gemma's pieces: they merge in the order of their ids, whatever their scores
    are, and several blanks, which the file spells as such, are a piece like others.

    Raises ModelLoadError and UnsupportedModelError, which name the field.
    """

    def __init__(self, metadata: Metadata, rows: int, by_place: bool = False) -> None:
        self._metadata, self._rows, self._by_place = metadata, rows, by_place

    def tokenizer(self) -> PlainTokenizer:
        backend = self._built() if self._metadata.value("huggingface.json") is None else self._stored()
        named = {name: self._tokens[token] for name, key in _NAMED.items() if (token := self._id(key)) is not None}
        return PlainTokenizer(backend, named, lambda: self._complete(backend, named))

    def end_ids(self) -> frozenset[int]:
        """Of text, turn and message."""
        ends = {key: self._id(key) for key in _ENDS}
        if ends["eot"] is None:
            turns = (self._ids.get(text) for text in _ENDS_OF_TURN)
            ends["eot"] = next((i for i in turns if i is not None and self._kinds[i] == Kind.CONTROL), None)
        return frozenset(token for token in ends.values() if token is not None)

    def _require_tokens(self) -> None:
        if self._metadata.value("ggml.model") is None or self._metadata.value("ggml.tokens") is None:
            raise ModelLoadError(
                "it has no tokenizer (tokenizer.ggml.model and tokenizer.ggml.tokens); take a file that has one"
            )

    @property
    def _kind(self) -> str:
        kind = self._metadata.text("ggml.model")
        if kind not in ("gpt2", "llama"):
            raise self._metadata.refuse("ggml.model", "known are gpt2 (byte-level BPE) and llama (SentencePiece's BPE)")
        return kind

    @cached_property
    def _tokens(self) -> list[str]:
        self._require_tokens()
        tokens = self._metadata.texts("ggml.tokens")
        if len(tokens) > self._rows:
            raise ModelLoadError(
                f"tokenizer.ggml.tokens has {len(tokens)} tokens, token_embd.weight {self._rows} rows; take a file "
                "that was converted as a whole"
            )
        if self._by_place:
            return [text.replace(" ", _SPACE) if text.isspace() else text for text in tokens]
        return tokens

    @cached_property
    def _kinds(self) -> list[int]:
        kinds = self._metadata.numbers("ggml.token_type", len(self._tokens))
        if kinds is None:
            return [Kind.NORMAL] * len(self._tokens)
        known = set(Kind)
        if unknown := [kind for kind in kinds if kind not in known]:
            raise ModelLoadError(
                f"tokenizer.ggml.token_type has a type {unknown[0]!r}, which there is not; known are 1 to 6"
            )
        return [int(kind) for kind in kinds]

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Of tokens that mean something: converters fill an embedding's padding up with texts [PAD0], ..."""
        ids: dict[str, int] = {}
        for token, text in enumerate(self._tokens):
            if self._kinds[token] == Kind.UNUSED and text == f"[PAD{token}]":
                continue
            if ids.setdefault(text, token) != token:
                raise ModelLoadError(f"tokenizer.ggml.tokens has {text!r} twice, as {ids[text]} and {token}")
        return ids

    def _id(self, key: str) -> int | None:
        name = f"ggml.{key}_token_id"
        if self._metadata.value(name) is None:
            return None
        token = self._metadata.integer(name, least=0)
        if token >= len(self._tokens):
            raise ModelLoadError(f"tokenizer.{name} is {token}; there are {len(self._tokens)} tokens")
        return token

    @cached_property
    def _splitting(self) -> Splitting:
        if self._metadata.value("ggml.pre") is None:
            raise ModelLoadError(
                "the metadata has no tokenizer.ggml.pre, which says how texts are split; take a newer file"
            )
        name = self._metadata.text("ggml.pre")
        if name not in SPLITTINGS:
            raise self._metadata.refuse(
                "ggml.pre", f"how it splits texts is not known here; known are {', '.join(SPLITTINGS)}"
            )
        return SPLITTINGS[name]

    def _stored(self) -> Tokenizer:
        try:
            backend = Tokenizer.from_str(self._metadata.text("huggingface.json"))
        except ModelLoadError:
            raise
        except Exception as error:  # tokenizers raises Exception itself
            raise ModelLoadError(f"tokenizer.huggingface.json is none that can be read: {error}") from error
        for text, token in self._ids.items():
            if backend.id_to_token(token) != text:
                raise ModelLoadError(
                    f"token {token} is {text!r} in tokenizer.ggml.tokens and {backend.id_to_token(token)!r} in "
                    "tokenizer.huggingface.json; take a file that was converted as a whole"
                )
        return backend

    def _built(self) -> Tokenizer:
        self._require_tokens()
        backend = self._byte_level() if self._kind == "gpt2" else self._sentencepiece()
        self._add_tokens(backend)
        self._surround(backend)
        return backend

    def _byte_level(self) -> Tokenizer:
        merges = [tuple(merge.split(" ", 1)) for merge in self._metadata.texts("ggml.merges")]
        backend = Tokenizer(self._bpe(merges, ignore_merges=self._splitting.whole))
        if self._splitting.normalizer is not None:
            backend.normalizer = self._splitting.normalizer
        backend.pre_tokenizer = self._splitting.pre_tokenizer
        backend.decoder = decoders.ByteLevel()
        return backend

    def _sentencepiece(self) -> Tokenizer:
        unknown = self._id("unknown")
        backend = Tokenizer(
            self._bpe(
                list(self._merges_of_scores()),
                unk_token=None if unknown is None else self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        replaced = normalizers.Replace(" ", _SPACE)
        prefixed = self._metadata.flag("ggml.add_space_prefix", True)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced]) if prefixed else replaced
        steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefixed)
        return backend

    def _merges_of_scores(self) -> Iterator[tuple[str, str]]:
        """SentencePiece's BPE joins the two neighbours whose token has the highest score."""
        scores = self._metadata.numbers("ggml.scores", len(self._tokens))
        if self._by_place:
            scores = tuple(-float(token) for token in range(len(self._tokens)))
        if scores is None:
            raise ModelLoadError("the metadata has no tokenizer.ggml.scores; take a file that is complete")
        pieces = {
            text: token for text, token in self._ids.items() if self._kinds[token] not in (Kind.CONTROL, Kind.BYTE)
        }
        found = []
        for text, token in pieces.items():
            halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            found += sorted(
                (-scores[token], token, pieces[left], pieces[right], left, right)
                for left, right in halves
                if left in pieces and right in pieces
            )
        found.sort(key=lambda merge: merge[0])
        return ((left, right) for *_, left, right in found)

    def _bpe(self, merges: list[Any], **options: Any) -> models.BPE:
        ids = self._ids
        try:
            return models.BPE(vocab=ids, merges=merges, **options)
        except Exception as error:  # tokenizers raises Exception itself
            raise ModelLoadError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error

    def _add_tokens(self, backend: Tokenizer) -> None:
        """Tokens that are found in a text before it is split; those that are special have no text in an output."""
        special = (Kind.CONTROL, Kind.UNKNOWN)
        added = [
            AddedToken(text, normalized=False, special=self._kinds[token] in special)
            for text, token in self._ids.items()
            if self._kinds[token] in (*special, Kind.USER_DEFINED)
        ]
        backend.add_tokens([token for token in added if not token.special])
        backend.add_special_tokens([token for token in added if token.special])

    def _surround(self, backend: Tokenizer) -> None:
        """What is put before and behind a text."""
        begins = self._splitting.adds_begin if self._kind == "gpt2" else True
        first, last = self._affix("bos", begins), self._affix("eos", False)
        if first is None and last is None:
            return
        single = [f"{self._tokens[token]}:0" if token is not None else "$A:0" for token in (first, None, last)]
        single = single[first is None : 2 + (last is not None)]
        backend.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, "$B:1"],
            special_tokens=[(self._tokens[token], token) for token in {first, last} if token is not None],
        )

    def _affix(self, key: str, default: bool) -> int | None:
        wanted, token = self._metadata.flag(f"ggml.add_{key}_token", default), self._id(key)
        if wanted and token is None and self._metadata.value(f"ggml.add_{key}_token") is not None:
            raise ModelLoadError(
                f"the metadata has tokenizer.ggml.add_{key}_token, but no tokenizer.ggml.{key}_token_id"
            )
        return token if wanted else None

    def _complete(self, backend: Tokenizer, named: dict[str, str]) -> Any:
        import transformers

        whole: Any = transformers.PreTrainedTokenizerFast  # untyped
        return whole(tokenizer_object=backend, chat_template=self._templates(), **named)

    def _templates(self) -> str | dict[str, str] | None:
        if self._metadata.value("chat_template") is None:
            return None
        default = self._metadata.text("chat_template")
        names = [] if self._metadata.value("chat_templates") is None else self._metadata.texts("chat_templates")
        others = {name: self._metadata.text(f"chat_template.{name}") for name in names}
        return {"default": default, **others} if others else default
