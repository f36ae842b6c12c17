"""lm-eval's log-likelihoods through the server, beside those of its own ``hf`` model on the same weights in fp32.

Both run the same two tasks over the files in ``data``: multiple choice, and whole texts window by window. Contexts are
cut, and texts have several windows, since they are longer than the 128 tokens that either may look at.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bench.clients.live_server import Served
from pearl.errors import PearlError

TOLERANCE = 1e-4  # of a log-likelihood
_DATA = Path(__file__).parent / "data"
_WINDOW = 128  # tokens
_TASKS = {
    "choice": 'output_type: multiple_choice\ndoc_to_text: "{{prompt}}"\ndoc_to_choice: "{{choices}}"\n'
    'doc_to_target: "{{answer}}"\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n',
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n'
    "  - metric: bits_per_byte\n",
}
# How lm-eval sends prompts: as ids that the server's tokenizer gave, as texts, as ids of its own tokenizer.
FORMS = {
    "ids, remote tokenizer": "tokenizer_backend=remote,num_concurrent=2",
    "texts": "tokenizer_backend=huggingface,tokenizer={weights},tokenized_requests=False,num_concurrent=2",
    "ids": "tokenizer_backend=huggingface,tokenizer={weights},tokenized_requests=True,num_concurrent=1",
}


class Likelihood(NamedTuple):
    """What lm-eval found of one request: ``greedy`` is None of a whole text."""

    value: float
    greedy: bool | None


Likelihoods = Mapping[tuple[str, int, int], Likelihood]  # by task, document, and choice


class Agreement(NamedTuple):
    form: str
    requests: int
    greedy: int  # of them
    largest: float  # difference
    other_greedy: int  # requests about which the two disagree

    @property
    def holds(self) -> bool:
        return self.largest <= TOLERANCE and not self.other_greedy


def agreements(python: str, served: Served, folder: Path) -> list[Agreement]:
    """Of every form. PearlError if lm-eval fails."""
    write_tasks(folder)
    weights = served.weights
    expected = _run(python, folder, "hf", "hf", f"pretrained={weights},dtype=float32,max_length={_WINDOW}", 1)
    found = []
    for index, (form, options) in enumerate(FORMS.items()):
        # Of its own limit it keeps one token for the answer, and another one back.
        arguments = f"model={served.model},base_url={served.url}/v1/completions,max_length={_WINDOW + 2},max_retries=1"
        options = options.format(weights=weights)
        likelihoods = _run(python, folder, f"served-{index}", "local-completions", f"{arguments},{options}", 3)
        found.append(compare(form, likelihoods, expected))
    return found


def write_tasks(folder: Path) -> None:
    for name, text in _TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {_DATA / name}.jsonl\n"
        (folder / f"{name}.yaml").write_text(f"task: pearl_{name}\ntest_split: test\n{source}{text}", "utf-8")


def _run(python: str, folder: Path, name: str, model: str, arguments: str, batch: int) -> Likelihoods:
    out = folder / name
    line = [
        python, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--device", "cpu",
        "--tasks", ",".join(f"pearl_{task}" for task in _TASKS), "--include_path", str(folder),
        "--batch_size", str(batch), "--log_samples", "--output_path", str(out),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PearlError(f"lm-eval ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return read_samples(out)


def read_samples(folder: Path) -> Likelihoods:
    """What ``--log_samples`` wrote below a folder."""
    found: dict[tuple[str, int, int], Likelihood] = {}
    for task in _TASKS:
        for file in folder.rglob(f"samples_pearl_{task}_*.jsonl"):
            for line in file.read_text("utf-8").splitlines():
                sample = json.loads(line)
                for choice, (answer,) in enumerate(sample["resps"]):
                    pair = answer if isinstance(answer, list) else (answer, None)
                    found[task, sample["doc_id"], choice] = Likelihood(float(pair[0]), _as_flag(pair[1]))
    return found


def _as_flag(told: object) -> bool | None:
    """lm-eval writes its samples' answers as texts."""
    return None if told is None else str(told) == "True"


def compare(form: str, found: Likelihoods, expected: Likelihoods) -> Agreement:
    """PearlError if there is nothing to compare, or not the same."""
    if not expected or found.keys() != expected.keys():
        raise PearlError(f"{form}: lm-eval gave {len(found)} log-likelihoods, its own model {len(expected)}")
    pairs = [(found[key], expected[key]) for key in expected]
    return Agreement(
        form,
        len(pairs),
        sum(bool(right.greedy) for _, right in pairs),
        max(abs(mine.value - right.value) for mine, right in pairs),
        sum(mine.greedy != right.greedy for mine, right in pairs),
    )
