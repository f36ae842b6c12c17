"""Train the bundled draft/target pair on the interpreter's standard library.

    python bench/train_pair.py OUT --target-minutes 60 --draft-minutes 30
    python bench/train_pair.py OUT --init pearl/models/bundled     # start from an existing pair

Any size, CPU or GPU. The target is trained on the source text; the draft is then distilled from the target
(KL to its full distribution, plus a little cross-entropy). Run the same command again after an interruption: it
continues from the last checkpoint. Files the models never saw are listed in OUT/heldout.txt, and the closing line
reports loss and greedy agreement on them.
"""

import sys
from pathlib import Path

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.training.program import main

if __name__ == "__main__":
    typer.run(main)
