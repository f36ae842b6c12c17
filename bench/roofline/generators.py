"""Engines that generate greedily on CPU, side by side: this one, transformers, and llama.cpp where it is installed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.roofline.gguf_export import write_gguf
from bench.roofline.llama_cpp import INSTALL, LlamaCpp, load_library
from pearl.bench.measure import answered
from pearl.errors import ConfigurationError
from pearl.heads import lone_head
from pearl.llm import LLM
from pearl.models import ModelConfig
from pearl.models.backend import describe_model
from pearl.sampling_params import SamplingParams

Tokens = list[list[int]]  # of each prompt
_LOOKED_UP = 10  # tokens, transformers' own advice


@dataclass(frozen=True)
class Generated:
    """``prompt_seconds``: of all prompts until each one's first token; None where the engine does not tell."""

    tokens: Tokens
    prompt_seconds: float | None = None


class Generate(Protocol):
    def __call__(self, prompts: Tokens, max_tokens: int, /) -> Generated:
        """Greedy continuations, without an end-of-text token's followers, at most ``max_tokens`` each."""
        ...


@dataclass(frozen=True)
class Run:
    generated: Generated
    seconds: float  # for everything

    @property
    def tokens(self) -> Tokens:
        return self.generated.tokens

    @property
    def tok_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def decode_tok_s(self) -> float | None:
        """Of the tokens after each first one, in the time after it; None where there are none or nobody knows it."""
        followers, prompts = sum(map(len, self.tokens)) - len(self.tokens), self.generated.prompt_seconds
        return None if prompts is None or followers == 0 else followers / (self.seconds - prompts)


@dataclass
class Contender:
    """One engine with one method. ``equals`` names the contender whose tokens it must return."""

    engine: str
    method: str
    threads: int
    generate: Generate
    dtype: str
    equals: str | None = None
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.method}, {self.threads} thread{'s' * (self.threads > 1)}"

    def run(self, prompts: Tokens, max_tokens: int) -> None:
        begin = time.perf_counter()
        generated = self.generate(prompts, max_tokens)
        self.runs.append(Run(generated, time.perf_counter() - begin))


@dataclass(frozen=True)
class LeftOut:
    engine: str
    reason: str


def pearl_contenders(stack: ExitStack, llm: LLM, threads: int) -> list[Contender]:
    """The methods around ``llm``, whose workers have ``threads`` intra-op threads each.

    With one thread each PEARL keeps two cores busy, the other methods one, as their models take turns. The pace of
    ``llm`` is PEARL's; the others have none, or "auto" alone.
    """
    methods = {"autoregressive": threads, "speculative": threads}
    if threads == 1:
        methods["pearl"] = 2
    dtype = str(llm.models.target.model.dtype).removeprefix("torch.")
    contenders: list[Contender] = []
    for method, cores in methods.items():
        variant = llm.variant(method=method, pace=llm.config.pace if method == "pearl" else "auto")
        stack.callback(variant.close)
        equals = contenders[0].name if contenders else None
        contenders.append(Contender("pearl", method, cores, _pearl(variant), dtype, equals))
    return contenders


def _pearl(llm: LLM) -> Generate:
    def generate(prompts: Tokens, max_tokens: int) -> Generated:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs = [answered(llm.generate(prompt, params))[0].outputs[0] for prompt in prompts]
        return Generated([o.token_ids for o in outputs], sum(o.metrics.time_to_first_token or 0.0 for o in outputs))

    return generate


def assistant(draft: str | None) -> str | None:
    """What transformers can be assisted by: a whole model, which a head is not, nor one of some of its target's ids."""
    if draft is None or lone_head(draft) is not None:
        return None
    model = describe_model(draft, "auto")
    return None if isinstance(model, ModelConfig) and model.reduced_vocab else draft


