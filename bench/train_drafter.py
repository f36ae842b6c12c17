"""Train an EAGLE-3 head for a target, from the target's own answers and local text.

    python bench/train_drafter.py OUT --target PATH --minutes 120 --own-questions 2000 --files 0
    python bench/train_drafter.py OUT --target PATH --minutes 120 --prompts questions.jsonl
    python bench/train_drafter.py OUT                       # for the bundled target

Run the same command again after an interruption: it goes on with the answers, and then the training, where they were.
OUT/head is what ``draft=`` takes; OUT/report.json says what it is worth on texts that it never saw.
"""

import sys
from pathlib import Path

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.drafter_training.program import main
from bench.shared.malloc import restart_for_training

if __name__ == "__main__":
    restart_for_training()
    typer.run(main)
