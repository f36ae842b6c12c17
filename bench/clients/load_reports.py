"""Load generators that report on servers of OpenAI's API: guidellm, and vLLM's ``bench serve``."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.clients.live_server import Served
from pearl.errors import PearlError

_REQUESTS, _PROMPT, _OUTPUT, _STREAMS = 24, 64, 32, 4
# ``vllm bench serve`` itself, without the rest of vLLM's command line, which imports engines for GPUs.
_VLLM_BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; parser = argparse.ArgumentParser(); "
    "add_cli_args(parser); main(parser.parse_args())"
)


class Report(NamedTuple):
    what: str
    completed: int
    failed: int
    output_tokens: int
    errors: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether all succeeded, and had as many tokens as was asked for."""
        return not (self.failed or self.errors) and self.output_tokens == self.completed * _OUTPUT > 0


def guidellm(python: str, served: Served, folder: Path) -> list[Report]:
    """Chat and completions, some at a time and as many as there can be. PearlError if guidellm fails."""
    found: list[Report] = []
    for path in ("/v1/chat/completions", "/v1/completions"):
        for profile in (f"kind=concurrent,streams={_STREAMS}", "kind=throughput,max_concurrency=16"):
            out = folder / f"guidellm-{len(found)}.json"
            line = [
                python, "-m", "guidellm", "run", "--disable-console",
                "--backend", f"kind=openai_http,target={served.url},model={served.model},request_format={path}",
                "--profile", profile, "--constraint", f"kind=max_requests,count={_REQUESTS}",
                "--tokenizer", f"kind=huggingface_auto,model={served.weights}",
                "--data", f"kind=synthetic_text,prompt_tokens={_PROMPT},output_tokens={_OUTPUT}",
                "--output", f"kind=json,path={out}",
            ]  # fmt: skip
            _run("guidellm", line)
            report = json.loads(out.read_text("utf-8"))
            found += [_of_guidellm(f"{path} {profile}", benchmark) for benchmark in report["benchmarks"]]
    return found


def _of_guidellm(what: str, benchmark: Any) -> Report:
    requests = benchmark["requests"]
    completed, failed = requests["successful"], [*requests["errored"], *requests["incomplete"]]
    tokens = sum(request["output_metrics"]["total_tokens"] or 0 for request in completed)
    return Report(what, len(completed), len(failed), tokens, tuple(str(request)[:500] for request in failed))


def vllm_bench(python: str, served: Served, folder: Path) -> list[Report]:
    """Chat and completions, with log-probabilities and sampled. PearlError if the client fails."""
    found: list[Report] = []
    for backend, path, options in (
        ("openai", "/v1/completions", ("--logprobs", "2")),
        ("openai-chat", "/v1/chat/completions", ()),
        ("vllm", "/v1/completions", ("--temperature", "0.8", "--top-p", "0.9", "--request-rate", "20")),
    ):
        out = folder / f"vllm-{len(found)}.json"
        line = [
            python, "-c", _VLLM_BENCH, "--backend", backend, "--base-url", served.url, "--endpoint", path,
            "--model", served.model, "--tokenizer", str(served.weights), "--dataset-name", "random",
            "--random-input-len", str(_PROMPT), "--random-output-len", str(_OUTPUT), "--ignore-eos",
            "--num-prompts", str(_REQUESTS), "--max-concurrency", str(_STREAMS), "--disable-tqdm",
            "--save-result", "--save-detailed", "--result-filename", str(out), *options,
        ]  # fmt: skip
        _run("vllm bench serve", line)
        report = json.loads(out.read_text("utf-8"))
        errors = tuple(error[-500:] for error in report["errors"] if error)
        name = " ".join((backend, path, *options))
        found.append(Report(name, report["completed"], report["failed"], report["total_output_tokens"], errors))
    return found


def _run(name: str, line: Sequence[str]) -> None:
    done = subprocess.run(line, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PearlError(f"{name} ended with status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
