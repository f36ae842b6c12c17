"""``pearl serve`` in a process that looks, when its engine has been closed, whether a page is lost.

``python -m bench.serving_load.checked_server serve ...``; the last line on standard error tells.
"""

from __future__ import annotations

import sys

from pearl.cli.app import main
from pearl.llm import LLM
from pearl.serving import program
from pearl.serving.async_engine import AsyncEngine

PAGES = "pages of the models:"
INTACT = "intact"


class CheckedEngine(AsyncEngine):
    """Its requests have ended before it closes, if the server was drained: what is held then is held by nobody."""

    async def close(self) -> None:
        await self.drain()
        verdict = pages_of(self.llm)
        await super().close()
        print(PAGES, verdict, file=sys.stderr, flush=True)


def pages_of(llm: LLM) -> str:
    """INTACT, or what is wrong with the pages of an engine that has nothing to do."""
    scheduler = llm.engine.scheduler
    wrong = [f"{len(scheduler.requests)} requests are left"] if scheduler.requests else []
    for name, kv in (("target", scheduler.target_kv), ("draft", scheduler.draft_kv)):
        if kv is None:
            continue
        if kv.num_free_pages != kv.num_pages:
            wrong.append(f"{kv.num_pages - kv.num_free_pages} of {kv.num_pages} pages of the {name} are held")
        try:
            kv.check_integrity()
        except AssertionError as error:
            wrong.append(f"the {name}'s bookkeeping: {error}")
    return "; ".join(wrong) or INTACT


if __name__ == "__main__":
    vars(program)[AsyncEngine.__name__] = CheckedEngine  # what `pearl serve` builds in this process
    main()
