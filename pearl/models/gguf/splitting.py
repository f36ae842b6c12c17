"""How texts are split before byte-level BPE, by the name that a GGUF file gives (``tokenizer.ggml.pre``).

A file has only the name. What each stands for is in the tokenizer.json of the models that it was introduced for, and in
llama.cpp (src/llama-vocab.cpp), whose converter derives it from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True)
class Splitting:
    """``patterns``, one after the other, cut out what they match. ``gpt2``: then GPT-2's own pattern. ``digits``: every
    digit is a piece. ``whole``: a piece that is a token is that token, whatever its merges say. ``adds_begin``: where
    the file does not say."""

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    adds_begin: bool = False

    @property
    def normalizer(self) -> Any:
        return normalizers.NFC() if self.nfc else None

    @property
    def pre_tokenizer(self) -> Any:
        steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        return pre_tokenizers.Sequence(
            [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=self.gpt2)]
        )


_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-\u4e00\uac00-\ud7ff]+")

_OF_LLAMA3 = Splitting((_LLAMA3,), whole=True, adds_begin=True)
_OF_STARCODER = Splitting(gpt2=True, digits=True)
SPLITTINGS: Mapping[str, Splitting] = {
    "gpt-2": Splitting(gpt2=True),
    "smollm": _OF_STARCODER,
    "starcoder": _OF_STARCODER,
    "refact": _OF_STARCODER,
    "llama-bpe": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "llama3": _OF_LLAMA3,
    "qwen2": Splitting((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": Splitting((_QWEN2,)),
    "tekken": Splitting((_TEKKEN,), whole=True, adds_begin=True),
    "deepseek-coder": Splitting(_DEEPSEEK_CODER, digits=True),
}
