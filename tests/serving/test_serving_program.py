"""What ``pearl serve`` does before it listens."""

from __future__ import annotations

import gc

from serving_support import OPTIONS

from pearl.serving.program import load_llm


def test_what_was_loaded_is_not_looked_through_again_while_it_serves() -> None:
    """A collection of all that was imported would stop every stream for a tenth of a second."""
    gc.unfreeze()  # what tests before this one froze, in the same process
    try:
        with load_llm(OPTIONS):
            assert gc.get_freeze_count() > 10_000
            assert len(gc.get_objects()) < 10_000
    finally:
        gc.unfreeze()
