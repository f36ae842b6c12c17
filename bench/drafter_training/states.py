"""What a target says of a text: hidden states and likeliest tokens, computed once for each text, and kept."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from bench.drafter_training.data import Text

_LIKELIEST = 64  # tokens of each position that are kept, with their probabilities


@dataclass(frozen=True)
class TextStates:
    """Of T tokens. ``tokens``: at each position the target's K likeliest next ones, the likeliest first."""

    states: Tensor  # fp32 [T, layers * D]
    tokens: Tensor  # int64 [T, K]
    probabilities: Tensor  # fp32 [T, K], of the whole vocabulary's


class StateFile:
    """A file that grows by a text at a time; with an index, so that it goes on after an interruption.

    An epoch then costs the drafter alone, not the target. 4 KB a token for three layers of 576, 0.4 without.
    """

    def __init__(self, folder: Path, target: PreTrainedModel, layers: Sequence[int]) -> None:
        """``layers``: whose states are kept. typer.BadParameter if there is a file of another target."""
        config = target.config
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._target, self._layers = target.to(self._device).eval(), tuple(layers)  # type: ignore[arg-type]
        self._likeliest = min(_LIKELIEST, config.vocab_size)
        numbers = len(layers) * config.hidden_size
        self._row = np.dtype([("states", "<u2", (numbers,)), ("tokens", "<i4", (self._likeliest,)),
                              ("probabilities", "<f2", (self._likeliest,))])  # fmt: skip
        self._file, self._index = folder / "states.bin", folder / "states.jsonl"
        whose = {"layers": list(self._layers), "likeliest": self._likeliest, "target": _fingerprint(target)}
        if not self._index.exists():
            self._index.write_text(json.dumps(whose) + "\n")
        written = self._index.read_text("utf-8")
        whole = written[: written.rfind("\n") + 1]  # an interruption may have left a part of a line
        if whole != written:
            self._index.write_text(whole)
        first, *lines = whole.splitlines() or [""]
        if first != json.dumps(whose):
            raise typer.BadParameter(f"{self._file} is of another target; give another OUT, or delete it")
        self._places: dict[str, int] = {}  # of a text's first row
        self._rows, self._writing = 0, threading.Lock()  # threads may read at the same time
        for fields in map(json.loads, lines):
            self._places[fields["key"]] = self._rows
            self._rows += fields["rows"]

    def add_likeliest(self, text: Text, top: Sequence[Sequence[tuple[int, float]]]) -> None:
        """What is known since the target wrote the text: of each token behind ``text.begin``, which tokens were the
        likeliest in its place, with their log-probabilities. Only for a file without states.
        """
        rows = np.zeros(len(text.ids), self._row)
        for place, likeliest in zip(range(text.begin - 1, len(text.ids) - 1), top, strict=False):  # a text may be cut
            ids, logprobs = zip(*likeliest, strict=True)
            rows["tokens"][place, : len(ids)] = ids
            rows["probabilities"][place, : len(ids)] = np.exp(logprobs)
        self._add(text, rows)

    def read(self, text: Text) -> TextStates:
        """Computed, if it is the first time."""
        if _key(text) not in self._places:
            self._add(text, self._compute(text))
        begin = self._places[_key(text)] * self._row.itemsize
        rows = np.memmap(self._file, self._row, "r", begin, (len(text.ids),))
        states = torch.from_numpy(rows["states"].copy()).view(torch.bfloat16).float()
        tokens = torch.from_numpy(rows["tokens"].astype(np.int64))
        return TextStates(states, tokens, torch.from_numpy(rows["probabilities"].astype(np.float32)))

    def _add(self, text: Text, rows: np.ndarray) -> None:
        with self._writing, self._file.open("ab") as out, self._index.open("a", encoding="utf-8") as index:
            out.truncate(self._rows * self._row.itemsize)  # what an interruption left behind the last whole text
            out.write(rows.tobytes())
            out.flush()
            index.write(json.dumps({"key": _key(text), "rows": len(text.ids)}) + "\n")
            self._places[_key(text)] = self._rows
            self._rows += len(text.ids)

    @torch.inference_mode()
    def _compute(self, text: Text) -> np.ndarray:
        given = self._target(torch.tensor([text.ids], device=self._device), output_hidden_states=True, use_cache=False)
        states = torch.cat([given.hidden_states[layer][0] for layer in self._layers] or [given.logits[0, :, :0]], -1)
        logits = given.logits[0].float()
        best, tokens = logits.topk(self._likeliest)
        rows = np.empty(len(text.ids), self._row)
        rows["states"] = states.to("cpu", torch.bfloat16).view(torch.uint16).numpy()
        rows["tokens"] = tokens.cpu().numpy()
        rows["probabilities"] = (best - logits.logsumexp(-1, keepdim=True)).exp().cpu().numpy()
        return rows


def _key(text: Text) -> str:
    return hashlib.sha256(np.asarray(text.ids, np.int64).tobytes()).hexdigest()[:32]


def _fingerprint(target: PreTrainedModel) -> str:
    """Of some of its weights."""
    weight = target.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    rows = weight[:64].detach().float().cpu()
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:32]
