"""The options that several commands share, each declared once; ``pearl.cli.grouping.spread`` gives them to a command.

Values are checked where the library checks them (``EngineConfig``, ``SamplingParams``), so that the command line and
the Python interface refuse the same things with the same words.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial
from typing import Annotated, Any

import typer

from pearl.choices import BackendName, MethodName, Verification
from pearl.cli.text_input import checked_text
from pearl.errors import ConfigurationError
from pearl.sampling_params import SamplingParams
from pearl.user_values import shown

_model = partial(typer.Option, rich_help_panel="Models and method")
_hardware = partial(typer.Option, rich_help_panel="Hardware and memory")
_sampling = partial(typer.Option, rich_help_panel="Sampling")
_output = partial(typer.Option, rich_help_panel="Output")

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True)
class EngineOptions:
    """What becomes the ``pearl.LLM``."""

    target: Annotated[
        str | None, _model(help="Target: local folder, hub id or GGUF file. Default: the bundled one.")
    ] = None
    draft: Annotated[
        str | None, _model(help="Draft: the same, or 'ngram' (the text itself). Default: the bundled one.")
    ] = None
    method: Annotated[MethodName, _model(help="How to decode.")] = "pearl"
    verification: Annotated[
        Verification,
        _model(
            help="rejection: the target's distribution. coupled: its seeded tokens, one for one. "
            "block: as rejection, windows tested as a whole."
        ),
    ] = "rejection"
    pace: Annotated[str, _model(help="auto: the fastest mode and windows, measured. balanced: the paper's rule.")] = (
        "auto"
    )
    window: Annotated[str, _model(metavar="auto|N", help="Tokens drafted a round; N: in the method's own mode.")] = (
        "auto"
    )
    max_window: Annotated[int, _model(help="Largest window that auto may choose.")] = 16
    pre_verify: Annotated[bool, _model(help="Verify a window's first token while the rest is drafted.")] = True
    post_verify: Annotated[bool, _model(help="Draft on while the last window is verified.")] = True

    device: Annotated[str, _hardware(help="auto, cpu, cuda or cuda:N.")] = "auto"
    draft_device: Annotated[str | None, _hardware(help="Device of the draft, where it differs.")] = None
    target_device: Annotated[str | None, _hardware(help="Device of the target, where it differs.")] = None
    target_parallel: Annotated[int, _hardware(help="Ranks that share the target, each a process.")] = 1
    enforce_eager: Annotated[bool, _hardware("--enforce-eager", help="On CUDA: no CUDA graphs.")] = False
    draft_sms: Annotated[int | None, _hardware(help="Of a shared GPU: keep N multiprocessors free for the draft.")] = (
        None
    )
    backend: Annotated[
        BackendName, _model(help="native, or transformers: any other family, slower. auto: native where it can.")
    ] = "auto"
    draft_backend: Annotated[BackendName | None, _model(help="Backend of the draft, where it differs.")] = None
    dtype: Annotated[str, _hardware(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto"
    target_weights: Annotated[str, _hardware(help="full or int8 (CPU): another, smaller model.")] = "full"
    draft_weights: Annotated[str, _hardware(help="full or int8 (CPU); the output stays the target's.")] = "full"
    draft_threads: Annotated[
        int | None,
        _hardware(help="CPU threads of the draft. Default: a quarter, or all if it never works beside the target."),
    ] = None
    target_threads: Annotated[int | None, _hardware(help="CPU threads of the target. Default: all.")] = None
    max_model_len: Annotated[int | None, _hardware(help="Most tokens of prompt and output. Default: the model's.")] = (
        None
    )
    kv_cache_memory: Annotated[
        str | None, _hardware(metavar="SIZE", help="KV cache of both models: bytes, or such as 512M, 2G.")
    ] = None

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of ``pearl.LLM``."""
        window = int(self.window) if re.fullmatch(r"-?\d{1,9}", self.window) else self.window
        memory = None if self.kv_cache_memory is None else parse_size(self.kv_cache_memory)
        return asdict(self) | {"window": window, "kv_cache_memory": memory}


@dataclass(frozen=True)
class SamplingOptions:
    """What becomes the ``SamplingParams`` of each request."""

    temperature: Annotated[float, _sampling("--temperature", "-t", help="0: greedy.")] = 0.0
    top_k: Annotated[int, _sampling(help="Keep the k most likely tokens; 0: off.")] = 0
    top_p: Annotated[float, _sampling(help="Keep the smallest set with that probability; 1: off.")] = 1.0
    min_p: Annotated[float, _sampling(help="Keep tokens that likely relative to the likeliest; 0: off.")] = 0.0
    repetition_penalty: Annotated[float, _sampling(help="Against tokens of prompt and output; 1: off.")] = 1.0
    presence_penalty: Annotated[float, _sampling(help="Against tokens of the output, once each; 0: off.")] = 0.0
    frequency_penalty: Annotated[float, _sampling(help="Against tokens of the output, each time; 0: off.")] = 0.0
    max_tokens: Annotated[int, _sampling("--max-tokens", "-m", help="Most tokens of output.")] = 128
    min_tokens: Annotated[int, _sampling(help="That many end nothing.")] = 0
    stop: Annotated[list[str] | None, _sampling(metavar="TEXT", help="Ends the output; may be repeated.")] = None
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", help="Go on past the end of text.")] = False
    seed: Annotated[int | None, _sampling(help="Equal seeds give equal output. Default: a fresh one.")] = None
    draft_temperature: Annotated[
        float | None, _sampling(help="The draft's own: changes speed, never the output's distribution.")
    ] = None

    def params(self, n: int = 1) -> SamplingParams:
        """Raises InvalidRequestError for a value out of range."""
        for text in self.stop or ():
            checked_text(text, "--stop")
        return SamplingParams(**asdict(self), n=n)


@dataclass(frozen=True)
class OutputOptions:
    """How output is shown."""

    no_color: Annotated[
        bool, _output("--no-color", "--raw", help="No colours; NO_COLOR in the environment does the same.")
    ] = False


def parse_size(text: str) -> int:
    """Bytes of ``1048576``, ``512M``, ``1.5GiB``: powers of 1024.

    Raises ConfigurationError if the text is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigurationError(f"a size is a number of bytes or such as 512M or 2G, not {shown(text)}")
    return int(Decimal(match[1]) * _UNITS[match[2].lower()])
