"""The bundled pair: a small target and draft, trained on the interpreter's standard library, so that all runs offline.

``bench/train_pair.py`` made them; ``heldout.txt`` lists the files that neither has seen.
"""

from pathlib import Path
from typing import Literal


def bundled_path(role: Literal["target", "draft"]) -> Path:
    """Folder with the model in Hugging Face layout."""
    return Path(__file__).parent / role