def transformers_contenders(llm: LLM, target: str, draft: str | None, thread_counts: Sequence[int]) -> list[Contender]:
    """``generate`` and assisted generation with the same pair, weights in the dtype of ``llm``'s, where its target is.
    Without a draft model prompt lookup assists.
    """
    from transformers import AutoModelForCausalLM

    draft = assistant(draft)
    dtype, device = llm.models.target.model.dtype, llm.config.resolve_device("target")
    with _silent_transformers():
        models: list[Any] = [
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
            for path in (target, draft)
            if path is not None
        ]
    model, *assistants = [one.to(device) for one in models]
    assisted: dict[str, Any] = (
        {"assistant_model": assistants[0]} if assistants else {"prompt_lookup_num_tokens": _LOOKED_UP}
    )
    eos_ids = llm.tokenizer.eos_ids

    def generator(threads: int, **options: Any) -> Generate:
        def generate(prompts: Tokens, max_tokens: int) -> Generated:
            with _silent_transformers(), intra_op_threads(threads), torch.inference_mode():
                return Generated([_transformers(model, prompt, max_tokens, eos_ids, options) for prompt in prompts])

        return generate

    name = str(dtype).removeprefix("torch.")
    return [
        Contender("transformers", method, threads, generator(threads, **options), name)
        for threads in thread_counts
        for method, options in (("generate", {}), ("assisted", assisted))
    ]


def _transformers(
    model: Any, prompt: list[int], max_tokens: int, eos_ids: frozenset[int], options: dict[str, Any]
) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
        eos_token_id=sorted(eos_ids) or None, pad_token_id=min(eos_ids, default=0), **options,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def llama_cpp_contenders(
    stack: ExitStack, llm: LLM, target: str, thread_counts: Sequence[int]
) -> list[Contender] | LeftOut:
    """llama.cpp's plain greedy decoding of the target, converted to GGUF; it has no draft model here."""
    dtype = llm.models.target.model.dtype
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    contenders = []
    try:
        load_library()
        write_gguf(Path(target), folder / "target.gguf", dtype)
        for threads in thread_counts:
            model = LlamaCpp(folder / "target.gguf", llm.max_model_len, threads)
            stack.callback(model.close)
            generate = _llama_cpp(model, llm.tokenizer.eos_ids)
            contenders.append(Contender("llama.cpp", "generate", threads, generate, str(dtype).removeprefix("torch.")))
    except ImportError as error:
        return LeftOut("llama.cpp", f"not installed ({error}): {INSTALL}")
    except ConfigurationError as error:
        return LeftOut("llama.cpp", str(error))
    return contenders


def _llama_cpp(model: LlamaCpp, eos_ids: frozenset[int]) -> Generate:
    def generate(prompts: Tokens, max_tokens: int) -> Generated:
        every: Tokens = []
        prompt_seconds = 0.0
        for prompt in prompts:
            begin = time.perf_counter()
            tokens = [model.start(prompt)]
            prompt_seconds += time.perf_counter() - begin
            while len(tokens) < max_tokens and tokens[-1] not in eos_ids:
                tokens.append(model.step(tokens[-1]))
            every.append(tokens)
        return Generated(every, prompt_seconds)

    return generate


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its progress bars and its advice on options that it sets itself; what was before comes back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def intra_op_threads(threads: int) -> Iterator[None]:
    """torch's threads for the calling thread; what was before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    contenders: Sequence[Contender],
    prompts: Tokens,
    max_tokens: int,
    repeats: int,
    stopped: Callable[[], bool],
    advance: Callable[[str], None],
) -> None:
    """Run all in turns, after a warm-up of each, until done or ``stopped()``, which is asked before each run.

    Raises ConfigurationError if a contender's tokens are not those of the one that it names in ``equals``.
    """
    for contender in contenders:
        if not stopped():
            contender.generate(prompts[:1], max_tokens)
    for repeat in range(repeats):
        for contender in contenders if repeat % 2 == 0 else contenders[::-1]:
            if not stopped():
                contender.run(prompts, max_tokens)
                advance(contender.name)
    by_name = {contender.name: contender for contender in contenders}
    for contender in contenders:
        if contender.equals is not None:
            _require_equal(contender, by_name[contender.equals])


def _require_equal(contender: Contender, other: Contender) -> None:
    if other.runs and any(run.tokens != other.runs[0].tokens for run in contender.runs):
        raise ConfigurationError(f"{contender.name} returned other tokens than {other.name}")
