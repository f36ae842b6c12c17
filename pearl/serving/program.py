"""A server from its beginning to its end: what ``pearl serve`` runs."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.llm import LLM
from pearl.models import bundled_path
from pearl.sampling_params import SamplingParams
from pearl.serving.app import create_app
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.chat_markup import ChatMarkup
from pearl.serving.listening import ServerProcess, bound_socket, url_of
from pearl.serving.sampling import SamplingDefaults
from pearl.serving.settings import ServerSettings

_LOG = logging.getLogger("pearl.serving")
_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def run_server(
    tell: Callable[[str], None],
    address: tuple[str, int],
    llm_options: Mapping[str, Any],
    settings: ServerSettings,
    *,
    model_defaults: bool,
    drain_timeout: float | None = None,
    round_limit: float | None = None,
) -> None:
    """Serve until a signal. ``tell`` gets what is for the person who started it.

    model_defaults: whether sampling defaults are the target's own. Raises ConfigurationError.
    """
    logging.basicConfig(level=logging.WARNING, format=_FORM)
    logging.getLogger("pearl").setLevel(logging.INFO)
    with bound_socket(*address) as opened:
        target = llm_options.get("target") or str(bundled_path("target"))
        defaults = SamplingDefaults.of_model(target) if model_defaults else SamplingDefaults.of_openai()
        tell("loading the models")
        llm = LLM(**llm_options)
        with contextlib.suppress(InvalidRequestError):  # the first conversation imports what templates need: seconds
            llm.tokenizer.render_chat([{"role": "user", "content": "Hello"}])
        # The first grammar reads the vocabulary, and no thread runs Python meanwhile: half a second for 128k tokens.
        with contextlib.suppress(InvalidRequestError):
            llm.grammar(SamplingParams(structured={"regex": "a"}))
        _LOG.info("sampling defaults of requests: %s", defaults.shown())

        def listening() -> None:
            gc.collect()  # what was imported and loaded stays: looking through it would stop all streams for 0.1 s
            gc.freeze()
            tell(f"listening on {url_of(opened)}, model {settings.name}")

        _LOG.info("chat: %s", ChatMarkup(llm.tokenizer, settings.tool_parser, settings.reasoning_parser).described())
        engine = AsyncEngine(llm, round_limit=round_limit)
        server = ServerProcess(create_app(engine, settings, defaults), engine, listening, drain_timeout)
        server.run([opened])
