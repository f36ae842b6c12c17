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
    begin_log()
    with bound_socket(*address) as opened:
        defaults = sampling_defaults(llm_options, model_defaults)
        tell("loading the models")
        llm = load_llm(llm_options)
        _LOG.info("sampling defaults of requests: %s", defaults.shown())

        def listening() -> None:
            tell(f"listening on {url_of(opened)}, model {settings.name}")

        _LOG.info("chat: %s", ChatMarkup(llm.tokenizer, settings.tool_parser, settings.reasoning_parser).described())
        engine = AsyncEngine(llm, round_limit=round_limit)
        server = ServerProcess(create_app(engine, settings, defaults), engine, listening, drain_timeout)
        server.run([opened])


def begin_log(anew: bool = False) -> None:
    """To standard error: warnings of all, and what the server tells. ``anew``: whatever was set up before."""
    logging.basicConfig(level=logging.WARNING, format=_FORM, force=anew)
    logging.getLogger("pearl").setLevel(logging.INFO)


def sampling_defaults(llm_options: Mapping[str, Any], model_defaults: bool) -> SamplingDefaults:
    """The target's own, or OpenAI's. Raises ConfigurationError."""
    if not model_defaults:
        return SamplingDefaults.of_openai()
    return SamplingDefaults.of_model(llm_options.get("target") or str(bundled_path("target")))


def load_llm(options: Mapping[str, Any]) -> LLM:
    """Ready to serve: what a first request of some kind would do for all is done. ConfigurationError."""
    llm = LLM(**options)
    with contextlib.suppress(InvalidRequestError):  # a conversation imports what templates need: seconds
        llm.tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    # A grammar reads the vocabulary, and no thread runs Python meanwhile: half a second for 128k tokens.
    with contextlib.suppress(InvalidRequestError):
        llm.grammar(SamplingParams(structured={"regex": "a"}))
    gc.collect()  # what was imported and loaded stays: looking through it would stop all streams for 0.1 s
    gc.freeze()
    return llm
