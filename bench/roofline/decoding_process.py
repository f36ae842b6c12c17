"""One engine that decodes plainly, in a process of its own: what ``bench/cpu_decoding.py`` starts in turns.

It reads a Job as JSON from its standard input and writes Timed as JSON, the last line of its standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.roofline.llama_cpp import LlamaCpp

ENGINES = ("pearl", "llama.cpp")


@dataclass(frozen=True)
class Job:
    engine: str
    model: str  # a folder; for llama.cpp a GGUF file
    dtype: str
    threads: int
    prompts: list[list[int]]
    max_tokens: int  # of each continuation, whatever ends a text
    passes: int  # over the prompts, after one over the first


@dataclass
class Timed:
    """Greedy continuations of the first pass, and seconds of all: to each first token, and for all that follow it."""

    tokens: list[list[int]]
    prompt_seconds: float
    decode_seconds: float
    build: str = ""


Continued = tuple[list[int], float, float]  # tokens, seconds to the first, seconds for the rest
Continue = Callable[[Sequence[int]], Continued]


def run(job: Job) -> Timed:
    continue_prompt, build, close = (_pearl if job.engine == "pearl" else _llama_cpp)(job)
    try:
        continue_prompt(job.prompts[0])
        done = [continue_prompt(prompt) for _ in range(job.passes) for prompt in job.prompts]
    finally:
        close()
    tokens = [tokens for tokens, *_ in done[: len(job.prompts)]]
    return Timed(tokens, sum(first for _, first, _ in done), sum(rest for *_, rest in done), build)


def _pearl(job: Job) -> tuple[Continue, str, Callable[[], None]]:
    from pearl.bench.measure import answered
    from pearl.llm import LLM
    from pearl.sampling_params import SamplingParams

    longest = max(map(len, job.prompts)) + job.max_tokens
    llm = LLM(
        target=job.model, method="autoregressive", device="cpu", dtype=job.dtype, target_threads=job.threads,
        max_num_seqs=1, prefix_caching=False, max_model_len=longest,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True)

    def continue_prompt(prompt: Sequence[int]) -> Continued:
        begin = time.monotonic()
        output = answered(llm.generate(list(prompt), params))[0].outputs[0]
        end, first = time.monotonic(), output.metrics.first_token_at
        assert first is not None
        return output.token_ids, first - begin, end - first

    return continue_prompt, "", llm.close


def _llama_cpp(job: Job) -> tuple[Continue, str, Callable[[], None]]:
    model = LlamaCpp(Path(job.model), max(map(len, job.prompts)) + job.max_tokens, job.threads)

    def continue_prompt(prompt: Sequence[int]) -> Continued:
        begin = time.monotonic()
        tokens = [model.start(prompt)]
        first = time.monotonic()
        while len(tokens) < job.max_tokens:
            tokens.append(model.step(tokens[-1]))
        return tokens, first - begin, time.monotonic() - first

    return continue_prompt, model.build, model.close


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    print(json.dumps(asdict(run(Job(**job)))))


if __name__ == "__main__":
    main()
