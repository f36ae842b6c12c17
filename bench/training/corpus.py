"""What the pair learns from: the sources of the interpreter's standard library, and a tokenizer made for them."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    train: np.ndarray  # uint16 token ids, files joined by END_OF_TEXT
    heldout: np.ndarray

    def batch(self, rng: np.random.Generator, rows: int, length: int, heldout: bool = False) -> torch.Tensor:
        data = self.heldout if heldout else self.train
        starts = rng.integers(0, len(data) - length - 1, rows)
        return torch.from_numpy(np.stack([data[s : s + length + 1] for s in starts]).astype(np.int64))


def read_files() -> tuple[dict[str, str], dict[str, str]]:
    """Split the standard library's sources into (training, held-out) texts by a hash of the file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    heldout: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in path.parts or "lib2to3/tests/data" in name:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # a few test inputs are not UTF-8 on purpose
            continue
        generated_table = {"test", "tests", "idle_test"} & set(path.parts) and len(text) > 200_000
        if len(text) >= 200 and not generated_table:
            (heldout if sum(map(ord, name)) % 50 == 0 else train)[name] = text
    return train, heldout


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose pre-tokenizer keeps a line break with its indentation, so that code costs few tokens."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\n[ \t]*| ?[A-Za-z_]+| ?\d| ?[^\sA-Za-z_\d]+|[ \t]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(len(texts))
    encoded = tokenizer.backend_tokenizer.encode_batch([texts[i] for i in order])
    ids = [np.concatenate([[tokenizer.eos_token_id], e.ids]) for e in encoded]
    return np.concatenate(ids).astype(np.uint16)
