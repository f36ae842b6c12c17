"""Small data sets for the suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETS: dict[str, list[dict[str, Any]]] = {
    "humaneval": [
        {"task_id": "T/0", "prompt": "def add(a, b):\n    return a", "entry_point": "add", "test": "def check(f): 1"},
        {"task_id": "T/1", "prompt": "import os\n\n\ndef files(path):\n", "entry_point": "files", "test": "check = id"},
    ],
    "gsm8k": [
        {"question": f"How much is {i} and {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}
        for i in range(11)
    ],
    "mt_bench": [{"question_id": 81, "category": "coding", "turns": ["import sys\n", "class Stack:\n"]}],
    "mgsm": [
        {"question": f"{language} {i}", "category": language, "answer": str(i)}
        for language in ("german", "thai")
        for i in range(2)
    ],
}  # fmt: skip


def write_sets(folder: Path) -> Path:
    for name, rows in SETS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return folder
