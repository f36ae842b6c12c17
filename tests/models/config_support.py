"""Folders with a config.json of a tiny model, and any of its fields as a test wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Absent:
    """Stands for a field that is left out."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def write_config(folder: Path, **changes: Any) -> str:
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)
